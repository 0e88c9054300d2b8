"""What routers learn, against what it means: losses in numpy, shares that are met, FFNs that are missed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import OptionError
from offramp.models.frozen import Additions, decoder_with
from offramp.models.llama import decoder_from_llama
from offramp.models.phases import RouterPhase, Steps, train_routers
from offramp.models.routers import (
    EVERYBODY,
    LeastSquares,
    RouterOptions,
    choice_entropy,
    fit_routers,
    fit_shortcuts,
    routed_pass,
    set_thresholds,
    straight_through,
    threshold_at,
    z_loss,
)
from tests import decoders

CAPACITIES = (0.9, 0.5, 0.2)


def routed(seed: int = 3):
    return decoder_with(decoder_from_llama(decoders.llama()), Additions((3,), capacities=CAPACITIES), seed)


def texts(number: int, length: int = 20) -> torch.Tensor:
    return torch.randint(decoders.VOCABULARY, (number, length), generator=torch.Generator().manual_seed(8))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_losses_are_what_the_papers_say(values: list[float]) -> None:
    scores = np.array(values)
    partition = np.logaddexp(scores / 2, -scores / 2)
    tensor = torch.tensor(values, dtype=torch.float64)
    assert np.isclose(z_loss(tensor), (partition**2).mean())
    share = 1 / (1 + np.exp(-scores))
    entropy = share * np.logaddexp(0, -scores) + (1 - share) * np.logaddexp(0, scores)
    assert np.isclose(choice_entropy(tensor), entropy.mean() / math.log(2), atol=1e-9)


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 99))
def test_a_threshold_lets_the_share_through(number: int, capacity: float, seed: int) -> None:
    scores = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).float()
    kept = (scores >= threshold_at(scores, capacity)).sum().item()
    assert abs(kept - capacity * number) <= max(0.5, 1 - capacity * number)


def test_a_hard_choice_has_the_gradient_of_a_soft_one() -> None:
    scores = torch.tensor([-2.0, 0.3, 0.5], requires_grad=True)
    chosen = straight_through(scores, 0.3, sharpness=2.0)
    assert chosen.tolist() == [0, 1, 1]
    chosen.sum().backward()
    soft = 1 / (1 + np.exp(-(np.array([-2.0, 0.3, 0.5]) - 0.3) / 2))
    assert np.allclose(scores.grad, soft * (1 - soft) / 2)


def test_the_capacity_falls_to_where_it_stays() -> None:
    options = RouterOptions(capacity=0.4, schedule=0.5)
    assert [options.capacity_at(done) for done in (0, 0.25, 0.5, 1)] == [1, 0.7, 0.4, 0.4]
    with pytest.raises(OptionError, match="capacity"):
        RouterOptions(capacity=0)


@torch.no_grad()
def test_a_pass_with_hard_gates_is_what_the_decoder_says_at_those_thresholds() -> None:
    model, ids = decoders.adaptive(), texts(2)
    thresholds = model.thresholds[1]
    gated = routed_pass(model, ids, lambda layer, scores: (scores >= thresholds[layer]).float()).logits
    none = [(torch.zeros(2, 2, 1, 8),) * 2] * model.config.num_remembering
    active = [torch.arange(20).repeat(2, 1)] * 2
    said = model(ids, torch.zeros(2, dtype=torch.int64), active, none, thresholds.repeat(2, 1))
    assert torch.allclose(gated, said.exits[-1].logits, atol=1e-4)


@torch.no_grad()
def test_thresholds_meet_every_capacity_while_skipping() -> None:
    model, ids = routed(), texts(12)
    set_thresholds(model, ids.split(4))
    for capacity, thresholds in zip(CAPACITIES, model.thresholds, strict=True):
        found = routed_pass(model, ids, lambda layer, s, t=thresholds: (s >= t[layer]).float()).scores
        share = (found >= thresholds[:, None, None]).float().mean().item()
        assert abs(share - capacity) < 0.08  # three rounds of a fixed point, on 720 scores


def test_routers_learn_which_layer_is_missed_least() -> None:
    """The second layer's FFN says nothing: its router gives it the lowest scores, and it is skipped first."""
    model, ids = routed(), texts(16)
    with torch.no_grad():
        model.layers[1].down.weight.mul_(1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train_routers(model, ids.numpy(), RouterPhase(8, Steps(4, 4, 1e-3), 16)).steps
    assert len(losses) == 4
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("router" in name or "shortcut" in name or name == "thresholds" for name in changed)
    scores = routed_pass(model, ids, lambda _, __: None).scores.mean((1, 2))
    assert scores.argmin() == 1
    assert (scores[[0, 2]] - scores[1]).min() > 3  # logarithms of squares of a thousandth


def test_least_squares_find_the_map_that_made_the_targets() -> None:
    generator = torch.Generator().manual_seed(5)
    maps = [torch.nn.Linear(6, 4) for _ in range(2)]
    sums = LeastSquares(2, 6, 4, torch.device("cpu"))
    for layer, linear in enumerate(maps):
        for count in range(3):  # batches add up, and what counts nothing is not seen
            rows = torch.randn(9, 6, generator=generator)
            sums.add(layer, rows, linear(rows), torch.ones(9) if count else None)
            sums.add(layer, rows, rows[:, :4], torch.zeros(9))
    found = [torch.nn.Linear(6, 4) for _ in range(2)]
    sums.fit(found, ridge=1e-9)
    for linear, wanted in zip(found, maps, strict=True):
        assert torch.allclose(linear.weight, wanted.weight, atol=1e-4)
        assert torch.allclose(linear.bias, wanted.bias, atol=1e-4)


@torch.no_grad()
def test_shortcuts_keep_what_is_said_without_ffns_nearer_to_what_was_said_with_them() -> None:
    model, ids = routed(), texts(40)
    wanted = routed_pass(model, ids, lambda _, __: None).logits.log_softmax(-1)

    def apart() -> float:
        said = routed_pass(model, ids, lambda _, scores: torch.zeros_like(scores)).logits.log_softmax(-1)
        return (wanted.exp() * (wanted - said)).sum(-1).mean().item()

    without = apart()
    parts = texts(40).split(8)
    fit_shortcuts(model, parts)
    everybody = apart()
    assert everybody < 0.8 * without
    with torch.enable_grad():
        model.requires_grad_(False)
        fit_routers(model, parts)
    before = [layer.shortcut.weight.clone() for layer in model.layers]
    fit_shortcuts(model, parts, capacity=0.5)
    assert not all(torch.equal(layer.shortcut.weight, old) for layer, old in zip(model.layers, before, strict=True))
    assert apart() < 0.9 * without


def test_an_epoch_without_routers_is_refused() -> None:
    plain = decoder_from_llama(decoders.llama())
    with pytest.raises(OptionError, match="capacities"):
        train_routers(plain, texts(2).numpy(), RouterPhase())
    with pytest.raises(OptionError, match="steps"):
        Steps(-1)
    assert threshold_at(torch.zeros(3), 1.0) == EVERYBODY
