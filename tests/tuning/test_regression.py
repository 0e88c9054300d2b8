"""Regressions on a trace: errors, thresholds and certificates, against rows looked at one by one."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from offramp.certificate import Certificate
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.trace import Trace
from offramp.tuning.alternatives import alternatives
from offramp.tuning.calibrate import CalibrateOptions, calibrate
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.diagnostics import diagnose
from offramp.tuning.losses import losses_from_trace
from offramp.tuning.regression import fastest_values
from offramp.tuning.replay import replay
from offramp.tuning.thresholds import fastest_thresholds


def value_trace(num_rows: int = 1500, seed: int = 0) -> Trace:
    """Three exits, each nearer to the target; early ones know where they are far off. The last row has no target."""
    random = np.random.default_rng(seed)
    targets = random.normal(size=num_rows)
    noise = random.exponential(size=(num_rows, 3)) * (0.5, 0.3, 0.2) + 0.01
    values = targets[:, None] + random.normal(size=(num_rows, 3)) * noise
    learned = 1 - np.tanh(noise)
    learned[:, 2] = np.nan
    targets[-1] = np.nan
    return Trace(
        logits=values[:, :, None].astype(np.float32),
        scores=np.tile(np.float32([0, 0, 1]), (num_rows, 3, 1)),
        predictions=np.zeros((num_rows, 3), np.int64),
        temperatures=np.ones(3),
        labels=np.full(num_rows, -1),
        costs_ms=np.array([1.0, 2.0, 3.0]),
        fingerprint="f" * 64,
        backend="fake",
        precision="fp32",
        learned=learned.astype(np.float32),
        targets=targets.astype(np.float32),
        files=("f" * 64,) * 3,
    )


def error_of(trace: Trace, policy: Policy, reference: np.ndarray) -> float:
    """Row by row: the mean distance of what the policy answers from `reference`, where that is known."""
    exit_index = replay(policy, trace).exit_index
    off = [
        abs(float(trace.logits[row, exit_index[row], 0]) - float(reference[row]))
        for row in range(len(reference))
        if not np.isnan(reference[row])
    ]
    return float(np.mean(off))


FULL_DEPTH = Policy("learned", (None, None))


@pytest.mark.parametrize("max_loss", [0.0, 0.02, 0.1, 10.0])
def test_thresholds_lose_at_most_what_is_allowed(max_loss: float) -> None:
    trace = value_trace()
    found = calibrate(trace, CalibrateOptions("learned", max_loss))
    full, policy = (error_of(trace, which, trace.targets) for which in (FULL_DEPTH, found.policy))
    report = found.report
    assert policy - full <= max_loss + 1e-9
    assert (report.error_full_depth, report.error_policy) == pytest.approx((full, policy))
    assert report.drop == pytest.approx(policy - full, abs=1e-12)
    assert report.accuracy_policy is report.exits[0].accuracy is report.exits[0].changed is None
    assert report.num_labelled == 1499
    limits = np.quantile(trace.learned[:, :2], np.linspace(0, 1, 40))
    single = [Policy.thresholds("learned", [float(limit)] * 2) for limit in limits]
    affordable = [
        calibrated.exit_index
        for calibrated, one in ((replay(one, trace), one) for one in single)
        if error_of(trace, one, trace.targets) - full <= max_loss
    ]
    best_single = min((np.cumsum(trace.costs_ms)[at].mean() for at in affordable), default=6.0)
    assert report.expected_ms <= best_single * 1.02, "the greedy path is no worse than one threshold for all exits"


def test_without_targets_values_are_held_to_full_depth() -> None:
    trace = replace(value_trace(), targets=np.full(1500, np.nan, np.float32))
    with pytest.raises(DataError, match="none with a target"):
        calibrate(trace, CalibrateOptions("learned", 0.1))
    policy = fastest_values(trace, 0.05, (), "full_depth")
    assert 0 < error_of(trace, policy, trace.logits[:, -1, 0]) <= 0.05
    assert calibrate(trace, CalibrateOptions("learned", 0.05, "full_depth")).policy.limits == policy.limits


@pytest.mark.parametrize("risk", ["deviation", "error_gap"])
@pytest.mark.parametrize("value_range", [0.5, 2.0])
def test_losses_row_by_row(risk: str, value_range: float) -> None:
    trace = value_trace(60)
    table = losses_from_trace(trace, risk, np.ones(3, np.float32), value_range=value_range)
    assert table.counts.sum() == (60 if risk == "deviation" else 59)
    assert not table.is_counted
    for row in range(59):
        values, target = trace.logits[row, :, 0].astype(float), float(trace.targets[row])
        for k in range(3):
            lost = (
                abs(values[k] - values[2]) if risk == "deviation" else abs(values[k] - target) - abs(values[2] - target)
            )
            expected = min(max(lost, -value_range), value_range) / value_range
            assert table.values[row, k] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("risk", ["deviation", "error_gap"])
def test_a_certificate_of_values(risk: str) -> None:
    trace = value_trace(6000)
    options = CertifyOptions(0.05, risk=risk, value_range=2.0)
    found = certify(trace, Policy("learned"), options)
    certificate = found.certificate
    tested = trace.rows(found.tested)
    losses = losses_from_trace(tested, risk, np.ones(3, np.float32), value_range=2.0)
    assert certificate.losses == pytest.approx(losses.of(replay(found.policy, tested).exit_index).sum())
    assert certificate.mean_depth < 2.6, "something leaves"
    assert certificate.p_value <= 0.05
    assert 0 < certificate.losses / certificate.num_rows < certificate.upper_bound <= 0.05
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert "at most, as a share of 2: at most 5.00%" in certificate.words()[0]
    assert {other.name for other in alternatives(trace, found, options)} >= {"full depth", "certified"}


def test_certificates_of_values_are_rarely_wrong() -> None:
    """The risk of the chosen policies on unseen rows: above the bound in 5 % of draws at most, but for luck."""
    unseen = value_trace(20_000, seed=99)
    table = losses_from_trace(unseen, "deviation", np.ones(3, np.float32))
    options = CertifyOptions(0.05, risk="deviation")
    above = 0
    for seed in range(40):
        policy = certify(value_trace(900, seed), Policy("learned"), options).policy
        above += table.of(replay(policy, unseen).exit_index).mean() > 0.05
    assert above <= 5, "6 or more of 40 have a probability of 1.4 % at a level of 5 %"


def test_what_is_about_classes_is_refused() -> None:
    trace = value_trace(90)
    with pytest.raises(OptionError, match=r"got risk .consistency. for a trace of a regression; .*deviation"):
        certify(trace, Policy("learned"), CertifyOptions())
    with pytest.raises(OptionError, match="expected thresholds on 'learned' alone"):
        certify(trace, Policy("max_prob"), CertifyOptions(risk="deviation"))
    with pytest.raises(OptionError, match="expected thresholds on 'learned' alone"):
        calibrate(trace, CalibrateOptions("max_prob"))
    with pytest.raises(DataError, match="a trace of a regression"):
        fastest_thresholds(trace, "learned", 0.1)
    classes = {"logits": np.zeros((90, 3, 2), np.float32), "targets": np.full(90, np.nan, np.float32)}
    with pytest.raises(OptionError, match="got risk 'deviation' for a trace of classes"):
        certify(replace(trace, **classes), Policy(), CertifyOptions(risk="deviation"))
    with pytest.raises(DataError, match="expected targets for a regression"):
        replace(trace, labels=np.zeros(90, np.int64))
    with pytest.raises(DataError, match="targets for classes"):
        replace(trace, logits=np.zeros((90, 3, 2), np.float32))
    with pytest.raises(OptionError, match="value range 0"):
        CertifyOptions(value_range=0.0)


def test_diagnostics_of_values() -> None:
    trace = value_trace()
    found = diagnose(trace)
    assert (found.num_labelled, found.exits, found.agreement) == (1499, (), ())
    for k, value in enumerate(found.values):
        off = trace.logits[:-1, k, 0].astype(float) - trace.targets[:-1]
        assert (value.error, value.rmse, value.bias) == pytest.approx(
            (np.abs(off).mean(), np.sqrt((off**2).mean()), off.mean())
        )
        if k < 2:
            assert value.sure_rank == pytest.approx(spearmanr(trace.learned[:-1, k], -np.abs(off)).statistic)
    assert found.values[2].sure_rank is None
    assert found.values[2].deviation == 0
    bare = diagnose(replace(trace, targets=np.full(1500, np.nan, np.float32)))
    assert bare.values[0].error is None
    assert bare.values[0].deviation == found.values[0].deviation
