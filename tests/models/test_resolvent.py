"""The recurrences against a dense inverse, their causality, and what they forget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.models.resolvent import (
    causal_resolvent,
    resolvent_diagonal,
    sweeps_needed,
)


def dense_diagonal(potential: np.ndarray, eta: float) -> np.ndarray:
    """G_ii (N,) complex of one potential (N,), by inverting the matrix."""
    n = len(potential)
    matrix = np.diag(potential - 2 - 1j * eta) + np.eye(n, k=1) + np.eye(n, k=-1)
    return np.diag(np.linalg.inv(matrix))


def as_complex(values: torch.Tensor) -> np.ndarray:
    return torch.view_as_complex(values.contiguous()).numpy()


@pytest.mark.parametrize("n", [1, 2, 3, 17, 128, 512])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_both_sides_equal_a_dense_inverse(n: int, eta: float) -> None:
    potential = torch.from_numpy(np.random.default_rng(n).normal(0, 2, (3, n)))
    found = as_complex(resolvent_diagonal(potential, eta))
    for row, values in zip(found, potential.numpy(), strict=True):
        np.testing.assert_allclose(row, dense_diagonal(values, eta), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_the_causal_one_is_the_last_entry_of_every_leading_block(n: int) -> None:
    potential = torch.from_numpy(np.random.default_rng(n).normal(0, 2, (1, n)))
    found = as_complex(causal_resolvent(potential))[0]
    expected = [dense_diagonal(potential.numpy()[0, : i + 1], 1.0)[-1] for i in range(n)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(-1e6, 1e6))
def test_sweeps_reach_the_sequential_recurrence_for_any_potential(values: list[float], first: float) -> None:
    potential = torch.tensor([[first, *values]], dtype=torch.float64)
    state, expected = 0j, []
    for value in potential[0].tolist():
        state = 1 / (value - 2 - 1j - state)
        expected.append(state)
    np.testing.assert_allclose(as_complex(causal_resolvent(potential))[0], expected, rtol=1e-12, atol=1e-15)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_chunks_that_hand_on_the_last_value_are_the_whole(lengths: list[int]) -> None:
    """What generation does: every chunk, single positions included, begins with the L before it."""
    potential = torch.from_numpy(np.random.default_rng(sum(lengths)).normal(0, 2, (2, sum(lengths))))
    found, before = [], torch.zeros(2, 2, dtype=torch.float64)
    for part in potential.split(lengths, dim=1):
        found.append(causal_resolvent(part, before))
        before = found[-1][:, -1]
    torch.testing.assert_close(torch.cat(found, dim=1), causal_resolvent(potential), rtol=1e-13, atol=1e-15)


def test_half_of_the_sweeps_do_not_reach_it() -> None:
    """The worst case of the bound: potentials in the middle of the band forget a bit per position and no faster."""
    potential = torch.full((1, 100), 2.0, dtype=torch.float64)
    exact = causal_resolvent(potential, num_sweeps=100)
    few = causal_resolvent(potential, num_sweeps=sweeps_needed(torch.float64) // 4)
    assert (few - exact).abs().max() > 1e-9
    assert (causal_resolvent(potential) - exact).abs().max() < 1e-15


def test_only_the_two_sided_one_sees_the_future() -> None:
    potential = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (1, 40)))
    later = potential.clone()
    later[0, 25:] += 3.0
    assert torch.equal(causal_resolvent(potential)[:, :25], causal_resolvent(later)[:, :25])
    leak = (resolvent_diagonal(potential) - resolvent_diagonal(later))[:, :25].abs().amax(dim=(0, 2))
    assert leak[-1] > 1e-2, "the position before the change sees it"
    assert leak[20] > leak[10] > 0, "and those before, less and less"


def test_rows_and_precision_do_not_mix() -> None:
    potential = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (4, 33))).float()
    together = causal_resolvent(potential)
    assert together.dtype == torch.float32
    assert all(torch.equal(causal_resolvent(potential[i : i + 1])[0], together[i]) for i in range(4))
    exact = causal_resolvent(potential.double())
    torch.testing.assert_close(together.double(), exact, rtol=2e-6, atol=2e-7)


def test_gradients_reach_the_potential() -> None:
    potential = torch.from_numpy(np.random.default_rng(2).normal(0, 1, (1, 6))).requires_grad_()
    assert torch.autograd.gradcheck(causal_resolvent, potential)
    assert torch.autograd.gradcheck(resolvent_diagonal, potential)
