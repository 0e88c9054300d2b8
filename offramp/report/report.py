"""The spine of the report: from what is known about a bundle to findings, and from these to a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import offramp
from offramp.bundle import Manifest
from offramp.certificate import Certificate
from offramp.errors import BackendError, DataError
from offramp.policy import Policy
from offramp.report import frontier, quality, risk
from offramp.report.examples import examples
from offramp.report.findings import Findings, Missing, Subject
from offramp.report.sections import example_lists, sections, tiles
from offramp.report.svg import printable
from offramp.report.words import count, headline, policy_text, share
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.diagnostics import exit_agreement
from offramp.tuning.replay import replay


@dataclass(frozen=True)
class Evidence:
    """What a report is made from; what is optional is None or empty when it is not there."""

    bundle: str  # as the user writes it in commands
    manifest: Manifest
    policy: Policy
    trace: Trace
    certificate: Certificate | None = None
    placement: Any = None  # reports/placement.json
    benchmark: Any = None  # what `offramp bench --json` prints
    texts: tuple[str, ...] = ()  # one per row of the trace, only where they may be shown


def findings_from_evidence(evidence: Evidence) -> Findings:
    """Everything the report says. Raises DataError when the trace has no rows or is about another model."""
    trace, policy = evidence.trace, evidence.policy
    _check(evidence)
    decided = replay(policy, trace)
    measured = frontier.measured_alternatives(evidence.benchmark) if evidence.benchmark is not None else ()
    certificate = evidence.certificate
    names = evidence.manifest.labels or tuple(map(str, range(trace.logits.shape[2])))
    test = risk.retested(trace, policy, certificate, names)
    return Findings(
        subject=_subject(evidence, names),
        alternatives=(*frontier.alternatives(trace, policy, test.alternatives), *measured),
        exits=quality.exit_findings(trace, policy, decided, evidence.manifest),
        waterfall=(
            frontier.waterfall_from_shares(trace, decided)
            if evidence.placement is None
            else frontier.waterfall_from_placement(evidence.placement)
        ),
        exit_agreement=tuple(map(tuple, exit_agreement(trace.predictions).tolist())),
        confusion=quality.class_confusion(trace, decided, names),
        overthinking=quality.overthinking_shares(trace, policy),
        risk_path=risk.risk_path(trace, test, certificate),
        certificate=risk.certificate_finding(certificate, trace, policy, evidence.bundle),
        retention=quality.retention_bins(trace, decided),
        examples=examples(trace, decided, evidence.texts, names),
        missing=_missing(evidence),
    )


def html_from_findings(found: Findings) -> bytes:
    """The page: one file that needs no other. Raises BackendError without jinja2 or matplotlib."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as exc:
        raise BackendError(f"writing the report needs jinja2: {exc}; run `pip install 'offramp[report]'`") from exc
    environment = Environment(
        loader=PackageLoader("offramp", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "share": share}
    page = environment.get_template("page.html").render(
        found=found,
        headline=headline(found),
        tiles=tiles(found),
        sections=sections(found),
        example_lists=example_lists(found),
        version=offramp.__version__,
    )
    return page.encode()


def _subject(evidence: Evidence, names: tuple[str, ...]) -> Subject:
    trace = evidence.trace
    return Subject(
        name=evidence.manifest.name,
        exits=tuple(spec.name for spec in evidence.manifest.exits),
        classes=names,
        backend=trace.backend,
        precision=trace.precision,
        num_rows=len(trace.labels),
        num_labelled=int((trace.labels != UNKNOWN).sum()),
        fingerprint=trace.fingerprint,
        trace_sha256=trace.sha256,
        policy_sha256=evidence.policy.sha256,
        policy=policy_text(evidence.policy),
    )


def _check(evidence: Evidence) -> None:
    trace, manifest = evidence.trace, evidence.manifest
    if not len(trace.labels):
        raise DataError("report: got a trace of 0 rows, expected at least 1; record it again with data")
    shape = (len(manifest.exits), manifest.exits[0].num_classes)
    if trace.logits.shape[1:] != shape or trace.fingerprint != manifest.fingerprint:
        raise DataError(
            f"report: the trace is about another model ({trace.fingerprint[:12]}…, {trace.num_exits} exits) "
            "than the bundle "
            f"({manifest.fingerprint[:12]}…, {shape[0]} exits); record it again with `offramp trace "
            f"{evidence.bundle} --data DATA`"
        )


def _missing(evidence: Evidence) -> tuple[Missing, ...]:
    """What would make the report more complete."""
    bundle, trace = evidence.bundle, evidence.trace
    record = f"offramp trace {bundle} --data FILE -o TRACE.npz, then --trace TRACE.npz"
    bench = f"offramp bench {bundle} --batch-sizes 1 --json > bench.json, then --bench bench.json"
    wanted = (
        ("labels, for accuracy, reliability and overthinking", record, not (trace.labels != UNKNOWN).any()),
        ("the time of the uncut model", record, math.isnan(trace.uncut_ms)),
        (
            "a placement: which exits are worth keeping",
            f"offramp place {bundle} -o PLACED, then report on PLACED",
            evidence.placement is None,
        ),
        ("times measured end to end", bench, evidence.benchmark is None),
        ("examples with their texts", f"offramp report {bundle} --examples FILE -o PAGE.html", not evidence.texts),
    )
    return tuple(Missing(what, command) for what, command, is_missing in wanted if is_missing)
