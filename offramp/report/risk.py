"""The certificate in plain words, and the test behind it as a path that can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offramp.binomial import upper_bound
from offramp.certificate import Certificate, SourceStatement
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.report.findings import CertificateFinding, CertifiedExit, RiskPath, RiskPoint, SourceFinding
from offramp.report.words import count, share
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.alternatives import Alternative, alternatives
from offramp.tuning.certify import Certified, CertifyOptions, certify
from offramp.tuning.losses import losses_from_trace
from offramp.tuning.path import exits_along, sureness_of
from offramp.tuning.replay import cumulative_costs_ms, expected_cost_ms, mean_depth
from offramp.tuning.risk_tests import betting_upper_bound

MAX_RISK, CONFIDENCE = 0.01, 0.95  # what `offramp calibrate` certifies unless told otherwise
NUM_POINTS = 48  # of a path that are drawn, about

_PROMISES = {
    "consistency": "at most {risk} of all answers differ from the answer that the whole model would have given",
    "accuracy_gap": "at most {risk} of all answers are wrong where the whole model would have been right",
    "accuracy_gap_signed": "the accuracy is at most {points} percentage points below that of the whole model",
    "missed_detection": "of the inputs that the whole model calls “{name}”, at most {risk} are answered otherwise",
    "hellinger": "the class probabilities are on average within {value} of the whole model's (Hellinger distance)",
    "brier": "the Brier score is on average at most {value} above that of the whole model",
    "deviation": "values are on average within {value} of the whole model's",
    "error_gap": "values are on average at most {value} further off than the whole model's",
}
_LOSSES = {
    "consistency": "answered differently from full depth",
    "accuracy_gap": "were wrong where full depth was right",
    "missed_detection": "were missed",
}


@dataclass(frozen=True)
class Retested:
    """What certifying on the rows of the report gives, and what it is compared with."""

    base: Policy
    options: CertifyOptions
    certified: Certified
    alternatives: tuple[Alternative, ...]


def retested(trace: Trace, policy: Policy, certificate: Certificate | None, names: Sequence[str]) -> Retested:
    """Certify on `trace` what `certificate` certifies, or 1 % of changed answers where there is none.

    Everything but the thresholds is as in `policy`. On the rows of the certificate this repeats the test behind it.
    A risk that the rows say nothing about, for want of labels, gives way to changed answers.
    """
    base = replace(policy, limits=(), sources={})
    options = CertifyOptions(MAX_RISK, CONFIDENCE)
    if certificate:
        is_of_class = certificate.risk == "missed_detection" and certificate.class_name in names
        class_index = names.index(certificate.class_name) if is_of_class else UNKNOWN
        wanted = replace(
            options, max_risk=certificate.max_risk, confidence=certificate.confidence, seed=certificate.seed
        )
        try:
            options = replace(wanted, risk=certificate.risk, class_index=class_index)
            return _retested(trace, base, options)
        except (DataError, OptionError):
            options = wanted
    return _retested(trace, base, options)


def _retested(trace: Trace, base: Policy, options: CertifyOptions) -> Retested:
    certified = certify(trace, base, options)
    return Retested(base, options, certified, alternatives(trace, certified, options))


def risk_path(trace: Trace, test: Retested, certificate: Certificate | None) -> RiskPath:
    """The path of a test: losses and the bound of the risk at some of its points."""
    tested = trace.rows(test.certified.tested)
    inverse = test.base.inverse_temperatures(trace.num_exits)
    table = losses_from_trace(trace, test.options.risk, inverse, test.options.class_index).rows(test.certified.tested)
    last = test.certified.positions[""]
    end = len(test.certified.path) - 1
    grain = float(cumulative_costs_ms(trace)[-1]) / NUM_POINTS
    points: list[RiskPoint] = []
    for position, exit_index in enumerate(exits_along(sureness_of(test.base, tested), test.certified.path)):
        ms = expected_cost_ms(exit_index, tested)
        if points and ms > points[-1].ms - grain and position not in (last, last + 1, end):
            continue
        losses = table.of(exit_index)
        total = float(losses.sum())
        bound = (
            upper_bound(int(total), len(losses), test.options.delta)
            if table.is_counted
            else (betting_upper_bound(losses, test.options.delta))
        )
        points.append(RiskPoint(ms, mean_depth(exit_index), total, bound if position else 0.0, position <= last))
    made = test.certified.certificate
    return RiskPath(
        risk=test.options.risk,
        max_risk=test.options.max_risk,
        confidence=test.options.confidence,
        num_rows=int(table.counts.sum()),
        num_learned=len(trace.labels) - len(test.certified.tested),
        is_of_certificate=certificate is not None
        and (made.policy_sha256, made.trace_sha256) == (certificate.policy_sha256, certificate.trace_sha256),
        points=tuple(points),
    )


def certificate_finding(
    certificate: Certificate | None, trace: Trace, policy: Policy, bundle: str
) -> CertificateFinding:
    """What may be promised about the engines of the trace under the policy, and under which conditions."""
    command = f"offramp calibrate {bundle} --max-risk {MAX_RISK} --confidence {CONFIDENCE} --risk consistency"
    if certificate is None:
        return CertificateFinding(
            "none",
            "There is no certificate. Nothing is promised about inputs other than the rows counted here.",
            "The thresholds were chosen on recorded rows and have not been tested on others; on new rows expect more "
            "changed answers than this page shows.",
            command=command,
        )
    promise = promise_text(certificate.risk, certificate.max_risk, certificate.class_name)
    if obstacle := certificate.obstacle(trace.files, trace.backend, trace.precision, policy.sha256):
        return CertificateFinding(
            "not for this",
            f"The bundle's certificate does not hold for what is described here: {obstacle}.",
            f"It is about something else, for which it says: {promise}.",
            command=command,
        )
    return CertificateFinding(
        "in force",
        _statement(certificate, promise),
        _evidence(certificate),
        conditions=_conditions(certificate),
        limits=_limits(certificate),
        exits=tuple(
            CertifiedExit(k, found.num_rows, found.losses, found.upper_bound)
            for k, found in enumerate(certificate.exits)
        ),
        sources=tuple(
            SourceFinding(source, _source_text(found, certificate.max_risk))
            for source, found in sorted(certificate.sources.items())
        ),
    )


def promise_text(risk: str, max_risk: float, class_name: str) -> str:
    """The bound as a clause."""
    return _PROMISES[risk].format(
        risk=share(max_risk), points=f"{100 * max_risk:g}", value=f"{max_risk:g}", name=class_name
    )


def _statement(certificate: Certificate, promise: str) -> str:
    """The sentence to sign."""
    if certificate.sources:
        return f"For every source below, with the confidence named there, {promise}."
    if certificate.upper_bound == 0:
        more = f": at least {count(certificate.rows_missing)} more rows are needed" if certificate.rows_missing else ""
        return f"Every row goes to full depth, so no answer is changed. Nothing could be shown for leaving early{more}."
    return f"With {share(certificate.confidence, 0)} confidence, {promise}."


def _evidence(certificate: Certificate) -> str:
    rows = count(certificate.num_rows)
    if certificate.risk in _LOSSES:
        seen = f"of {rows} rows, {count(int(certificate.losses))} {_LOSSES[certificate.risk]}"
    else:
        seen = f"a mean loss of {certificate.losses / max(certificate.num_rows, 1):.4f} over {rows} rows"
    return f"Shown on recorded rows ({certificate.method}): {seen}, p = {certificate.p_value:.2g}."


def _conditions(certificate: Certificate) -> tuple[str, ...]:
    """Completing "It holds as long as"."""
    return (
        "the inputs to come are like the rows tested, each drawn independently from the same traffic (the "
        "monitor is there "
        "to notice when they are not);",
        f"the answers come from exactly the files tested ({certificate.backend}, {certificate.precision}) "
        "under exactly this "
        "policy (both are compared by their SHA-256 when the bundle is opened).",
    )


def _limits(certificate: Certificate) -> tuple[str, ...]:
    """Completing "It does not say"."""
    return (
        "that every kind of input fares as well: it is about the share over all of them;",
        "that the whole model is right: where it is wrong, the answers may be wrong with it;",
        f"that it is certain: of many such certificates, up to {share(1 - certificate.confidence, 0)} will not hold.",
    )


def _source_text(found: SourceStatement, max_risk: float) -> str:
    if found.rows_missing:
        return f"goes to full depth: at least {count(found.rows_missing)} more rows are needed to promise anything."
    return (
        f"at most {share(max_risk)}, with {share(found.confidence)} confidence: {found.losses:g} in "
        f"{count(found.num_rows)} "
        f"rows, mean depth {found.mean_depth:.2f}."
    )
