"""Diagonals of the resolvent of a tridiagonal matrix: what a ResNet-BK block mixes positions with. Torch only.

H = H_0 + diag(v) over N positions, H_0 the discrete Laplacian (-2 on its diagonal, 1 beside it), v a potential that a
network gives. A block reads G_ii = [(H - zI)^-1]_ii at a z off the real line. With a_i = v_i - 2 - z:

    left    L_i = 1 / (a_i - L_{i-1}),  L_0 = 1 / a_0     the resolvent of positions 0 … i alone, at i: causal
    right   R_i = 1 / (a_i - R_{i+1})                     the same of positions i … N - 1
    both    G_ii = 1 / (a_i - L_{i-1} - R_{i+1})

(Schur complements of both neighbours.) G_ii sees the future; a language model takes L_i.

The recurrences are evaluated for all positions at once, `num_sweeps` times from L = 0: after s sweeps L_i is exact for
i < s, and elsewhere knows s positions. That is enough, because L forgets: with z = x + iη, η > 0, every L lies in the
upper half plane with |L| <= 1 / η. One step adds η to Im(L) (before an isometry of the hyperbolic metric), and so
shrinks hyperbolic distances by Im(L) / (Im(L) + η) <= 1 / (1 + η²). With z = i that is a half: a bit per sweep, at
worst, beyond the first few that bring the start near. The cost is linear in N, and all of it is elementwise work,
without a loop over positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

DIAGONAL = -2.0  # of the discrete Laplacian
ETA = 1.0  # z = iη


def causal_resolvent(potential: Tensor, before: Tensor | None = None, eta: float = ETA, num_sweeps: int = 0) -> Tensor:
    """L_i of every position: `potential` (B, N) to (B, N, 2), real and imaginary part; z = i `eta`.

    `before` (B, 2) is the L of the position before the first, zeros (or None) at the start. `num_sweeps=0` takes as
    many as the precision of the potential asks for.
    """
    conjugate = _conjugate(potential, eta)
    if before is not None:  # only the first position reads it
        first = conjugate[..., :1] - (before * _signs(before))[..., None]
        conjugate = torch.cat([first, conjugate[..., 1:]], dim=-1)
    return _left(conjugate, num_sweeps or sweeps_needed(potential.dtype, eta)).transpose(1, 2)


def resolvent_diagonal(potential: Tensor, eta: float = ETA, num_sweeps: int = 0) -> Tensor:
    """G_ii of every position: `potential` (B, N) to (B, N, 2), real and imaginary part. It sees the future."""
    conjugate = _conjugate(potential, eta)
    sweeps = num_sweeps or sweeps_needed(potential.dtype, eta)
    left, right = _left(conjugate, sweeps), _left(conjugate.flip(-1), sweeps)
    neighbours = _previous(left) + _previous(right).flip(-1)
    return _inverse(conjugate - neighbours * _signs(potential)[:, None]).transpose(1, 2)


def sweeps_needed(dtype: torch.dtype, eta: float = ETA) -> int:
    """Sweeps after which what is still missing is below the rounding of `dtype`."""
    return math.ceil(-math.log(torch.finfo(dtype).eps) / math.log1p(eta * eta)) + 1


def _conjugate(potential: Tensor, eta: float) -> Tensor:
    """The conjugate of a = v - 2 - iη as planes of real and imaginary parts, (B, 2, N).

    All is done with conjugates, because 1 / d is conj(d) / |d|².
    """
    return torch.stack([potential + DIAGONAL, torch.full_like(potential, eta)], dim=1)


def _left(conjugate: Tensor, num_sweeps: int) -> Tensor:
    """L from conj(a), both (B, 2, N), in five operators a sweep: decoding a token does little else."""
    size = _signs(conjugate)[:, None].expand(2, 2)  # times the squares: |d|² above -|d|²
    divisor = conjugate
    for _ in range(num_sweeps - 1):
        divisor = conjugate - _previous(divisor / (size @ (divisor * divisor)))
    return _inverse(divisor)


def _previous(values: Tensor) -> Tensor:
    """(B, 2, N) moved one position on, zeros at the start."""
    return functional.pad(values, (1, -1))


def _inverse(conjugate: Tensor) -> Tensor:
    """1 / d from conj(d), both (B, 2, N)."""
    return conjugate / (conjugate * conjugate).sum(1, keepdim=True)


def _signs(like: Tensor) -> Tensor:
    """(1, -1): what conjugation multiplies by."""
    return torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device)
