from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom
from traces import random_trace

from offramp.binomial import rows_needed
from offramp.certificate import Certificate
from offramp.errors import DataError, OptionError
from offramp.policy import Policy, Veto
from offramp.trace import UNKNOWN
from offramp.tuning.alternatives import alternatives
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.losses import losses_from_trace
from offramp.tuning.path import policy_at
from offramp.tuning.replay import replay


def easy_trace(num_rows=3000, seed=1, sources=("",), num_exits=4):
    """Enough rows that are easy early, so that there is something to certify; from `sources` in turn."""
    trace = random_trace(num_rows, num_exits, seed)
    return replace(trace, sources=np.resize(np.array(sources), num_rows), files=("f" * 64,) * num_exits)


@pytest.mark.parametrize(
    "base",
    [Policy(), Policy("entropy", patience=2), Policy("margin", veto=Veto(0.05, True, True), minimum_depth=2)],
    ids=["thresholds", "patience", "veto"],
)
def test_the_certificate_is_about_the_replay_of_the_whole_policy_on_the_tested_rows(base):
    trace, options = easy_trace(), CertifyOptions(max_risk=0.03, seed=4)
    found = certify(trace, base, options)
    policy, certificate = found.policy, found.certificate
    assert (policy.score, policy.patience, policy.veto, policy.minimum_depth) == (
        base.score,
        base.patience,
        base.veto,
        base.minimum_depth,
    )
    assert len(found.tested) == len(set(found.tested.tolist())) == 2000
    tested = trace.rows(found.tested)
    decided = replay(policy, tested)
    losses = int((decided.prediction != tested.predictions[:, -1]).sum())
    assert (certificate.num_rows, certificate.losses) == (2000, losses)
    assert certificate.exit_counts == tuple(np.bincount(decided.exit_index, minlength=4).tolist())
    assert certificate.mean_depth == pytest.approx(decided.exit_index.mean() + 1)
    assert certificate.p_value == pytest.approx(binom.cdf(losses, 2000, 0.03), rel=1e-9)
    assert certificate.p_value <= 0.05 + 1e-12
    assert certificate.upper_bound <= 0.03
    assert certificate.mean_depth < 3.9
    assert (certificate.policy_sha256, certificate.trace_sha256) == (policy.sha256, trace.sha256)
    assert (certificate.files, certificate.seed, certificate.num_exits) == (trace.files, 4, 4)
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_the_next_point_of_the_path_is_not_certified():
    trace, options = easy_trace(), CertifyOptions(max_risk=0.03)
    found = certify(trace, Policy(), options)
    position = found.positions[""]
    assert 0 < position < len(found.path) - 1
    table = losses_from_trace(trace, "consistency", np.ones(4, np.float32)).rows(found.tested)

    def p_value(point):
        policy = policy_at(found.policy, found.path[point])
        losses = table.of(replay(policy, trace.rows(found.tested)).exit_index)
        return binom.cdf(int(losses.sum()), len(losses), 0.03)

    assert p_value(position) <= 0.05 < p_value(position + 1)


def test_what_is_tested_is_not_learned_from():
    """Other answers on the tested rows change neither the path nor the temperatures."""
    trace, options = easy_trace(), CertifyOptions(max_risk=0.03)
    found = certify(trace, Policy(), options)
    flipped = trace.logits.copy()
    flipped[found.tested] = flipped[found.tested][:, :, ::-1]
    changed = replace(trace, logits=flipped, predictions=flipped.argmax(axis=2))
    again = certify(changed, Policy(), options)
    assert again.path.tolist() == found.path.tolist()
    assert again.policy.temperatures == found.policy.temperatures
    assert certify(trace, Policy(), replace(options, seed=1)).path.tolist() != found.path.tolist()


def test_one_threshold_is_tested_on_all_rows():
    found = certify(easy_trace(), Policy(), CertifyOptions(max_risk=0.03, per_exit=False))
    assert found.certificate.num_rows == 3000
    assert len(set(found.policy.limits)) == 1
    assert found.policy.temperatures == (1.0,) * 4  # nothing is fitted on what is tested
    assert "from a grid" in found.certificate.method


