"""Snapshots: the laws of merging, JSON there and back, what is refused, and what is said of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import reduce
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitored import BASELINE, DISAGREES, NUM_EXITS, draw, monitor_of, monitored_runner, rows
from prometheus_client.parser import text_string_to_metric_families

from offramp.errors import DataError
from offramp.runtime import MonitorOptions, Snapshot
from offramp.runtime.monitor_evidence import RiskTest
from offramp.runtime.monitor_figures import NUM_BINS, bin_edges, bin_of, quantile
from offramp.runtime.monitor_metrics import exposition
from offramp.runtime.monitor_snapshot import SourceSnapshot, StreamSnapshot, lines_from_snapshot, merged
from offramp.runtime.monitor_states import STATES

E = 3
whole = st.integers(0, 2**70)  # counters have no end
per_exit = st.tuples(*[whole] * E)
bins = st.dictionaries(st.integers(0, NUM_BINS - 1), whole, max_size=4)
evidence = st.floats(0, 1e100)
sources = st.builds(
    SourceSnapshot,
    whole, per_exit, per_exit, st.dictionaries(st.text(max_size=3), whole, max_size=3), st.tuples(*[bins] * E), bins,
    whole, whole, whole,
)  # fmt: skip
streams = st.builds(
    StreamSnapshot,
    st.sampled_from(STATES), st.sampled_from(["", "audits"]), st.just("consistency"), st.just(0.02), st.booleans(),
    whole, whole, per_exit, per_exit, st.integers(50, 1000), st.integers(0, 50), evidence, st.just(1e6), evidence,
    st.just(1e4), st.just(1e3),
)  # fmt: skip
names = st.sampled_from(["", "web", "kiosk"])
_processes = count()


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    process = f"{next(_processes):08x}"
    by_source, by_stream = draw(st.dictionaries(names, sources)), draw(st.dictionaries(names, streams))
    return Snapshot((process,), draw(st.floats(0, 2e9)), E, by_source, by_stream, draw(whole), draw(whole), draw(whole))


@given(left=snapshots(), middle=snapshots(), right=snapshots())
@settings(deadline=None, max_examples=60)
def test_merging_is_commutative_and_associative(left: Snapshot, middle: Snapshot, right: Snapshot) -> None:
    assert left.merged(right) == right.merged(left)
    assert left.merged(middle).merged(right) == left.merged(middle.merged(right))
    assert merged([left, middle, right]) == merged([right, left, middle])


@given(snapshot=snapshots())
@settings(deadline=None, max_examples=60)
def test_json_gives_back_the_snapshot(snapshot: Snapshot) -> None:
    assert Snapshot.from_json(snapshot.to_json()) == snapshot


def test_processes_add_up_to_one_that_saw_everything() -> None:
    """Counters and the lifetime test, exactly."""
    exits = draw(np.random.default_rng(0), 600)
    losses = (np.random.default_rng(1).random(600) < 0.01).tolist()
    everyone = MonitorOptions(audit_rate=1.0)
    whole, parts = monitor_of(options=everyone), [monitor_of(options=everyone) for _ in range(3)]
    monitored_runner(whole).run(rows(exits, losses))
    for i, part in enumerate(parts):
        monitored_runner(part).run(rows(exits[i::3], losses[i::3]))
    got, expected = merged([part.snapshot() for part in parts]), whole.snapshot()
    assert got.sources == expected.sources
    assert got.streams[""].wealth == expected.streams[""].wealth
    test = RiskTest(BASELINE.max_risk)
    for exit_index, is_loss in zip(exits, losses, strict=True):
        test.update(is_loss and exit_index < NUM_EXITS - 1)
    assert got.streams[""].wealth == test.wealth
    assert len(got.processes) == 3


def test_what_cannot_be_merged() -> None:
    monitor = monitor_of()
    runner = monitored_runner(monitor)
    before = monitor.snapshot()
    runner.run(rows([0]))
    with pytest.raises(DataError, match="is in both"):
        before.merged(monitor.snapshot())
    other = monitor_of(replace(BASELINE, max_risk=0.05))
    monitored_runner(other)
    with pytest.raises(DataError, match=r"max_risk is 0\.02 in one and 0\.05"):
        before.merged(other.snapshot())
    with pytest.raises(DataError, match="4 and 3 exits"):
        before.merged(replace(before, processes=("other",), num_exits=3))


def document(**changes: Any) -> str:
    monitor = monitor_of()
    monitored_runner(monitor).run(rows([0, 1]))
    found = json.loads(monitor.snapshot().to_json())
    for path, value in changes.items():
        *parents, last = path.split("__")
        reduce(lambda node, key: node[key], parents, found)[last] = value
    return json.dumps(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 1}',
        "[" * 100_000,
        document(schema=2),
        document(unknown=1),
        document(sources={"": 1}),
        document(sources__=[]),
        document(num_exits=5),
        document(streams____state="asleep"),
        document(streams____max_risk=7),
        document(streams____losses=[1, 2]),
        document(streams____audits=[-1, 0, 0, 0]),
        document(streams____trips="3"),
        document(streams____current_audits=-1),
        document(streams____mix_alarm=0),
        document(streams____mix_evidence="none"),
        document(sources____vetoes=None),
        document(errors=0.5),
        document(time_s="now"),
        document(processes=[1]),
    ],
)
def test_what_is_no_snapshot(text: str) -> None:
    with pytest.raises(DataError, match="--monitor"):
        Snapshot.from_json(text)


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=200), share=st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_right_to_within_a_bin(scores: list[float], share: float) -> None:
    counted: dict[int, int] = {}
    for score in scores:
        counted[bin_of(score)] = counted.get(bin_of(score), 0) + 1
    exact = float(np.quantile(scores, share, method="inverted_cdf"))
    low, high = bin_edges(bin_of(exact))
    assert low - 1e-12 <= quantile(counted, share) <= high + 1e-12


@given(st.floats(0, 1))
def test_every_score_lies_in_its_bin(score: float) -> None:
    assert 0 <= bin_of(score) < NUM_BINS
    low, high = bin_edges(bin_of(score))
    assert low - 1e-9 <= score <= high + 1e-9
    assert high - low <= 0.036


def test_no_scores_have_no_quantile() -> None:
    assert math.isnan(quantile({}, 0.5))


def watched_snapshot() -> Snapshot:
    """Rows of two sources, some audited, one lost to full depth."""
    monitor = monitor_of(options=MonitorOptions(audit_rate=0.5))
    runner = monitored_runner(monitor)
    runner.run(rows([0, 1, 2, 3] * 5), "web")
    runner.run({"x": np.full(4, DISAGREES, np.float32)})
    return monitor.snapshot()


def test_a_snapshot_in_words() -> None:
    snapshot = watched_snapshot()
    text = "\n".join(lines_from_snapshot(snapshot))
    assert text.startswith("24 rows of 1 processes, mean depth ")
    for said in ("monitor: SUSPECT (audits), 0 trips", "consistency at most 2.00%: ", "source 'web': 20 rows"):
        assert said in text
    assert "BLIND" not in text
    assert "BLIND: 3 requests" in "\n".join(lines_from_snapshot(replace(snapshot, lost=3)))
    assert lines_from_snapshot(Snapshot(("a",), 0.0, 2, {}, {}, 0, 0, 0))[0].startswith("0 rows")


def test_a_snapshot_for_prometheus() -> None:
    snapshot = watched_snapshot()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(exposition(snapshot)):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.values()))] = sample.value
    assert sum(found["offramp_rows_total"].values()) == 24
    assert found["offramp_policy_rows_total"][("3", "web")] == 5
    assert found["offramp_monitor_state"][("", "suspect")] == 1
    assert sum(found["offramp_monitor_state"].values()) == 1
    assert sum(found["offramp_monitor_audits_total"].values()) == sum(snapshot.streams[""].audits)
    assert 0 < found["offramp_monitor_evidence"][("", "risk")] < 1
    assert found["offramp_score_quantile"][("0", "0.5")] > 0.9
    assert sum(found["offramp_monitor_blind_total"].values()) == 0
