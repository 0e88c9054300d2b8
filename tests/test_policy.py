"""Policies: what they refuse, whom they let go, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import Said, lets_go, random_policies

from offramp.bundle import SCORES
from offramp.errors import OptionError
from offramp.policy import LEARNED, Policy, PolicyState, Veto, score_values

NUM_EXITS, NUM_CLASSES = 5, 3

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
    "negative patience": ({"patience": -1}, "got patience -1"),
    "half a patience": ({"patience": 1.5}, "got patience 1.5"),
    "depth 0": ({"minimum_depth": 0}, "got minimum_depth 0"),
    "true depth": ({"minimum_depth": True}, "got minimum_depth True"),
    "temperatures of a source": (
        {"sources": {"a": Policy(temperatures=(1.0,))}},
        "policy of source 'a': expected a name",
    ),
    "sources of a source": ({"sources": {"a": Policy(sources={"b": Policy()})}}, "policy of source 'a'"),
    "a number as source": ({"sources": {1: Policy()}}, "policy of source 1"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Policy(**fields)


@pytest.mark.parametrize("fields", [{"margin": 1.5}, {"margin": float("nan")}, {"previous": 1}, {"mean": None}])
def test_a_veto_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="for the veto"):
        Veto(**fields)


def said(values: list[float], column: int = 0, predictions: list[int] | None = None) -> Said:
    """Rows with one score given, and the others in the middle."""
    scores = np.full((len(values), len(SCORES)), 0.5, np.float32)
    scores[:, column] = values
    prediction = np.array(predictions or [0] * len(values), np.int64)
    return Said(np.zeros((len(values), NUM_CLASSES), np.float32), prediction, scores)


@pytest.mark.parametrize("score", ["max_prob", "margin"])
def test_large_is_sure(score: str) -> None:
    leaves, reason, state = Policy.thresholds(score, [0.75]).decide(0, said([0.7, 0.75, 0.8], SCORES.index(score)))
    assert leaves.tolist() == [False, True, True]
    assert (leaves.dtype, reason, state) == (np.bool_, score, None)


def test_small_entropy_is_sure() -> None:
    leaves, reason, _ = Policy.thresholds("entropy", [0.75]).decide(0, said([0.7, 0.75, 0.8], 2))
    assert leaves.tolist() == [True, True, False]
    assert reason == "entropy"


def test_a_learned_score_is_read_where_there_is_one() -> None:
    policy = Policy.thresholds(LEARNED, [0.75])
    out = said([0, 0])
    assert policy.decide(0, out).leaves.tolist() == [False, False]
    assert np.isnan(score_values(LEARNED, out)).all()
    leaves, reason, _ = policy.decide(0, out._replace(learned=np.array([0.7, 0.8], np.float32)))
    assert (leaves.tolist(), reason) == ([False, True], LEARNED)


@pytest.mark.parametrize("policy", [Policy.full_depth(), Policy.thresholds("margin", [None, 0.0])])
def test_nobody_leaves_a_closed_exit(policy: Policy) -> None:
    leaves, reason, _ = policy.decide(0, said([1.0] * 4))
    assert leaves.tolist() == [False] * 4
    assert (leaves.dtype, reason) == (np.bool_, "")


@pytest.mark.parametrize("veto", [Veto(), Veto(margin=0.1)])
def test_a_score_that_is_no_number_lets_nobody_go(veto: Veto) -> None:
    out = Said(*said([0, 0])[:2], np.full((2, 3), np.nan, np.float32))
    for score in SCORES:
        assert not Policy(score, (0.5,), veto=veto).decide(0, out).leaves.any()


def test_no_rows_are_no_decisions() -> None:
    policy = Policy("margin", (0.5, 0.5), patience=2, veto=Veto(0.1, True, True))
    empty = Said(np.empty((0, 3), np.float32), np.empty(0, np.int64), np.empty((0, 3), np.float32))
    leaves, _, state = policy.decide(0, empty)
    assert leaves.shape == (0,)
    assert policy.decide(1, empty, state).leaves.shape == (0,)


def test_patience_counts_the_exits_that_agree() -> None:
    policy = Policy(patience=3)
    state, left = None, []
    for k, predictions in enumerate([[1, 0], [1, 1], [1, 1], [1, 1]]):
        leaves, reason, state = policy.decide(k, said([0.5, 0.5], predictions=predictions), state)
        left.append(leaves.tolist())
        assert reason == "patience"
    assert left == [[False, False], [False, False], [True, False], [True, True]]


def test_all_conditions_in_force_are_named() -> None:
    policy = Policy("margin", (0.1, None), patience=1, veto=Veto(0.2, True, True), minimum_depth=1)
    named = "margin & patience & no veto by margin & no veto by the exit before & no veto by the mean"
    assert policy.decide(0, said([0.5])).reason == named
    assert policy.decide(1, said([0.5]), policy.decide(0, said([0.5])).state).reason == ""
    deep = Policy("margin", (0.1, 0.1), minimum_depth=2)
    assert [deep.decide(k, said([0.5])).reason for k in (0, 1)] == ["", "margin & minimum depth"]


@st.composite
def histories(draw: st.DrawFn) -> list[Said]:
    """What NUM_EXITS - 1 exits say about some rows, predictions that often agree, scores that often tie with limits."""
    num_rows = draw(st.integers(0, 6))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    heard = []
    for _ in range(NUM_EXITS - 1):
        logits = generator.normal(size=(num_rows, NUM_CLASSES)).astype(np.float32) * 2
        scores = generator.integers(0, 5, size=(num_rows, len(SCORES))).astype(np.float32) / 4
        heard.append(Said(logits, logits.argmax(axis=1), scores))
    return heard


@given(policy=random_policies(NUM_EXITS), heard=histories())
def test_every_condition_is_the_slow_rule_row_by_row(policy: Policy, heard: list[Said]) -> None:
    live, state = np.arange(len(heard[0].prediction)), None
    for k, whole in enumerate(heard):
        out = Said(whole.logits[live], whole.prediction[live], whole.scores[live])
        leaves, reason, state = policy.decide(k, out, state)
        rows = [[Said(*(part[row : row + 1] for part in said[:3])) for said in heard[: k + 1]] for row in live]
        assert leaves.tolist() == [lets_go(policy, history, NUM_EXITS) for history in rows]
        assert bool(reason) or not leaves.any()
        live = live[~leaves]
        assert state is None or isinstance(state, PolicyState)
        state = state.rows(~leaves) if state else None


def test_a_source_has_its_own_conditions_and_the_common_temperatures() -> None:
    policy = Policy("margin", (0.5,), (2.0, 1.0), sources={"bank": Policy(), "shop": Policy("entropy", (0.25,))})
    assert policy.for_source("bank") == Policy(temperatures=(2.0, 1.0))
    assert policy.for_source("shop") == Policy("entropy", (0.25,), (2.0, 1.0))
    assert policy.for_source("nobody") == Policy("margin", (0.5,), (2.0, 1.0))


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
    with pytest.raises(OptionError, match="patience 4, the model has 3 exits"):
        Policy(patience=4).check_exits(3)
    with pytest.raises(OptionError, match="minimum_depth 4, the model has 3 exits"):
        Policy(sources={"a": Policy(minimum_depth=4)}).check_exits(3)
    Policy.full_depth().check_exits(7)


@given(policy=random_policies(NUM_EXITS, with_sources=True))
def test_json_gives_the_same_policy_back(policy: Policy) -> None:
    text = policy.to_json()
    assert Policy.from_json(text) == policy
    assert Policy.from_json(text.encode()) == policy


def test_the_first_schema_is_still_read() -> None:
    text = '{"schema": 1, "score": "margin", "thresholds": [0.5, null], "temperatures": []}'
    assert Policy.from_json(text) == Policy.thresholds("margin", [0.5, None])


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(Policy.full_depth().to_json()) | fields)


BAD_JSON = {
    "not JSON": ("{", "policy is not JSON"),
    "not UTF-8": (b"\xff{", "policy is not JSON"),
    "deep": ("[" * 100_000, "policy is not JSON"),
    "a list": ("[]", "expected a JSON object"),
    "a field too many": (changed(kind="veto"), "expected score, thresholds, and any of"),
    "a field too few": ('{"schema": 1}', "expected score, thresholds, and any of"),
    "no schema": ('{"score": "margin", "thresholds": []}', "with a `schema`"),
    "newer": (changed(schema=3), "has schema 3, this offramp reads 1 to 2"),
    "true schema": (changed(schema=True), "has schema True"),
    "a veto of another kind": (changed(veto={"entropy": 1}), "expected `veto` to be"),
    "a veto that is none": (changed(veto=[]), "expected `veto` to be"),
    "patience": (changed(patience="2"), "got patience '2'"),
    "sources": (changed(sources=[]), "expected `sources` to be"),
    "a source": (changed(sources={"a": 1}), "got int; expected score"),
    "a source with sources": (
        changed(sources={"a": {"score": "margin", "thresholds": [], "sources": {}}}),
        "expected score, thresholds, and any of",
    ),
    "thresholds": (changed(thresholds=0.5), "to be lists"),
    "NaN": (changed(thresholds=[float("nan")]), "got threshold nan"),
    "score": (changed(score=["margin"]), "got score"),
    "temperature": (changed(temperatures=["1"]), "got temperature '1'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_a_bad_policy_file_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Policy.from_json(text)
