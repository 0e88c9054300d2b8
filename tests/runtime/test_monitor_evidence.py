"""The e-processes against vectors and slow references, and what is promised of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitored import SHARES, draw

from offramp.binomial import p_value
from offramp.runtime.monitor_evidence import (
    MIN_TOLERANCE,
    MIX_BETS,
    RISK_BETS,
    ExitMix,
    Recertification,
    RiskTest,
    share_intervals,
    wealth,
)

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "eprocess.json").read_text())
counts = st.lists(st.integers(0, 2000), min_size=2, max_size=6).filter(any)


def slow_mix(exit_counts: Sequence[int], tolerance: float, exits: Sequence[int]) -> float:
    """One bet after the other, one row after the other, as the formula reads."""
    found = []
    for k, (low, high) in enumerate(share_intervals(tuple(exit_counts), tolerance)):
        for bet in MIX_BETS:
            up = down = 0.0
            for x in (float(exit_index == k) for exit_index in exits):
                up = (1 + up) * (1 + bet / high * (x - high))
                down = (1 + down) * (1 + bet / (1 - low) * (low - x))
            found += [up] * (high < 1) + [down] * (low > 0)
    return sum(found) / len(found) if found else 0.0


@given(exit_counts=counts, tolerance=st.floats(MIN_TOLERANCE, 0.2), data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_exit_mix_is_what_the_formula_says(exit_counts: list[int], tolerance: float, data: st.DataObject) -> None:
    exits = data.draw(st.lists(st.integers(0, len(exit_counts) - 1), min_size=1, max_size=80))
    split = data.draw(st.integers(0, len(exits)))
    by_row, in_batches = ExitMix(exit_counts, tolerance), ExitMix(exit_counts, tolerance)
    for exit_index in exits:
        by_row.update([exit_index])
    in_batches.update(exits[:split])
    in_batches.update(exits[split:])
    assert by_row.value == pytest.approx(slow_mix(exit_counts, tolerance, exits), rel=1e-9)
    assert in_batches.value == by_row.value


def test_the_intervals_hold_what_was_seen_and_are_never_empty() -> None:
    for exit_counts in [(0, 5000), (1, 0, 0), (1750, 1250, 750, 1250)]:
        for count, (low, high) in zip(exit_counts, share_intervals(exit_counts, 0.01), strict=True):
            assert 0 <= low <= count / sum(exit_counts) <= high <= 1
            assert high - low >= 0.01


def test_the_risk_test_gives_the_vectors() -> None:
    test = RiskTest(VECTORS["max_risk"])
    assert [share / test.max_risk for share in RISK_BETS] == pytest.approx(VECTORS["bets"])
    for t in range(1, 101):
        test.update(t % 10 == 0)
    assert test.wealth == pytest.approx(VECTORS["wealth_mean"], rel=1e-12)
    assert test.value == pytest.approx(VECTORS["sr_mean"], rel=1e-12)


@given(losses=st.lists(st.booleans(), max_size=60), max_risk=st.floats(0.001, 0.6), split=st.integers(0, 60))
def test_wealth_is_the_product_of_the_bets_in_any_order_and_over_processes(
    losses: list[bool], max_risk: float, split: int
) -> None:
    bets = [min(share, 0.9) / max_risk for share in RISK_BETS]
    expected = np.mean([math.prod(1 + bet * (is_loss - max_risk) for is_loss in losses) for bet in bets])
    left, right = RiskTest(max_risk), RiskTest(max_risk)
    for is_loss in sorted(losses)[:split]:
        left.update(is_loss)
    for is_loss in sorted(losses)[split:]:
        right.update(is_loss)
    assert wealth(left.audits + right.audits, left.losses + right.losses, max_risk) == pytest.approx(expected, rel=1e-9)


@given(max_risk=st.floats(0.001, 0.9), exit_counts=counts, tolerance=st.floats(MIN_TOLERANCE, 0.5))
@settings(deadline=None, max_examples=50)
def test_bets_gain_nothing_while_the_certificate_holds(
    max_risk: float, exit_counts: list[int], tolerance: float
) -> None:
    """E[e] <= 1 at every share within the intervals, which is all that both promises need."""
    test = RiskTest(max_risk)
    for on_loss, on_none in zip(test._on_loss, test._on_none, strict=True):
        assert min(on_loss, on_none) >= 0
        assert max_risk * on_loss + (1 - max_risk) * on_none == pytest.approx(1)
    mix = np.array(ExitMix(exit_counts, tolerance)._table)  # (E, B)
    shares = np.array(exit_counts) / sum(exit_counts)
    assert (mix > 0).all()
    assert (shares @ mix <= 1 + 1e-12).all()


@pytest.mark.parametrize(
    ("shares", "num_rows"), [(SHARES, 1_000_000), ((1.0, 0.0, 0.0, 0.0), 100_000), ((0.0, 0.0, 0.0, 1.0), 100_000)]
)
def test_evidence_stays_a_number(shares: Sequence[float], num_rows: int) -> None:
    """P8: a million updates, in control and as far out of it as can be."""
    exits = draw(np.random.default_rng(0), num_rows, shares)
    mix, risk = ExitMix((1750, 1250, 750, 1250), MIN_TOLERANCE), RiskTest(0.001)
    for start in range(0, len(exits), 1000):
        assert 0 <= mix.update(exits[start : start + 1000]) < math.inf
    for exit_index in exits[:80_000]:
        assert 0 <= risk.update(exit_index == 3) < math.inf
    assert 0 <= risk.wealth < math.inf


def test_the_lifetime_test_is_wrong_as_rarely_as_it_says() -> None:
    """Ville: at the limit of the certificate, P(wealth ever reaches 20) <= 0.05; 400 lives of 2,000 audits."""
    rng, max_risk = np.random.default_rng(1), 0.05
    losses = np.cumsum(rng.random((400, 2000)) < max_risk, axis=1)  # (lives, audits)
    audits = np.arange(1, 2001)
    logs = [
        losses * math.log1p(share / max_risk * (1 - max_risk)) + (audits - losses) * math.log1p(-share)
        for share in RISK_BETS
    ]
    highest = np.exp(logs).mean(axis=0).max(axis=1)
    assert wealth(2000, int(losses[0, -1]), max_risk) == pytest.approx(np.exp(logs).mean(axis=0)[0, -1])
    share = (highest >= 20).mean()
    assert 0 < share <= 0.05


def test_a_block_passes_as_the_binomial_says_and_its_levels_sum_to_delta() -> None:
    test = Recertification(0.02, 0.05)
    levels = []
    for attempt in range(1, 8):
        assert test.attempts == attempt
        assert p_value(test.allowed, test.num_rows, 0.02) <= test.level
        assert p_value(test.allowed + 1, test.num_rows, 0.02) > test.level
        levels.append(test.level)
        losses = [True] * test.allowed + [False] * (test.num_rows - test.allowed)
        assert [test.update(is_loss) for is_loss in losses] == [False] * (len(losses) - 1) + [True]
        test.begin_block()
    assert sum(levels) == pytest.approx(0.05 * 7 / 8)


def test_a_block_that_cannot_pass_begins_anew() -> None:
    test = Recertification(0.02, 0.05)
    assert test.allowed == 0
    assert not test.update(True)
    assert (test.attempts, test.rows, test.losses) == (2, 0, 0)


def test_a_bad_policy_hardly_ever_comes_back() -> None:
    """At a risk just above the certified one: at most delta of 300 recoveries, however long they try."""
    rng, back = np.random.default_rng(2), 0
    for _ in range(300):
        test = Recertification(0.05, 0.1)
        back += any(test.update(is_loss) for is_loss in (rng.random(6000) < 0.0501).tolist())
    assert 0 < back <= 300 * 0.1 + 3 * math.sqrt(300 * 0.1 * 0.9)
