"""Gates: choices and their gradients, who leaves where, and that they learn whom to let go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import OptionError
from offramp.models.gates import GateOptions, best_gates, exit_shares, gate_loss, leaves_by_chance


def test_choices_are_drawn_at_one_temperature_and_learned_at_another() -> None:
    torch.manual_seed(0)
    scores = torch.full((20_000,), 0.8, requires_grad=True)
    chosen = leaves_by_chance(scores, GateOptions(forward_temperature=1.0, backward_temperature=4.0))
    assert set(chosen.detach().unique().tolist()) == {0.0, 1.0}
    assert abs(chosen.mean().item() - torch.tensor(0.8).sigmoid().item()) < 0.015
    chosen.sum().backward()
    assert 0 < scores.grad.max() <= 1 / 16 + 1e-6  # a sigmoid's steepest slope, over 4
    sharp = leaves_by_chance(scores, GateOptions(forward_temperature=0.01))
    assert sharp.mean().item() > 0.999


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_a_token_leaves_at_the_first_exit_that_says_so(early: int, tokens: int, seed: int) -> None:
    leaves = np.random.default_rng(seed).integers(0, 2, (early, tokens))
    shares = exit_shares([torch.tensor(row, dtype=torch.float32) for row in leaves]).numpy()
    for token in range(tokens):
        where = next((k for k in range(early) if leaves[k, token]), early)
        assert shares[:, token].tolist() == [float(k == where) for k in range(early + 1)]


@given(st.integers(0, 999))
def test_the_best_gates_pay_least(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses, costs = random.random((3, 5)), [0.2, 0.6, 1.0]
    wanted = best_gates(torch.tensor(losses), costs, 0.7).numpy()
    for token in range(5):
        paid = losses[:, token] + 0.7 * np.array(costs)
        where = next((k for k in range(2) if wanted[k, token]), 2)
        assert paid[where] == paid.min()


def test_gates_learn_whom_to_let_go() -> None:
    """Half of the tokens lose nothing by leaving, the others much; a feature tells which."""
    torch.manual_seed(0)
    easy = torch.arange(400) % 2 == 0
    features = torch.stack([easy.float() - 0.5, torch.randn(400)], 1)
    losses = torch.stack([torch.where(easy, 0.0, 5.0), torch.zeros(400)])
    gate = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = gate_loss([gate(features)[:, 0]], losses, [0.3, 1.0], GateOptions())
        loss.backward()
        optimizer.step()
    assert ((gate(features)[:, 0] > 0) == easy).all()
    assert abs(loss.item() - 0.65) < 0.1  # half pay 0.3, half 1


def test_options_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match="temperatures above 0"):
        GateOptions(backward_temperature=0)
