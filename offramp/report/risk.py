"""The certificate in plain words, and how far a threshold for all exits could go under its bound."""

from __future__ import annotations

from offramp.binomial import p_value, upper_bound
from offramp.certificate import Certificate, SourceStatement
from offramp.policy import Policy
from offramp.report.findings import CertificateFinding, RiskPath, RiskPoint, SourceFinding
from offramp.report.frontier import global_policy, sweep_thresholds
from offramp.report.words import count, share
from offramp.trace import Trace
from offramp.tuning.replay import expected_cost_ms, mean_depth, replay

MAX_RISK, CONFIDENCE = 0.01, 0.95  # what `offramp calibrate` certifies unless told otherwise

_PROMISES = {
    "consistency": "at most {risk} of all answers differ from the answer that the whole model would have given",
    "accuracy_gap": "at most {risk} of all answers are wrong where the whole model would have been right",
    "accuracy_gap_signed": "the accuracy is at most {points} percentage points below that of the whole model",
    "missed_detection": "of the inputs that the whole model calls “{name}”, at most {risk} are answered otherwise",
    "hellinger": "the class probabilities are on average within {value} of the whole model's (Hellinger distance)",
    "brier": "the Brier score is on average at most {value} above that of the whole model",
}
_LOSSES = {
    "consistency": "answered differently from full depth",
    "accuracy_gap": "were wrong where full depth was right",
    "missed_detection": "were missed",
}


def risk_path(trace: Trace, policy: Policy, max_risk: float, confidence: float) -> RiskPath:
    """Test one threshold for all exits after the other, the strictest first, until one fails.

    The risk is disagreement with full depth, which needs no labels. The sequence is fixed before the rows are seen, so
    every policy before the first failure holds (Angelopoulos et al. 2021, arXiv 2110.01052, section 3).
    """
    points: list[RiskPoint] = []
    passing = True
    for sureness in sweep_thresholds():
        swept = global_policy(trace, policy.score, sureness, policy.temperatures)
        decided = replay(swept, trace)
        losses = int((decided.prediction != trace.predictions[:, -1]).sum())
        num_rows = len(trace.labels)
        passing = passing and p_value(losses, num_rows, max_risk) <= 1 - confidence
        points.append(
            RiskPoint(
                threshold=next((limit for limit in swept.limits if limit is not None), 1.0),
                ms=expected_cost_ms(decided.exit_index, trace),
                mean_depth=mean_depth(decided.exit_index),
                losses=losses,
                num_rows=num_rows,
                upper_bound=upper_bound(losses, num_rows, 1 - confidence),
                certified=bool(passing),
            )
        )
    return RiskPath(max_risk, confidence, "consistency", policy.score, tuple(points))


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
        f"With {share(certificate.confidence, 0)} confidence, {promise}.",
        _evidence(certificate),
        conditions=_conditions(certificate),
        limits=_limits(certificate),
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
