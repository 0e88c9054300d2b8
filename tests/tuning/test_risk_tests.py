import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.binomial import p_value
from offramp.errors import OptionError
from offramp.tuning.risk_tests import (
    betting_p_value,
    betting_upper_bound,
    hoeffding_bentkus,
    last_rejected,
    last_rejected_of,
)

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "safety_vectors.json").read_text())
LOSSES = {
    "bounded": np.array([((i * 37) % 101) / 101 * 0.1 for i in range(200)]),
    "binary": np.array([float((i * 7919) % 100 < 2) for i in range(1000)]),
}


@pytest.mark.parametrize("case", VECTORS["binomial"], ids=str)
def test_vectors_of_hoeffding_and_bentkus(case):
    found = hoeffding_bentkus(case["k"], case["n"], case["risk"])
    assert found == pytest.approx(case["hoeffding_bentkus"], rel=1e-9)


@pytest.mark.parametrize("case", VECTORS["wsr"], ids=str)
def test_vectors_of_betting(case):
    found = betting_p_value(LOSSES[case["losses"]], case["risk"], case["delta"])
    assert float(found) == pytest.approx(case["p"], rel=1e-9)


def wealth_by_hand(losses, risk, delta):
    """The largest wealth, loss by loss; bets look at earlier losses only."""
    wealth = largest = 1.0
    total = squares = 0.0
    variance = 0.25
    for t, loss in enumerate(losses, start=1):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)))
        wealth *= 1 - bet * (loss - risk)
        largest = max(largest, wealth)
        total += loss
        squares += (loss - (0.5 + total) / (t + 1)) ** 2
        variance = (0.25 + squares) / (t + 1)
    return largest


@given(st.lists(st.floats(-1, 1), max_size=40), st.floats(0.001, 0.9), st.sampled_from([0.01, 0.1]))
def test_betting_equals_betting_loss_by_loss(losses, risk, delta):
    found = betting_p_value(np.array(losses, np.float64), risk, delta)
    assert float(found) == pytest.approx(1 / wealth_by_hand(losses, risk, delta), rel=1e-9)


def test_many_sequences_at_once_are_each_by_itself():
    losses = np.random.default_rng(1).beta(1, 9, (3, 4, 50))
    found = betting_p_value(losses, 0.2, 0.1)
    assert found.shape == (3, 4)
    for index in np.ndindex(3, 4):
        assert found[index] == pytest.approx(float(betting_p_value(losses[index], 0.2, 0.1)), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_upper_bound_is_where_the_test_turns(name):
    bound = betting_upper_bound(LOSSES[name], 0.1)
    assert betting_p_value(LOSSES[name], bound + 1e-9, 0.1) <= 0.1
    assert betting_p_value(LOSSES[name], bound - 1e-9, 0.1) > 0.1
    assert betting_upper_bound(np.ones(30), 0.1) == pytest.approx(1.0)
    assert betting_upper_bound(np.empty(0), 0.1) == 1.0


def test_losses_above_one_are_refused():
    with pytest.raises(OptionError, match="at most 1"):
        betting_p_value(np.array([0.5, 1.5]), 0.1, 0.1)


@given(n=st.integers(1, 3000), share=st.floats(0, 1), risk=st.sampled_from([0.005, 0.02, 0.2]))
@settings(max_examples=100)
def test_the_exact_test_is_never_weaker_than_hoeffding_and_bentkus(n, share, risk):
    k = round(n * share * 2 * risk)
    assert p_value(min(k, n), n, risk) <= hoeffding_bentkus(min(k, n), n, risk) * (1 + 1e-9)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.9))
def test_the_last_rejected_is_before_the_first_that_is_not(p_values, delta):
    position = last_rejected(iter(p_values), delta)
    assert all(p <= delta for p in p_values[: position + 1])
    assert position + 1 == len(p_values) or p_values[position + 1] > delta
    assert last_rejected_of(np.array(p_values) <= delta) == position


def test_nothing_after_the_first_that_is_not_rejected_is_asked_for():
    def p_values():
        yield 0.01
        yield 0.2
        raise AssertionError("asked for more")

    assert last_rejected(p_values(), 0.05) == 0
