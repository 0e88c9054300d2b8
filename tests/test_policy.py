"""Policies: what they refuse, whom they let go, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.bundle import SCORES
from offramp.errors import OptionError
from offramp.policy import Policy

LIMITS = st.lists(st.none() | st.floats(0, 1), max_size=5)
TEMPERATURES = st.lists(st.floats(1e-3, 1e3), max_size=5)
POLICIES = st.builds(Policy.thresholds, st.sampled_from(SCORES), LIMITS, TEMPERATURES)

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "score": ({"score": "confidence"}, "got score 'confidence', expected one of max_prob, margin, entropy"),
    "above 1": ({"limits": (1.5,)}, "got threshold 1.5"),
    "below 0": ({"limits": (0.5, -0.1)}, "got threshold -0.1"),
    "NaN": ({"limits": (float("nan"),)}, "got threshold nan"),
    "text": ({"limits": ("0.5",)}, "got threshold '0.5'"),
    "bool": ({"limits": (True,)}, "got threshold True"),
    "zero temperature": ({"temperatures": (0.0,)}, "got temperature 0.0"),
    "infinite temperature": ({"temperatures": (float("inf"),)}, "got temperature inf"),
    "NaN temperature": ({"temperatures": (float("nan"),)}, "got temperature nan"),
    "no temperature": ({"temperatures": (None,)}, "got temperature None"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Policy(**fields)


def scores_of(column: int, values: list[float]) -> np.ndarray:
    scores = np.full((len(values), len(SCORES)), 0.5, np.float32)
    scores[:, column] = values
    return scores


@pytest.mark.parametrize("score", ["max_prob", "margin"])
def test_large_is_sure(score: str) -> None:
    scores = scores_of(SCORES.index(score), [0.7, 0.75, 0.8])
    leaves, reason = Policy.thresholds(score, [0.75]).decide(0, scores)
    assert leaves.tolist() == [False, True, True]
    assert (leaves.dtype, reason) == (np.bool_, score)


def test_small_entropy_is_sure() -> None:
    leaves, reason = Policy.thresholds("entropy", [0.75]).decide(0, scores_of(2, [0.7, 0.75, 0.8]))
    assert leaves.tolist() == [True, True, False]
    assert reason == "entropy"


@pytest.mark.parametrize("policy", [Policy.full_depth(), Policy.thresholds("margin", [None, 0.0])])
def test_nobody_leaves_a_closed_exit(policy: Policy) -> None:
    leaves, reason = policy.decide(0, np.ones((4, 3), np.float32))
    assert leaves.tolist() == [False] * 4
    assert (leaves.dtype, reason) == (np.bool_, "")


def test_a_score_that_is_no_number_lets_nobody_go() -> None:
    for score in SCORES:
        leaves, _ = Policy.thresholds(score, [0.5]).decide(0, np.full((2, 3), np.nan, np.float32))
        assert not leaves.any()


def test_no_rows_are_no_decisions() -> None:
    assert Policy.thresholds("margin", [0.5]).decide(0, np.empty((0, 3), np.float32))[0].shape == (0,)


def test_inverse_temperatures() -> None:
    assert Policy.full_depth().inverse_temperatures(3).tolist() == [1, 1, 1]
    inverse = Policy(temperatures=(2, 0.25)).inverse_temperatures(2)
    assert inverse.tolist() == [0.5, 4]
    assert inverse.dtype == np.float32


def test_a_policy_is_for_a_number_of_exits() -> None:
    policy = Policy.thresholds("margin", [0.5, None], [1, 1, 2])
    policy.check_exits(3)
    with pytest.raises(OptionError, match="2 thresholds, the model has 2 exits; expected 1"):
        policy.check_exits(2)
    with pytest.raises(OptionError, match="3 temperatures, the model has 4 exits"):
        Policy(temperatures=(1, 1, 2)).check_exits(4)
    Policy.full_depth().check_exits(7)


@given(policy=POLICIES)
def test_json_gives_the_same_policy_back(policy: Policy) -> None:
    text = policy.to_json()
    assert Policy.from_json(text) == policy
    assert Policy.from_json(text.encode()) == policy


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(Policy.full_depth().to_json()) | fields)


BAD_JSON = {
    "not JSON": ("{", "policy is not JSON"),
    "not UTF-8": (b"\xff{", "policy is not JSON"),
    "deep": ("[" * 100_000, "policy is not JSON"),
    "a list": ("[]", "expected a JSON object"),
    "a field too many": (changed(kind="veto"), "expected a JSON object with schema, score"),
    "a field too few": ('{"schema": 1}', "expected a JSON object with"),
    "newer": (changed(schema=2), "has schema 2, this offramp reads 1"),
    "thresholds": (changed(thresholds=0.5), "to be lists"),
    "NaN": (changed(thresholds=[float("nan")]), "got threshold nan"),
    "score": (changed(score=["margin"]), "got score"),
    "temperature": (changed(temperatures=["1"]), "got temperature '1'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_a_bad_policy_file_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Policy.from_json(text)
