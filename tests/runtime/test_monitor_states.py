"""One stream of requests: what it takes to suspect, to fall back and to recover, and how audits are chosen."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitored import BASELINE, NUM_EXITS, draw

from offramp.certificate import Certificate, SourceStatement
from offramp.errors import OptionError
from offramp.runtime.monitor_evidence import RiskTest
from offramp.runtime.monitor_states import (
    FULL_DEPTH,
    NORMAL,
    RECOVERY,
    SUSPECT,
    Baseline,
    Change,
    MonitorOptions,
    Stream,
    baselines_from_certificate,
)

SHIFTED = (0.2, 0.25, 0.15, 0.4)  # 15 points from the first exit to the last


class Told:
    """A stream and the changes that it told of."""

    def __init__(self, baseline: Baseline = BASELINE, seed: int = 0, num_streams: int = 1, **options: float) -> None:
        self.changes: list[Change] = []
        made = MonitorOptions(**options)  # type: ignore[arg-type]
        self.stream = Stream("", baseline, made, num_streams, random.Random(seed), self.changes.append)
        self.stream.policy_changed("the policy")

    def feed(self, exits: Sequence[int], losses: Sequence[bool]) -> int:
        """One row per request, audited as the stream says; returns after how many rows it fell back, or 0."""
        for t, (exit_index, is_loss) in enumerate(zip(exits, losses, strict=True)):
            is_audited = len(self.stream.chosen(1)) > 0
            self.stream.update([exit_index], [(exit_index, bool(is_loss))] if is_audited else [])
            if self.changes and self.changes[-1].after == FULL_DEPTH:
                return t + 1
        return 0

    def trip(self) -> None:
        """Into full depth, by losses alone."""
        for _ in range(10_000):
            if self.stream.state == FULL_DEPTH:
                return
            self.stream.update([0], [(0, True)])
        raise AssertionError("no alarm")

    def rows(self, num_rows: int, losses: int = 0) -> None:
        """Audited rows that leave as the baseline says, the first ones with a loss."""
        for t in range(num_rows):
            exit_index = t % NUM_EXITS
            self.stream.update([exit_index], [(exit_index, t < losses)])


def test_nothing_happens_while_nothing_happens() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        told = Told(seed=seed)
        assert told.feed(draw(rng, 6000), rng.random(6000) < 0.01) == 0
        assert told.stream.state in (NORMAL, SUSPECT)


def test_a_shift_of_the_exit_mix_is_found_within_500_rows_in_the_median() -> None:
    delays = []
    for seed in range(9):
        rng, told = np.random.default_rng(seed), Told(seed=seed)
        assert told.feed(draw(rng, 1000), [False] * 1000) == 0
        delays.append(told.feed(draw(rng, 2000, SHIFTED), [False] * 2000))
    assert all(delays)
    assert np.median(delays) <= 500
    assert told.changes[-1].cause == "the exit mix has shifted"


def test_a_threefold_risk_is_found_within_250_audits_in_the_median() -> None:
    delays = []
    for seed in range(31):
        rng, told = np.random.default_rng(seed), Told(seed=seed, audit_rate=1.0, suspect_audit_rate=1.0)
        assert told.feed(draw(rng, 100), rng.random(100) < 0.01) == 0
        delays.append(told.feed(draw(rng, 3000), rng.random(3000) < 0.06))
    assert all(delays)
    assert np.median(delays) <= 250


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"audits_between_alarms": 1e90}, "audits: the risk is too high"),
        ({"false_alarm": 1e-90}, "audits: the risk has risen"),
    ],
)
def test_each_test_of_the_risk_trips_by_itself_at_its_level(options: dict[str, float], cause: str) -> None:
    told = Told(**options)
    num_losses = 0
    while told.stream.state != FULL_DEPTH:
        num_losses += 1
        told.stream.update([0], [(0, True)])
    by_hand = RiskTest(BASELINE.max_risk)
    both = [(by_hand.update(True) / 1e4, by_hand.wealth / 1e3) for _ in range(9)]  # shares of an alarm
    shares = [wealth if cause.endswith("too high") else risen for risen, wealth in both]
    assert num_losses == 1 + sum(share < 1 for share in shares)
    assert told.stream.cause == cause


def test_suspicion_raises_the_audit_rate_and_goes_away() -> None:
    told = Told(audit_rate=0.01, suspect_audit_rate=0.5)
    told.stream.update([0, 0], [(0, True), (0, True)])
    assert told.stream.state == SUSPECT
    assert 400 < sum(len(told.stream.chosen(10)) for _ in range(100)) < 600
    for _ in range(300):
        told.stream.update([], [(3, False)])
    assert told.stream.state == NORMAL
    assert sum(len(told.stream.chosen(10)) for _ in range(100)) < 40
    assert [change.after for change in told.changes] == [SUSPECT, NORMAL]


def test_only_recertification_leads_out_of_full_depth() -> None:
    told = Told(cool_down=10)
    told.trip()
    assert told.stream.chosen(3) == range(3)  # every row is an audit
    told.rows(9)
    assert told.stream.state == FULL_DEPTH
    told.rows(1)
    assert told.stream.state == RECOVERY
    needed = told.stream.recertification.num_rows
    told.rows(needed - 1)
    assert told.stream.state == RECOVERY
    told.rows(1)
    assert told.stream.state == NORMAL
    assert (told.stream.trips, told.stream.cause) == (1, "certified again")
    assert told.stream.risk.audits == 0  # of the new certificate


def test_losses_keep_a_policy_in_full_depth_and_make_the_next_block_longer() -> None:
    told = Told(cool_down=0)
    told.trip()
    told.rows(1)
    first = told.stream.recertification.num_rows
    for _ in range(3):
        told.rows(first, losses=4)
        assert told.stream.state == RECOVERY
    assert told.stream.recertification.num_rows > 2 * first


def test_the_cool_down_doubles_with_every_trip() -> None:
    told = Told(cool_down=10)
    for trip in range(3):
        told.trip()
        told.rows(10 * 2**trip - 1)
        assert told.stream.state == FULL_DEPTH
        told.rows(1)
        assert told.stream.state == RECOVERY
        while told.stream.state == RECOVERY:
            told.rows(1)
    assert told.stream.trips == 3


def test_recovery_takes_the_new_exit_mix_only_where_the_old_one_fits_no_more() -> None:
    told = Told(cool_down=0)
    told.trip()
    told.stream.update([0], [(0, False)])
    rng = np.random.default_rng(0)
    for exit_index in draw(rng, 1000):
        if told.stream.state == NORMAL:
            break
        told.stream.update([exit_index], [(exit_index, False)])
    assert told.stream.baseline.exit_counts == BASELINE.exit_counts
    told.trip()
    told.stream.update([0], [(0, False)])
    counts = [0] * NUM_EXITS
    while told.stream.state == RECOVERY:
        (exit_index,) = draw(rng, 1, (0.0, 0.1, 0.1, 0.8))
        counts[exit_index] += 1
        told.stream.update([exit_index], [(exit_index, False)])
    assert told.stream.baseline == replace(BASELINE, exit_counts=tuple(counts), policy_sha256="the policy")


def test_another_policy_leads_out_of_nothing_and_is_not_certified() -> None:
    told = Told(cool_down=5)
    told.trip()
    told.stream.policy_changed("another")
    assert told.stream.state == FULL_DEPTH
    assert not told.stream.is_certified
    told.rows(5)
    told.rows(100)
    assert told.stream.recertification.rows == 100
    told.stream.policy_changed("a third")  # its rows are counted from none
    assert (told.stream.state, told.stream.recertification.rows) == (RECOVERY, 0)
    told.rows(told.stream.recertification.num_rows)
    assert told.stream.state == NORMAL
    assert told.stream.is_certified
    assert told.stream.baseline.policy_sha256 == "a third"


def test_an_uncertified_policy_is_audited_but_its_exit_mix_is_not_tested() -> None:
    told = Told()
    told.stream.policy_changed("another")
    assert told.stream.mix is None
    told.stream.policy_changed("the policy")
    assert told.stream.is_certified
    assert told.stream.mix is not None
    told.stream.policy_changed("another")
    told.trip()


def test_a_new_certificate_ends_everything_but_the_count_of_trips() -> None:
    told = Told()
    told.trip()
    epoch = told.stream.epoch
    told.stream.renew(replace(BASELINE, max_risk=0.05))
    assert (told.stream.state, told.stream.trips) == (NORMAL, 1)
    assert told.stream.epoch > epoch
    assert told.stream.baseline.max_risk == 0.05


def test_a_risk_that_audits_cannot_tell_comes_back_by_hand_only() -> None:
    told = Told(replace(BASELINE, risk="accuracy_gap"), cool_down=1)
    assert told.stream.chosen(100_000) == []
    rng = np.random.default_rng(0)
    assert told.feed(draw(rng, 5000, SHIFTED), [False] * 5000)
    told.rows(2000)
    assert told.stream.state == FULL_DEPTH
    told.stream.renew(BASELINE)
    assert told.stream.state == NORMAL


@given(rate=st.floats(0.01, 1), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=10), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_audits_fall_on_the_same_rows_however_these_are_batched(rate: float, sizes: list[int], seed: int) -> None:
    whole, parts = Told(seed=seed, audit_rate=rate), Told(seed=seed, audit_rate=rate)
    found, start = [], 0
    for size in sizes:
        found += [start + position for position in parts.stream.chosen(size)]
        start += size
    assert found == list(whole.stream.chosen(start))


@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
def test_audits_are_a_coin_for_every_row(rate: float) -> None:
    told, num_rows = Told(audit_rate=rate), 50_000
    is_audited = np.zeros(num_rows)
    is_audited[list(told.stream.chosen(num_rows))] = 1
    margin = 4 * math.sqrt(rate * (1 - rate) / num_rows)
    assert abs(is_audited.mean() - rate) <= margin
    pairs = (is_audited[1:] * is_audited[:-1]).mean()  # neighbours are independent
    assert abs(pairs - rate**2) <= 4 * math.sqrt(rate**2 / num_rows) + margin


def certificate(**changes: object) -> Certificate:
    plain = Certificate(
        "consistency", 0.01, 0.95, "exact binomial", 1000, 2, 0.01, 0.006, (500, 300, 200), 1.7, "fake", "fp32", (),
        "p" * 64, "t" * 64,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def statement(*exit_counts: int, rows_missing: int = 0) -> SourceStatement:
    return SourceStatement(0.975, sum(exit_counts), 0, 0.01, 0.006, exit_counts, 1.5, rows_missing)


def test_a_certificate_becomes_baselines() -> None:
    baseline, sources = baselines_from_certificate(certificate())
    assert baseline == Baseline((500, 300, 200), 0.01, 0.95, "consistency", -1, "p" * 64)
    assert sources == {}


def test_the_rows_of_sources_with_a_certificate_are_not_those_of_the_others() -> None:
    by_source = {"web": statement(300, 100, 100), "kiosk": statement(0, 0, 9, rows_missing=400)}
    baseline, sources = baselines_from_certificate(certificate(sources=by_source))
    assert baseline.exit_counts == (200, 200, 100)
    assert {name: found.exit_counts for name, found in sources.items()} == {"web": (300, 100, 100)}
    baseline, _ = baselines_from_certificate(certificate(sources={"web": statement(600, 0, 0)}))
    assert baseline.exit_counts == (0, 0, 0)  # they cannot be told apart: no test of the mix


def test_a_missed_detection_needs_its_class() -> None:
    about = certificate(risk="missed_detection", class_name="bad")
    assert baselines_from_certificate(about, ("good", "bad"))[0].class_index == 1
    with pytest.raises(OptionError, match="labels=runner"):
        baselines_from_certificate(about)


def test_alarms_and_delta_are_shared_between_streams() -> None:
    alone, shared = Told().stream, Told(num_streams=4).stream
    assert shared.mix_alarm == 4 * alone.mix_alarm
    assert shared.risk_alarm == 4 * alone.risk_alarm
    assert shared.lifetime_alarm == 4 * alone.lifetime_alarm
    assert shared.recertification.delta == alone.recertification.delta / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audit_rate": 0.0}, "audit_rate"),
        ({"suspect_audit_rate": 1.5}, "suspect_audit_rate"),
        ({"false_alarm": math.nan}, "false_alarm"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"rows_between_alarms": math.inf}, "rows_between_alarms"),
        ({"cool_down": -1}, "cool_down"),
        ({"max_sources": 1.5}, "max_sources"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MonitorOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_counts": ()}, "exit counts"),
        ({"exit_counts": (1, -1)}, "exit counts"),
        ({"exit_counts": (1.0, 2.0)}, "exit counts"),
        ({"max_risk": 0.0}, "max_risk"),
        ({"confidence": 1.0}, "confidence"),
        ({"risk": "missed_detection"}, "class_index"),
    ],
)
def test_baselines_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(BASELINE, **change)  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(st.sampled_from(["rows", "losses", "policy", "renew"]), st.integers(1, 400)), min_size=1, max_size=20
    )
)
@settings(deadline=None, max_examples=40)
def test_states_change_only_as_the_diagram_says(steps: list[tuple[str, int]]) -> None:
    told = Told(cool_down=20)
    for kind, number in steps:
        if kind == "rows":
            told.rows(number)
        elif kind == "losses":
            told.rows(number, losses=number // 3)
        elif kind == "policy":
            told.stream.policy_changed(f"policy {number % 3}")
        else:
            told.stream.renew(BASELINE)
    allowed = {
        (NORMAL, SUSPECT),
        (SUSPECT, NORMAL),
        (NORMAL, FULL_DEPTH),
        (SUSPECT, FULL_DEPTH),
        (FULL_DEPTH, RECOVERY),
    }
    state, trips = NORMAL, 0
    for change in told.changes:
        assert change.before == state
        is_back = change.before in (FULL_DEPTH, RECOVERY) and change.after == NORMAL
        assert (change.before, change.after) in allowed or (
            is_back and change.cause in ("certified again", "another certificate")
        )
        state, trips = change.after, trips + (change.after == FULL_DEPTH)
        assert change.trips == trips
    assert state == told.stream.state