@pytest.mark.parametrize(
    ("risk", "max_risk"), [("accuracy_gap", 0.03), ("accuracy_gap_signed", 0.05), ("hellinger", 0.1), ("brier", 0.03)]
)
def test_every_risk_lets_some_rows_leave(risk, max_risk):
    found = certify(easy_trace(6000), Policy(), CertifyOptions(max_risk=max_risk, risk=risk))
    certificate = found.certificate
    assert certificate.mean_depth < 3.9
    assert certificate.p_value <= 0.05 + 1e-12
    assert certificate.losses / certificate.num_rows < certificate.upper_bound <= max_risk + 1e-9
    assert sum(each.losses for each in certificate.exits) == pytest.approx(certificate.losses)


def test_missed_detections_are_counted_over_the_rows_of_their_class():
    trace = easy_trace(6000)
    found = certify(trace, Policy(), CertifyOptions(max_risk=0.05, risk="missed_detection", class_index=2))
    positives = (trace.predictions[found.tested, -1] == 2).sum()
    assert found.certificate.num_rows == positives < 2500
    assert sum(found.certificate.exit_counts) == 4000
    assert found.certificate.class_name == "2"


def test_the_table_of_exits_has_bounds_that_hold_together():
    certificate = certify(easy_trace(), Policy(), CertifyOptions(max_risk=0.03)).certificate
    for each, count in zip(certificate.exits[:-1], certificate.exit_counts, strict=False):
        assert each.num_rows == count
        assert each.losses <= each.num_rows * each.upper_bound
        at_bound = binom.cdf(each.losses, each.num_rows, each.upper_bound) if count else 1.0
        assert at_bound == pytest.approx(0.05 / 3 if count else 1.0, rel=1e-6)
    assert (certificate.exits[-1].losses, certificate.exits[-1].upper_bound) == (0, 0.0)


def test_too_few_rows_are_full_depth_and_it_says_how_many_are_missing():
    certificate = certify(easy_trace(300), Policy(), CertifyOptions(max_risk=0.01)).certificate
    assert certificate.mean_depth == 4.0
    assert certificate.rows_missing == rows_needed(0.01, 0.05) - 200
    assert (certificate.losses, certificate.upper_bound) == (0, 0.0)


def test_each_source_has_its_policy_and_its_statement():
    trace = easy_trace(9000, sources=("mail", "web", "mail", "web", "mail", ""))
    rare = np.flatnonzero(trace.sources == "web")[:60]
    sources = trace.sources.astype("U8")
    sources[rare] = "rare"
    trace = replace(trace, sources=sources)
    found = certify(trace, Policy(patience=2), CertifyOptions(max_risk=0.03, sources="simultaneous"))
    policy, statements = found.policy, found.certificate.sources
    assert statements.keys() == policy.sources.keys() == {"mail", "rare", "web"}
    for name in ("mail", "web"):
        rows = found.tested[trace.sources[found.tested] == name]
        decided = replay(policy.for_source(name), trace.rows(rows))
        losses = int((decided.prediction != trace.predictions[rows, -1]).sum())
        assert (statements[name].num_rows, statements[name].losses) == (len(rows), losses)
        assert statements[name].confidence == pytest.approx(1 - 0.05 / 3)
        assert statements[name].p_value == pytest.approx(binom.cdf(losses, len(rows), 0.03), rel=1e-9)
        assert statements[name].p_value <= 0.05 / 3
        assert statements[name].mean_depth < 4
    missing = rows_needed(0.03, 0.05 / 3) - statements["rare"].num_rows
    assert statements["rare"].rows_missing == missing > 0
    assert statements["rare"].mean_depth == 4
    assert replay(policy.for_source("nobody"), trace).exit_index.tolist() == [3] * 9000
    assert found.certificate.num_rows == sum(each.num_rows for each in statements.values())
    each_alone = certify(trace, Policy(patience=2), CertifyOptions(max_risk=0.03, sources="each"))
    assert each_alone.certificate.sources["mail"].confidence == pytest.approx(0.95)
    assert each_alone.positions["mail"] >= found.positions["mail"]


