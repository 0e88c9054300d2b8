"""What `offramp report` does: gathers what lies in and beside a bundle, and writes the page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.bundle import Manifest, load_manifest, read_certificate, read_policy
from offramp.certificate import Certificate
from offramp.commands.dataset import ROTTEN_TOMATOES
from offramp.commands.traces import stored_trace
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.report.findings import Findings
from offramp.report.report import Evidence, findings_from_evidence, html_from_findings
from offramp.storage import write_file
from offramp.trace import UNKNOWN, Trace, load_trace

PLACEMENT = Path("reports", "placement.json")


@dataclass(frozen=True)
class ReportRequest:
    """Which trace to report on, and what else may go in; empty where not given."""

    trace: Path | None = None  # None: the one beside the bundle
    backend: str = "auto"
    precision: str = "auto"
    benchmark: Path | None = None  # what `offramp bench --json` printed
    examples: str = ""  # the data of the trace, whose texts may be shown
    split: str = "validation"  # of rotten-tomatoes


def report_bundle(bundle: Path, request: ReportRequest, output: Path | None) -> Findings:
    """What is found about `bundle`; written to `output` as a page unless that is None.

    Raises DataError for a trace or another file that does not fit, BundleError, CertificateError, OptionError,
    StorageError, and BackendError without matplotlib or jinja2.
    """
    manifest = load_manifest(bundle)
    if manifest.is_regression:
        raise OptionError(
            f"report: {bundle} is a regression, and the page is about classes; `offramp calibrate {bundle} --json`, "
            f"`offramp diagnose {bundle}` and `offramp bench {bundle}` say what is known of it"
        )
    trace = load_trace(request.trace) if request.trace else stored_trace(bundle, request.backend, request.precision)
    certificate = read_certificate(bundle)
    evidence = Evidence(
        bundle=str(bundle),
        manifest=manifest,
        policy=Policy.from_json(read_policy(bundle, manifest)),
        trace=trace,
        certificate=Certificate.from_json(certificate) if certificate else None,
        placement=_json(bundle / PLACEMENT) if (bundle / PLACEMENT).is_file() else None,
        benchmark=_json(request.benchmark) if request.benchmark else None,
        texts=_texts(request.examples, request.split, manifest, trace) if request.examples else (),
    )
    found = findings_from_evidence(evidence)
    if output:
        write_file(output, html_from_findings(found))
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
        raise DataError(f"reading {path}: {exc}; expected the JSON that offramp writes") from exc


def _texts(data: str, split: str, manifest: Manifest, trace: Trace) -> tuple[str, ...]:
    """The texts of the trace's rows. Raises DataError when `data` has other labels than the trace."""
    from offramp.models.data import load_rotten_tomatoes, load_texts

    if data == ROTTEN_TOMATOES:
        splits = load_rotten_tomatoes()
        examples, names = getattr(splits, split), splits.label_names
    elif Path(data).suffix in (".csv", ".jsonl"):
        loaded = load_texts(Path(data))
        examples, names = loaded.examples, loaded.label_names
    else:
        raise OptionError(f"--examples: got {data!r}, expected {ROTTEN_TOMATOES}, or a .csv or .jsonl file of texts")
    for row, (example, label) in enumerate(zip(examples, trace.labels.tolist(), strict=False)):
        if label != UNKNOWN and manifest.labels and names[example.label] != manifest.labels[label]:
            raise DataError(
                f"--examples: row {row} of {data} is {names[example.label]!r}, in the trace it is "
                f"{manifest.labels[label]!r}; "
                f"expected the data that the trace was recorded from, in its order"
            )
    return tuple(example.text for example in examples)
