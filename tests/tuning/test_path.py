from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import random_trace

from offramp.errors import OptionError
from offramp.policy import Policy, Veto
from offramp.tuning.path import (
    exits_along,
    expected_losses,
    grid_path,
    learned_path,
    open_exits,
    policy_at,
    sureness_of,
)
from offramp.tuning.replay import replay

POLICIES = {
    "thresholds": Policy(),
    "entropy": Policy("entropy"),
    "margin": Policy("margin"),
    "learned": Policy("learned"),
    "patience": Policy(patience=2),
    "minimum depth": Policy(minimum_depth=2),
    "veto by margin": Policy(veto=Veto(margin=0.2)),
    "veto by the exit before": Policy(veto=Veto(previous=True)),
    "veto by the mean": Policy(veto=Veto(mean=True)),
    "all": Policy("margin", patience=2, minimum_depth=2, veto=Veto(0.1, True, True)),
    "a closed exit": Policy(limits=(0.5, None, 0.5)),
    "temperatures": Policy(temperatures=(2.0, 1.0, 0.5, 3.0)),
}


def make_trace(num_rows=400, seed=3):
    trace = random_trace(num_rows, 4, seed)
    learned = np.random.default_rng(seed).random((num_rows, 4)).astype(np.float32)
    learned[:, 1] = np.nan
    return replace(trace, learned=learned)


@pytest.mark.parametrize("base", POLICIES.values(), ids=POLICIES)
def test_going_along_a_path_is_replaying_its_policies(base):
    trace = make_trace()
    sureness = sureness_of(base, trace)
    losses = (trace.predictions != trace.predictions[:, -1:]).astype(float)
    learned = learned_path(sureness, losses, np.arange(1.0, 5), 0.3 * len(losses))
    assert len(learned) > 5
    for path in (learned, grid_path(base.score, open_exits(base, trace))):
        assert np.isinf(path[0]).all()
        assert (path[1:] <= path[:-1]).all()
        for j, exit_index in enumerate(exits_along(sureness, path)):
            if j % 7 == 0 or j == len(path) - 1:
                assert exit_index.tolist() == replay(policy_at(base, path[j]), trace).exit_index.tolist()


@given(st.integers(0, 10_000), st.sampled_from(["max_prob", "entropy"]))
@settings(max_examples=20, deadline=None)
def test_any_loosening_path_is_replayed(seed, score):
    generator = np.random.default_rng(seed)
    trace = random_trace(60, 4, seed)
    base = Policy(score, patience=int(generator.integers(0, 3)))
    steps = -np.sort(-generator.random((6, 3)), axis=0).astype(np.float32) - (score == "entropy")
    sureness = sureness_of(base, trace)
    for limits, exit_index in zip(steps, exits_along(sureness, steps), strict=True):
        assert exit_index.tolist() == replay(policy_at(base, limits), trace).exit_index.tolist()


def test_exits_that_cannot_be_left_stay_closed():
    trace = make_trace()
    assert open_exits(Policy("learned", minimum_depth=1), trace) == [True, False, True]
    assert open_exits(Policy("max_prob", minimum_depth=2), trace) == [False, True, True]
    assert open_exits(POLICIES["a closed exit"], trace) == [True, False, True]
    assert policy_at(Policy("learned"), grid_path("learned", [True, False, True])[-1]).limits[1] is None
    with pytest.raises(OptionError, match="4 exits; expected 3"):
        open_exits(Policy(limits=(0.5,)), trace)


def test_a_learned_path_saves_the_most_per_risk_first():
    # exit 0 is right about its sure half, exit 1 about nothing
    sureness = np.array([np.linspace(1, 0.5, 400), np.linspace(1, 0.5, 400)], np.float32)
    losses = np.zeros((400, 3))
    losses[200:, 0] = 1
    losses[:, 1] = 1
    path = learned_path(sureness, losses, np.array([1.0, 2.0, 3.0]), 150)
    first_opened = path[1]
    assert first_opened[0] == pytest.approx(0.75, abs=0.01)
    assert np.isinf(first_opened[1])
    assert path[-1][0] < 0.7  # and then as much as 150 losses pay for
    assert [float(np.isinf(limits[1])) for limits in path] == [1.0] * len(path)


def test_a_path_over_rows_that_may_never_leave_is_full_depth():
    sureness = np.full((2, 10), -np.inf, np.float32)
    assert np.isinf(learned_path(sureness, np.zeros((10, 3)), np.arange(3.0), 5)).all()
    assert np.isinf(learned_path(sureness[:, :0], np.zeros((0, 3)), np.arange(3.0), 0)).all()


def test_expected_losses_follow_a_logistic_curve_and_then_the_losses_seen():
    generator = np.random.default_rng(5)
    sure = generator.uniform(0.5, 1, 20_000).astype(np.float32)
    true = 1 / (1 + np.exp(1 + 2 * np.log(sure / (1 - sure))))
    losses = np.stack([(generator.random(20_000) < true).astype(float), np.zeros(20_000)], axis=1)
    by_curve = expected_losses(sure[None], losses, 0)
    assert np.abs(by_curve[:, 0] - true).max() < 0.02
    assert (by_curve[:, 1] == 0).all()
    assert np.abs(expected_losses(sure[None], losses, 1e12) - losses).max() < 1e-6
    signed = expected_losses(sure[None], losses * [1, 0] - 0.5 * losses[::-1] * [1, 0], 0)
    assert np.abs(signed[:, 0] - (true - 0.5 * true.mean())).mean() < 0.05
