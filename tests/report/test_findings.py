"""What the report says, against slow and obvious counting row by row."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from offramp.binomial import p_value
from offramp.errors import DataError
from offramp.policy import Policy
from offramp.report.findings import Findings, RiskPoint, Step
from offramp.report.frontier import NUM_SWEPT
from offramp.report.report import findings_from_evidence
from offramp.report.words import headline, overthinking_reading, policy_text
from offramp.trace import UNKNOWN
from offramp.tuning.alternatives import alternatives
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.diagnostics import quality
from offramp.tuning.replay import replay
from tests.report.evidence import FILES, certificate, evidence, manifest, small_trace, with_retention


def found(*args: object, **more: object) -> Findings:
    return findings_from_evidence(evidence(*args, **more))


def test_alternatives_row_by_row() -> None:
    trace = small_trace(num_rows=60)
    policy = Policy.thresholds("max_prob", [0.7] * 3)
    costs = [sum(trace.costs_ms[: k + 1]) for k in range(4)]
    for point, exit_index in zip(
        (found(trace, policy).chosen, found(trace, policy).full_depth),
        (replay(policy, trace).exit_index.tolist(), [3] * 60),
        strict=True,
    ):
        said = [trace.predictions[row, k] for row, k in enumerate(exit_index)]
        assert point.ms == pytest.approx(sum(costs[k] for k in exit_index) / 60)
        assert point.accuracy == pytest.approx(sum(said[row] == trace.labels[row] for row in range(60)) / 60)
        assert point.agreement == pytest.approx(sum(said[row] == trace.predictions[row, 3] for row in range(60)) / 60)
        assert point.mean_depth == pytest.approx(sum(k + 1 for k in exit_index) / 60)


def test_every_alternative_is_there() -> None:
    points = found(small_trace(uncut_ms=9.5)).alternatives
    kinds = [point.kind for point in points]
    assert kinds[:3] == ["chosen", "full depth", "uncut"]
    assert kinds.count("exit alone") == 3
    assert kinds.count("fixed 0.9") == 1
    assert kinds.count("sweep") > 5
    assert kinds.count("tuned") >= 1
    assert points[2].ms == 9.5
    assert points[2].accuracy == points[1].accuracy
    assert "uncut" not in [point.kind for point in found().alternatives]


def test_the_sweep_gets_looser() -> None:
    for score in ("max_prob", "margin", "entropy"):
        swept = [
            point for point in found(policy=Policy.thresholds(score, [0.5] * 3)).alternatives if point.kind == "sweep"
        ]
        depths = [point.mean_depth or 0 for point in swept]
        assert depths == sorted(depths, reverse=True)
        assert depths[0] == 4
        assert depths[-1] < 3
        assert NUM_SWEPT / 8 < len(depths) <= NUM_SWEPT + 2


def test_a_sweep_on_learned_confidences_leaves_exits_without_one_closed() -> None:
    learned = np.full((120, 4), 0.5, np.float32)
    learned[:, :2] = np.nan
    said = found(small_trace(learned=learned), Policy.thresholds("learned", [None, None, 0.9]))
    depths = {point.mean_depth for point in said.alternatives if point.kind == "sweep"}
    assert depths == {4, 3}


def test_other_ways_to_choose_are_those_of_calibrate() -> None:
    trace, policy = small_trace(num_rows=900), Policy.thresholds("max_prob", [0.7] * 3)
    options = CertifyOptions(0.01, 0.95)
    compared = alternatives(trace, certify(trace, replace(policy, limits=()), options), options)
    points = {point.name: point for point in found(trace, policy).alternatives}
    for other in compared[1:]:
        assert points[other.name].mean_depth == pytest.approx(other.mean_depth)
        assert points[other.name].known == other.known
        assert 1 - (points[other.name].agreement or 0) == pytest.approx(other.risk)


def test_exits_row_by_row() -> None:
    trace = small_trace()
    exit_index = replay(Policy.thresholds("max_prob", [0.7] * 3), trace).exit_index
    for k, said in enumerate(found(trace).exits):
        leavers = [row for row in range(120) if exit_index[row] == k]
        assert said.share == pytest.approx(len(leavers) / 120)
        assert said.reached == pytest.approx(sum(e >= k for e in exit_index.tolist()) / 120)
        assert said.saved_ms == pytest.approx(len(leavers) / 120 * sum(trace.costs_ms[k + 1 :]))
        right = [trace.predictions[row, k] == trace.labels[row] for row in leavers]
        assert said.accuracy_leaving == pytest.approx(sum(right) / len(right))
        final = [trace.predictions[row, 3] == trace.labels[row] for row in range(120)]
        here = [trace.predictions[row, k] == trace.labels[row] for row in range(120)]
        assert said.won_later == sum(f and not h for f, h in zip(final, here, strict=True))
        assert said.lost_later == sum(h and not f for f, h in zip(final, here, strict=True))
        assert said.quality == quality(trace.logits[:, k], trace.labels, 1.0)


def test_waterfall_adds_up() -> None:
    assert found(small_trace(uncut_ms=9.0)).waterfall.steps[0] == Step("uncut model", 9.0, "level")
    steps = found().waterfall.steps
    assert steps[0].ms + sum(step.ms for step in steps[1:-1]) == pytest.approx(steps[-1].ms)
    assert [step.kind for step in steps] == ["level", "saving", "saving", "saving", "level"]


PLACEMENT = {
    "costs": {"uncut_ms": 7.5},
    "no_exits_ms": 7.6,
    "expected_ms": 4.0,
    "worst_case": 1.03,
    "exits": [
        {"exit_index": 0, "is_kept": True, "saves_ms": 3.0, "costs_ms": 0.1, "toggled_ms": 6.9},
        {"exit_index": 1, "is_kept": False, "saves_ms": 0.2, "costs_ms": 0.3, "toggled_ms": 4.1},
        {"exit_index": 2, "is_kept": False, "saves_ms": 0.0, "costs_ms": 0.0, "toggled_ms": None},
        {"exit_index": 3, "is_kept": True, "saves_ms": 0.8, "costs_ms": 0.1, "toggled_ms": 4.7},
    ],
}


def test_waterfall_of_a_placement() -> None:
    said = found(placement=PLACEMENT).waterfall
    assert said.source == "placement"
    assert [(step.name, step.kind) for step in said.steps[2:4]] == [
        ("exit 0 costs", "cost"),
        ("exit 0 saves", "saving"),
    ]
    assert said.steps[1].ms + sum(step.ms for step in said.steps[2:-1]) == pytest.approx(said.steps[-1].ms)
    assert [(dropped.exit_index, dropped.with_it_ms) for dropped in said.dropped] == [(1, 4.1), (2, None)]
    for wrong in ({}, [], {**PLACEMENT, "exits": 3}):
        with pytest.raises(DataError, match="offramp place"):
            found(placement=wrong)


def test_risk_path_is_the_test_of_calibrate() -> None:
    trace, base = small_trace(num_rows=2000), Policy.thresholds("max_prob", [None] * 3)
    certified = certify(trace, replace(base, limits=()), CertifyOptions(0.02, 0.95))
    policy, held = certified.policy, certified.certificate
    path = found(trace, policy, certificate=held).risk_path
    assert path.is_of_certificate
    assert (path.num_rows, path.num_learned) == (held.num_rows, 2000 - held.num_rows)
    last = [point for point in path.points if point.certified][-1]
    assert (last.mean_depth, last.losses) == (pytest.approx(held.mean_depth), held.losses)
    assert last.upper_bound == pytest.approx(held.upper_bound)
    assert p_value(held.losses, held.num_rows, 0.02) <= 0.05  # type: ignore[arg-type]
    following = path.points[path.points.index(last) + 1]
    assert p_value(int(following.losses), held.num_rows, 0.02) > 0.05
    assert [point.mean_depth for point in path.points] == sorted((p.mean_depth for p in path.points), reverse=True)
    assert path.points[0] == RiskPoint(pytest.approx(10), 4, 0, 0, True)  # type: ignore[arg-type]
    other = found(small_trace(num_rows=2000, seed=1), policy, certificate=held).risk_path
    assert not other.is_of_certificate


def test_a_risk_that_needs_labels_gives_way_without_them() -> None:
    trace, policy = small_trace(labelled=False), Policy.thresholds("max_prob", [0.7] * 3)
    said = found(trace, policy, certificate=certificate(trace, policy, risk="accuracy_gap", max_risk=0.03))
    assert (said.risk_path.risk, said.risk_path.max_risk) == ("consistency", 0.03)
    assert "wrong where" in said.certificate.statement


def test_overthinking_and_confusion() -> None:
    trace = small_trace()
    right = (trace.predictions == trace.labels[:, None]).tolist()
    said = found(trace)
    assert said.overthinking is not None
    assert said.overthinking.destructive == pytest.approx(sum(any(row[:3]) and not row[3] for row in right) / 120)
    needed = sum(row[3] and not any(row[:3]) for row in right) / 120
    assert f"saves {100 * needed:.1f}% that only the final exit gets right" in overthinking_reading(said)
    confusion = found(trace).confusion
    said = replay(Policy.thresholds("max_prob", [0.7] * 3), trace).prediction
    assert confusion.counts[1][2] == sum((trace.labels == 1) & (said == 2))
    assert sum(map(sum, confusion.counts)) == 120
    for i, row in enumerate(found(trace).exit_agreement):
        assert row[i] == 1
        assert row[0] == pytest.approx(np.mean(trace.predictions[:, i] == trace.predictions[:, 0]))


def test_sources_follow_their_own_rules() -> None:
    sources = np.array(["kiosk", "web"] * 60)
    policy = replace(Policy.thresholds("max_prob", [0.7] * 3), sources={"kiosk": Policy()})
    said = found(small_trace(sources=sources), policy)
    web = replay(policy, small_trace()).exit_index[1::2]
    assert said.exits[0].share == pytest.approx((web == 0).sum() / 120)
    assert said.exits[3].share == pytest.approx((60 + (web == 3).sum()) / 120)


def test_without_labels() -> None:
    said = found(small_trace(labelled=False))
    assert said.overthinking is None
    assert said.chosen.accuracy is None
    assert said.chosen.agreement == found().chosen.agreement
    assert all(point.quality is point.ece_unscaled is point.accuracy is point.won_later is None for point in said.exits)
    assert said.confusion.reference == "full depth"
    assert any(missing.what.startswith("labels") for missing in said.missing)
    assert not any(missing.what.startswith("labels") for missing in found().missing)


def test_some_labels() -> None:
    trace = small_trace()
    labels = trace.labels.copy()
    labels[::2] = UNKNOWN
    said = found(replace(trace, labels=labels))
    assert said.subject.num_labelled == 60
    assert said.exits[1].accuracy == pytest.approx((trace.predictions[1::2, 1] == labels[1::2]).mean())


def test_retention_at_the_exit_where_rows_left() -> None:
    trace = with_retention(small_trace())
    bins = found(trace).retention
    exit_index = replay(Policy.thresholds("max_prob", [0.7] * 3), trace).exit_index
    assert sum(b.num_rows for b in bins) == 120
    first = (trace.lengths >= bins[0].shortest) & (trace.lengths <= bins[0].longest)
    kept = [trace.retention[row, exit_index[row]] for row in np.flatnonzero(first)]
    assert bins[0].p50 == pytest.approx(np.median(kept))
    assert found().retention == ()


def test_retention_of_unknown_lengths_is_left_out() -> None:
    assert found(replace(with_retention(small_trace()), lengths=np.full(120, UNKNOWN))).retention == ()


class TestCertificate:
    """In force, none, and for something else."""

    policy = Policy.thresholds("max_prob", [0.7] * 3)

    def test_none(self) -> None:
        said = found().certificate
        assert said.status == "none"
        assert "no certificate" in said.statement
        assert said.command.startswith("offramp calibrate my/bundle --max-risk")

    def test_in_force(self) -> None:
        trace = small_trace()
        promise = "at most 2.0% of all answers differ from the answer that the whole model would have given."
        alone = found(trace, self.policy, certificate=certificate(trace, self.policy, sources={})).certificate
        assert alone.statement == f"With 95% confidence, {promise}"
        said = found(trace, self.policy, certificate=certificate(trace, self.policy))
        assert said.certificate.status == "in force"
        assert said.certificate.statement == f"For every source below, with the confidence named there, {promise}"
        assert "of 1,200 rows, 3 answered differently" in said.certificate.evidence
        assert [s.source for s in said.certificate.sources] == ["branch", "kiosk"]
        assert "268 more rows" in said.certificate.sources[0].statement
        assert said.risk_path.max_risk == 0.02

    def test_full_depth_for_want_of_rows(self) -> None:
        trace = small_trace()
        certified = certify(trace, Policy(), CertifyOptions())
        said = found(trace, certified.policy, certificate=certified.certificate).certificate
        assert said.status == "in force"
        assert said.statement.startswith("Every row goes to full depth, so no answer is changed.")
        assert f"at least {299 - 80} more rows" in said.statement

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"policy_sha256": "0" * 64}, "policy"),
            ({"precision": "int8"}, "int8"),
            ({"files": (*FILES[:3], "0" * 64)}, "segment 3"),
        ],
    )
    def test_for_something_else(self, changes: dict[str, object], words: str) -> None:
        trace = small_trace()
        said = found(trace, self.policy, certificate=certificate(trace, self.policy, **changes)).certificate
        assert said.status == "not for this"
        assert words in said.statement
        assert said.command
        assert not said.conditions

    @pytest.mark.parametrize(
        ("risk", "losses", "words"),
        [
            ("accuracy_gap", 4, "are wrong where the whole model would have been right"),
            ("accuracy_gap_signed", 2.0, "at most 2 percentage points below"),
            ("missed_detection", 1, "calls “spam”, at most 2.0% are answered otherwise"),
            ("hellinger", 7.25, "within 0.02 of the whole model's"),
            ("brier", 3.5, "at most 0.02 above"),
        ],
    )
    def test_every_risk_has_words(self, risk: str, losses: float, words: str) -> None:
        trace = small_trace()
        made = certificate(trace, self.policy, risk=risk, losses=losses, class_name="spam")
        said = found(trace, self.policy, certificate=made, labels=("ham", "spam", "eggs"))
        assert words in said.certificate.statement
        assert said.risk_path.risk == risk
        assert said.risk_path.max_risk == 0.02


def test_measured_points() -> None:
    measured = {
        "uncut": {"1": {"mean_ms": 8.0, "accuracy": 0.9}, "8": {}},
        "offramp": {"1": {"mean_ms": 4, "accuracy": None}},
    }
    points = [point for point in found(benchmark=measured).alternatives if point.kind == "measured"]
    assert [(p.name, p.ms, p.accuracy) for p in points] == [
        ("uncut, on the clock", 8.0, 0.9),
        ("offramp, on the clock", 4.0, None),
    ]
    for wrong in ({"uncut": {"8": {}}}, [], {"uncut": 3}):
        with pytest.raises(DataError, match="--batch-sizes 1"):
            found(benchmark=wrong)


def test_examples() -> None:
    trace = small_trace()
    texts = tuple(f"text {row}" for row in range(120))
    said = found(trace, texts=texts, labels=("a", "b", "c")).examples
    assert said is not None
    decided = replay(Policy.thresholds("max_prob", [0.7] * 3), trace)
    assert [example.text for example in said.easiest] == [f"text {example.row}" for example in said.easiest]
    assert {example.exit_index for example in said.easiest} == {0}
    assert {example.exit_index for example in said.hardest} == {3}
    assert said.changed
    for example in said.changed:
        assert decided.prediction[example.row] != trace.predictions[example.row, -1]
        assert example.answer != example.full_depth
    with pytest.raises(DataError, match="119 texts for a trace of 120 rows"):
        found(trace, texts=texts[1:])
    assert found(trace).examples is None


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(DataError, match="another model"):
        findings_from_evidence(replace(evidence(), manifest=manifest(4, 2)))
    with pytest.raises(DataError, match="another model"):
        found(replace(small_trace(), fingerprint="0" * 64))
    with pytest.raises(DataError, match="0 rows"):
        found(small_trace(num_rows=0))


def test_findings_are_json() -> None:
    for trace in (with_retention(small_trace()), small_trace(labelled=False), small_trace(num_rows=1)):
        document = dataclasses.asdict(found(trace, texts=("x",) * len(trace.labels)))
        assert json.loads(json.dumps(document, allow_nan=False))["subject"]["name"] == "small"


def test_headline() -> None:
    assert headline(found(policy=Policy.full_depth())).startswith("Every row goes to full depth")
    said = found()
    assert math.isclose(said.full_depth.ms, 10)
    assert "instead of the 10.0 ms of full depth" in headline(said)
    assert "instead of the 9.00 ms of the uncut model" in headline(found(small_trace(uncut_ms=9.0)))


def test_policies_in_words() -> None:
    assert policy_text(Policy.full_depth()) == "Every row goes to full depth."
    text = policy_text(Policy("entropy", (0.2, None), patience=2, minimum_depth=2))
    assert text == (
        "A row leaves an exit when its entropy is at most the exit's threshold (exits 0) and the last 2 exits "
        "agree and "
        "2 segments have run."
    )
