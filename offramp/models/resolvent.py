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

DIAGONAL = -2.0  # of the discrete Laplacian
ETA = 1.0  # z = iη


def causal_resolvent(potential: Tensor, eta: float = ETA, num_sweeps: int = 0) -> Tensor:
    """L_i of every position: `potential` (B, N) to (B, N, 2), real and imaginary part; z = i `eta`.

    `num_sweeps=0` takes as many as the precision of the potential asks for.
    """
    shifted = _shifted(potential, eta)
    return _left(shifted, num_sweeps or sweeps_needed(potential.dtype, eta))


def resolvent_diagonal(potential: Tensor, eta: float = ETA, num_sweeps: int = 0) -> Tensor:
    """G_ii of every position: `potential` (B, N) to (B, N, 2), real and imaginary part. It sees the future."""
    shifted = _shifted(potential, eta)
    sweeps = num_sweeps or sweeps_needed(potential.dtype, eta)
    left = _left(shifted, sweeps)
    right = _left(shifted.flip(1), sweeps).flip(1)
    return _inverse(shifted - _previous(left) - _previous(right.flip(1)).flip(1))


def resolvent_step(potential: Tensor, before: Tensor, eta: float = ETA) -> Tensor:
    """L of one more position (B, 2) from its potential (B,) and the L before it (B, 2); zeros at the start."""
    return _inverse(_shifted(potential, eta) - before)


def sweeps_needed(dtype: torch.dtype, eta: float = ETA) -> int:
    """Sweeps after which what is still missing is below the rounding of `dtype`."""
    return math.ceil(-math.log(torch.finfo(dtype).eps) / math.log1p(eta * eta)) + 1


def _shifted(potential: Tensor, eta: float) -> Tensor:
    """a = v - 2 - iη as real and imaginary part, (…, 2)."""
    return torch.stack([potential + DIAGONAL, torch.full_like(potential, -eta)], dim=-1)


def _left(shifted: Tensor, num_sweeps: int) -> Tensor:
    """L (B, N, 2) from a (B, N, 2)."""
    left = _inverse(shifted)
    for _ in range(num_sweeps - 1):
        left = _inverse(shifted - _previous(left))
    return left


def _previous(values: Tensor) -> Tensor:
    """(B, N, 2) moved one position on, zeros at the start."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)


def _inverse(values: Tensor) -> Tensor:
    """1 / (x + iy) of (…, 2)."""
    real, imaginary = values.unbind(-1)
    size = real * real + imaginary * imaginary
    return torch.stack([real / size, -imaginary / size], dim=-1)