def test_an_unknown_source_may_go_with_the_strictest():
    trace = easy_trace(9000, sources=("mail", "web"))
    options = CertifyOptions(max_risk=0.03, sources="simultaneous", strictest_for_unknown=True)
    found = certify(trace, Policy(), options)
    strictest = min(found.positions, key=lambda name: found.positions[name])
    assert found.policy.limits == found.policy.sources[strictest].limits
    with pytest.raises(DataError, match="without sources"):
        certify(easy_trace(50), Policy(), options)


def test_policies_per_source_are_replayed_row_by_row():
    trace = easy_trace(300, sources=("mail", "web", ""))
    policy = Policy(
        limits=(None,) * 3, sources={"mail": Policy(limits=(0.0,) * 3), "web": Policy(limits=(None, 0.0, 0.0))}
    )
    decided = replay(policy, trace)
    assert decided.exit_index.tolist() == [0, 1, 3] * 100
    assert decided.reason.tolist() == ["max_prob", "max_prob", "final"] * 100


def test_temperatures_come_from_labels_or_from_the_trace():
    trace = easy_trace(3000)
    hot = replace(trace, logits=trace.logits * 5)
    assert certify(hot, Policy(), CertifyOptions(max_risk=0.03)).policy.temperatures[0] > 2
    given = certify(hot, Policy(temperatures=(1.5,) * 4), CertifyOptions(max_risk=0.03)).policy.temperatures
    assert given == (1.5,) * 4
    unlabelled = replace(trace, labels=np.full(3000, UNKNOWN), temperatures=np.full(4, 2.0))
    assert certify(unlabelled, Policy(), CertifyOptions(max_risk=0.03)).policy.temperatures == (2.0,) * 4


@pytest.mark.parametrize(
    "options",
    [{"max_risk": 0.0}, {"confidence": 1.0}, {"risk": "accuracy"}, {"sources": "some"}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError, match="certify: got"):
        CertifyOptions(**options)


@pytest.mark.parametrize("score", ["max_prob", "entropy"])
def test_the_alternatives_are_what_they_say(score):
    trace, options = easy_trace(4000), CertifyOptions(max_risk=0.03)
    certified = certify(trace, Policy(score), options)
    found = {each.name: each for each in alternatives(trace, certified, options)}
    full, fixed, best, on_average, one_threshold, chosen = found.values()
    assert (full.mean_depth, full.risk, full.expected_speedup) == (4.0, 0.0, 1.0)
    assert fixed.policy.limits == ((0.9 if score == "max_prob" else pytest.approx(0.1)),) * 3
    assert best.risk <= 0.03
    assert (on_average.risk * 4000 + 1) / 4001 <= 0.03
    assert len(set(on_average.policy.limits)) == 1
    assert one_threshold.mean_depth >= on_average.mean_depth  # a certificate asks more than an average
    assert chosen.policy == certified.policy
    for each in found.values():
        decided = replay(each.policy, trace)
        assert each.mean_depth == pytest.approx(decided.exit_index.mean() + 1)
        assert each.risk == pytest.approx(float((decided.prediction != trace.predictions[:, -1]).mean()))


def test_a_policy_under_which_no_tested_row_left_was_tested_all_the_same():
    base = Policy(veto=Veto(margin=1.0))
    certificate = certify(easy_trace(300), base, CertifyOptions(max_risk=0.03, per_exit=False)).certificate
    assert (certificate.mean_depth, certificate.losses, certificate.rows_missing) == (4.0, 0, 0)
    assert certificate.p_value == pytest.approx(binom.cdf(0, 300, 0.03), rel=1e-9)
    assert 0 < certificate.upper_bound < 0.03
