"""A runner under a monitor: what is answered, what is counted, what is in force."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from monitored import (
    BASELINE,
    NUM_EXITS,
    POLICY,
    SHARES,
    Pruning,
    answer,
    draw,
    monitor_of,
    monitored_runner,
    rows,
    trip,
)

from offramp.policy import FINAL, Policy, Veto
from offramp.runtime import (
    Change,
    Monitor,
    MonitorOptions,
    Result,
    Snapshot,
    fake_runner,
)
from offramp.runtime.monitor_figures import bin_of
from offramp.runtime.monitor_states import FULL_DEPTH, NORMAL, RECOVERY, SUSPECT
from offramp.runtime.monitor_watch import AUDIT
from offramp.runtime.monitor_watch import FULL_DEPTH as FORCED

OFTEN = MonitorOptions(audit_rate=0.3, suspect_audit_rate=0.3)
some_rows = st.lists(st.tuples(st.integers(0, NUM_EXITS - 1), st.booleans()), max_size=70)


def same_rows(left: Result, right: Result, keep: Sequence[int]) -> None:
    np.testing.assert_array_equal(left.outputs["logits"][keep], right.outputs["logits"][keep])
    for name in ("prediction", "exit_index", "score"):
        np.testing.assert_array_equal(getattr(left, name)[keep], getattr(right, name)[keep])


@given(drawn=some_rows, seed=st.integers(0, 1000), full_depth=st.booleans())
@settings(deadline=None, max_examples=60)
def test_rows_are_answered_by_the_policy_or_by_full_depth_and_say_which(
    drawn: list[tuple[int, bool]], seed: int, full_depth: bool
) -> None:
    exits, losses = [exit_index for exit_index, _ in drawn], [is_loss for _, is_loss in drawn]
    monitor = monitor_of(options=OFTEN, seed=seed)
    watched, plain, deep = monitored_runner(monitor), monitored_runner(), monitored_runner(policy=Policy())
    if full_depth:
        trip(watched)
    request = rows(exits, losses)
    got, by_policy, by_depth = watched.run(request), plain.run(request), deep.run(request)
    held = [i for i, reason in enumerate(got.reason) if reason in (AUDIT, FORCED)]
    free = [i for i in range(len(drawn)) if i not in held]
    same_rows(got, by_policy, free)
    same_rows(got, by_depth, held)
    assert [got.reason[i] for i in free] == [by_policy.reason[i] for i in free]
    assert all(exits[i] < NUM_EXITS - 1 for i in held)  # who goes to the end anyway says so
    if full_depth:
        assert set(got.reason) <= {FORCED, FINAL}
        assert (got.exit_index == NUM_EXITS - 1).all()
    else:
        assert FORCED not in got.reason


@given(drawn=some_rows, seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_figures_are_those_of_the_rows(drawn: list[tuple[int, bool]], seed: int) -> None:
    exits, losses = [exit_index for exit_index, _ in drawn], [is_loss for _, is_loss in drawn]
    monitor = monitor_of(options=OFTEN, seed=seed)
    result = monitored_runner(monitor).run(rows(exits, losses), "web")
    snapshot = monitor.snapshot()
    found, stream = snapshot.sources["web"], snapshot.streams[""]
    assert found.rows == len(exits)
    assert list(found.exits) == np.bincount(exits, minlength=NUM_EXITS).tolist()  # where the policy lets them go
    assert list(found.depths) == np.bincount(result.exit_index, minlength=NUM_EXITS).tolist()
    assert found.reasons == {why: result.reason.count(why) for why in result.reason}
    for k, bins in enumerate(found.scores):
        scores = result.score[result.exit_index == k].tolist()
        assert bins == {b: [bin_of(score) for score in scores].count(b) for b in map(bin_of, scores)}
    chosen = [i for i, reason in enumerate(result.reason) if reason == AUDIT]
    by_exit = np.bincount([exits[i] for i in chosen], minlength=NUM_EXITS)[:-1].tolist()
    assert list(stream.audits[:-1]) == by_exit
    assert sum(stream.losses) == sum(losses[i] for i in chosen)
    assert snapshot.total.rows == len(exits)


def test_the_next_request_after_an_alarm_goes_to_full_depth() -> None:
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    rng = np.random.default_rng(0)
    for _ in range(5000):
        (exit_index,) = draw(rng, 1, (0.05, 0.2, 0.15, 0.6))
        before = monitor.state_of()
        result = runner.run(rows([exit_index]))
        if before == FULL_DEPTH:
            break
        assert result.exit_index[0] == exit_index or result.reason == [AUDIT]
    assert before == FULL_DEPTH
    assert result.exit_index[0] == NUM_EXITS - 1
    assert result.reason == [FORCED if exit_index < NUM_EXITS - 1 else FINAL]


def test_full_depth_ends_with_recertification_and_nothing_else() -> None:
    monitor = monitor_of(options=MonitorOptions(cool_down=30))
    runner = monitored_runner(monitor)
    trip(runner)
    rng = np.random.default_rng(0)
    for _ in range(40):  # still too risky
        exits = draw(rng, 16)
        runner.run(rows(exits, [True] * 16))
        assert monitor.state_of() in (FULL_DEPTH, RECOVERY)
    runner.policy = runner.policy
    assert monitor.state_of() == RECOVERY
    num_rows = 0
    while monitor.state_of() == RECOVERY:
        result = runner.run(rows(draw(rng, 1)))
        assert result.exit_index[0] == NUM_EXITS - 1
        num_rows += 1
    assert num_rows > 149  # the fewest that show 2 % at 95 %
    assert monitor.snapshot().streams[""].cause == "certified again"
    assert runner.run(rows([0])).exit_index[0] in (0, NUM_EXITS - 1)


def test_requests_that_began_under_another_policy_are_no_evidence() -> None:
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    other = Policy.thresholds("max_prob", [0.8] * (NUM_EXITS - 1))
    early = monitor.begin("", 1, runner.setting)
    runner.policy = other
    foreign = runner.setting
    assert not monitor.snapshot().streams[""].is_certified
    runner.policy = POLICY
    late = monitor.begin("", 1, foreign)
    for begun in (early, late):
        monitor.observe(begun, monitored_runner().run(rows([0])))
    assert monitor.snapshot().sources[""].rows == 2
    assert monitor.snapshot().streams[""].mix_evidence == 0
    runner.run(rows([0]))
    assert monitor.snapshot().streams[""].mix_evidence > 0


def test_requests_that_began_before_the_alarm_are_not_fresh_rows() -> None:
    monitor = monitor_of(options=MonitorOptions(cool_down=1))
    runner = monitored_runner(monitor)
    trip(runner)
    before = monitor.begin("", 5, runner.setting)
    runner.run(rows([0]))
    assert monitor.state_of() == FULL_DEPTH  # the evidence waits for the request that came first
    monitor.forget(before)
    assert monitor.state_of() == RECOVERY
    runner.run(rows([0, 1]))
    assert monitor._streams[""].recertification.rows == 2
    waiting = monitor.begin("", 5, runner.setting)
    monitor.renew(BASELINE)
    monitor.observe(waiting, monitored_runner(policy=Policy()).run(rows([0] * 5)))
    assert monitor.snapshot().streams[""].mix_evidence == 0  # nor are they evidence against another certificate


@given(exits=st.lists(st.integers(0, NUM_EXITS - 1), min_size=1, max_size=30), data=st.data())
@settings(deadline=None, max_examples=50)
def test_requests_are_evidence_in_the_order_they_came(exits: list[int], data: st.DataObject) -> None:
    """P8: the order in which they end, which follows from their depth, makes no difference."""
    order = data.draw(st.permutations(range(len(exits))))
    failing = data.draw(st.sets(st.sampled_from(range(len(exits)))))
    evidence = []
    for ends in (sorted(order), order):
        monitor = monitor_of(options=MonitorOptions(audit_rate=1e-9))
        plain, setting = monitored_runner(), monitored_runner(monitor).setting
        watches = [monitor.begin("", 1, setting) for _ in exits]
        for i in ends:
            if i in failing:
                monitor.forget(watches[i])
            else:
                monitor.observe(watches[i], plain.run(rows([exits[i]])))
        snapshot = monitor.snapshot()
        assert snapshot.total.rows == len(exits) - len(failing)
        assert snapshot.total.failed == len(failing)
        evidence.append(snapshot.streams[""].mix_evidence)
    assert evidence[0] == evidence[1]


def test_a_request_that_never_ends_stops_evidence_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.runtime.monitor.MOST_PENDING", 8)
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    hanging = monitor.begin("", 1, runner.setting)
    for _ in range(8):
        runner.run(rows([0]))
    assert not monitor.snapshot().is_blind or monitor.snapshot().lost == 1
    runner.run(rows([0]))
    snapshot = monitor.snapshot()
    assert snapshot.lost == 1
    assert snapshot.is_blind
    assert snapshot.streams[""].mix_evidence > 0
    monitor.observe(hanging, monitored_runner().run(rows([0])))  # counted, but no evidence any more
    assert monitor.snapshot().total.rows == 10


def test_many_threads_lose_no_row() -> None:
    monitor = monitor_of(options=MonitorOptions(audit_rate=0.1))
    runner, num_threads, each = monitored_runner(monitor), 8, 60
    drawn = [draw(np.random.default_rng(i), 3 * each) for i in range(num_threads)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(num_threads) as threads:

            def work(i: int) -> None:
                for t in range(0, 3 * each, 3):
                    runner.run(rows(drawn[i][t : t + 3]), f"source {i % 2}")

            list(threads.map(work, range(num_threads)))
    finally:
        sys.setswitchinterval(switch)
    snapshot = monitor.snapshot()
    expected = np.bincount(np.concatenate(drawn), minlength=NUM_EXITS)
    assert list(snapshot.total.exits) == expected.tolist()
    assert {name: found.rows for name, found in snapshot.sources.items() if name} == {
        "source 0": 720,
        "source 1": 720,
    }
    assert not snapshot.is_blind
    assert not monitor._pending[""]


def test_a_flood_of_sources_is_counted_together() -> None:
    monitor = monitor_of(options=MonitorOptions(max_sources=5))
    runner = monitored_runner(monitor)
    for i in range(1000):
        runner.run(rows([0]), f"source {i}")
    runner.run(rows([1]), "x" * 10_000)
    snapshot = monitor.snapshot()
    assert len(snapshot.sources) == 7  # "", five, and the others
    assert snapshot.sources["(other)"].rows == 996
    assert snapshot.total.rows == 1001


def test_a_source_with_a_certificate_has_a_state_of_its_own() -> None:
    monitor = monitor_of(sources={"kiosk": replace(BASELINE, exit_counts=(100, 0, 0, 900))})
    runner = monitored_runner(monitor)
    trip(runner, "kiosk")
    assert monitor.state_of() == monitor.state_of("web") == NORMAL
    assert runner.run(rows([0] * 30), "kiosk").reason == [FORCED] * 30
    assert FORCED not in runner.run(rows([0] * 30), "web").reason
    assert monitor.snapshot().streams["kiosk"].trips == 1


def test_a_missed_detection_counts_the_rows_of_its_class_alone() -> None:
    about = replace(BASELINE, risk="missed_detection", class_index=1)
    monitor = monitor_of(about, MonitorOptions(audit_rate=1.0))
    monitored_runner(monitor).run(rows([0, 0, 0, 3, 3], [True, True, False, True, False]))
    stream = monitor.snapshot().streams[""]  # full depth says 1 where it disagrees
    assert (stream.audits, stream.losses) == ((2, 0, 0, 1), (2, 0, 0, 0))


def test_scores_that_are_no_numbers_are_counted() -> None:
    monitor = Monitor()
    runner = fake_runner([0.6, 0.9], Policy.thresholds("max_prob", [0.8]))
    runner.monitor = monitor
    plain = runner.run({"x": np.zeros(2, np.float32)})
    watch = monitor.begin("", 2, runner.setting)
    monitor.observe(watch, plain._replace(score=np.array([np.nan, 0.5], np.float32)))
    assert monitor.snapshot().total.nan_scores == 1


def test_an_exit_without_a_learned_score_is_not_one_that_failed() -> None:
    monitor = Monitor()
    runner = fake_runner([0.6, 0.9], Policy.thresholds("learned", [0.8]), learned=[0.1])
    runner.monitor = monitor
    runner.run({"x": np.zeros(3, np.float32)})
    assert monitor.snapshot().total.nan_scores == 0
    assert monitor.snapshot().total.depths == (0, 3)


def test_what_happens_to_an_audited_row_after_the_policy_let_it_go_is_no_veto() -> None:
    vetoing = replace(Policy.thresholds("max_prob", [0.7, 0.7]), veto=Veto(margin=0.7))
    runner = fake_runner([0.99, 0.8, 0.99], vetoing)
    runner.monitor = monitor = monitor_of(replace(BASELINE, exit_counts=(0,) * 3), MonitorOptions(audit_rate=1.0))
    assert runner.run({"x": np.zeros(3, np.float32)}).reason == [AUDIT] * 3
    assert monitor.snapshot().total.vetoes == 0


@pytest.mark.parametrize("rate", [1e-9, 0.5])
def test_vetoes_are_counted(rate: float) -> None:
    """At exits 1 and 2 the margin suffices for the threshold, and not for the veto."""
    policy = Policy.thresholds("max_prob", [None, 0.7, 0.7, None])
    vetoing = replace(policy, veto=Veto(margin=0.7))
    runner = fake_runner([0.6, 0.8, 0.75, 0.99, 0.99], vetoing)
    runner.monitor = monitor = monitor_of(replace(BASELINE, exit_counts=(0,) * 5), MonitorOptions(audit_rate=rate))
    assert runner.run({"x": np.zeros(3, np.float32)}).exit_index.tolist() == [4] * 3
    assert monitor.snapshot().total.vetoes == 6
    runner.policy = policy
    runner.run({"x": np.zeros(3, np.float32)})
    assert monitor.snapshot().total.vetoes == 6


def test_retention_is_counted_where_the_model_says_it() -> None:
    monitor = Monitor()
    runner = monitored_runner(monitor)
    runner.run(rows([1, 1]))
    assert monitor.snapshot().total.retention == {}
    runner.engines = tuple(Pruning(answer(k)) for k in range(NUM_EXITS))
    runner.run(rows([1, 1]))
    assert monitor.snapshot().total.retention == {bin_of(0.25): 2}


class MonitorMachine(RuleBasedStateMachine):
    """Runs, drifts, swaps and certificates in any order, beside the rules of the diagram."""

    @initialize(seed=st.integers(0, 100), cool_down=st.integers(0, 50))
    def open(self, seed: int, cool_down: int) -> None:
        self.changes: list[Change] = []
        options = MonitorOptions(audit_rate=0.2, cool_down=cool_down)
        self.monitor = monitor_of(options=options, seed=seed)
        self.monitor._streams[""]._on_change = self.changes.append
        self.runner = monitored_runner(self.monitor)
        self.rng = np.random.default_rng(seed)
        self.rows_run = 0

    @rule(num_rows=st.integers(0, 80), risk=st.sampled_from([0.0, 0.005, 0.5]), shifted=st.booleans())
    def run(self, num_rows: int, risk: float, shifted: bool) -> None:
        exits = draw(self.rng, num_rows, (0.1, 0.1, 0.1, 0.7) if shifted else SHARES)
        losses = self.rng.random(num_rows) < risk
        was_forced = self.monitor.state_of() in (FULL_DEPTH, RECOVERY)
        result = self.runner.run(rows(exits, losses.tolist()))
        self.rows_run += num_rows
        if was_forced:
            assert (result.exit_index == NUM_EXITS - 1).all()
            assert set(result.reason) <= {FORCED, FINAL}
        else:
            assert FORCED not in result.reason

    @rule()
    def drift_until_alarm(self) -> None:
        if self.monitor.state_of() in (NORMAL, SUSPECT):
            before = self.monitor.snapshot().total.rows
            trip(self.runner)
            self.rows_run += self.monitor.snapshot().total.rows - before

    @rule(threshold=st.sampled_from([0.8, 0.9]))
    def swap_policy(self, threshold: float) -> None:
        was = self.monitor.state_of()
        self.runner.policy = Policy.thresholds("max_prob", [threshold] * (NUM_EXITS - 1))
        assert (self.monitor.state_of() == was) or (was, self.monitor.state_of()) == (SUSPECT, NORMAL)

    @rule()
    def renew(self) -> None:
        self.monitor.renew(BASELINE)
        assert self.monitor.state_of() == NORMAL

    @rule()
    def close(self) -> None:
        """Another runner goes on under the same monitor, and the same state."""
        was = self.monitor.state_of()
        policy = self.runner.policy
        self.runner.close()
        self.runner = monitored_runner(self.monitor, policy)
        assert (self.monitor.state_of() == was) or (was, self.monitor.state_of()) == (SUSPECT, NORMAL)

    @precondition(lambda self: hasattr(self, "monitor"))
    @invariant()
    def it_holds_together(self) -> None:
        snapshot = self.monitor.snapshot()
        (stream,) = snapshot.streams.values()
        assert snapshot.total.rows == sum(snapshot.total.exits) == sum(snapshot.total.depths) == self.rows_run
        assert Snapshot.from_json(snapshot.to_json()) == snapshot
        assert stream.trips == sum(change.after == FULL_DEPTH for change in self.changes)
        for change in self.changes:
            if change.before in (FULL_DEPTH, RECOVERY) and change.after not in (FULL_DEPTH, RECOVERY):
                assert change.cause in ("certified again", "another certificate")
        assert not snapshot.is_blind
        assert not self.monitor._pending[""]


TestMonitorMachine = MonitorMachine.TestCase
TestMonitorMachine.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
