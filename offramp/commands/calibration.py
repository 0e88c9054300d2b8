"""Calibrates a bundle: from its trace to the policy, and the certificate, that lie in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offramp.bundle import load_manifest, replace_policy
from offramp.certificate import Certificate
from offramp.commands.dataset import class_names
from offramp.commands.traces import TraceRequest, is_of, trace_for
from offramp.errors import DataError, OptionError
from offramp.policy import Policy
from offramp.trace import Trace, load_trace
from offramp.tuning.alternatives import Alternative, alternatives
from offramp.tuning.calibrate import CalibrateOptions, CalibrationReport, calibrate, report_on
from offramp.tuning.certify import Certified, CertifyOptions, certify
from offramp.tuning.losses import LABELLED


@dataclass(frozen=True)
class Calibrated:
    """What was written into the bundle; `report` is about the tested rows, or about all where nothing was tested."""

    policy: Policy
    certificate: Certificate | None
    report: CalibrationReport
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Everything as one object that `json.dumps` takes."""
        compared = [
            dataclasses.asdict(found) | {"policy": json.loads(found.policy.to_json())} for found in self.alternatives
        ]
        return {
            "policy": json.loads(self.policy.to_json()),
            "certificate": json.loads(self.certificate.to_json()) if self.certificate else None,
            "alternatives": compared,
            **dataclasses.asdict(self.report),
        }


def trace_to_calibrate(
    bundle: Path, request: TraceRequest, path: Path | None, progress: bool, say: Callable[[str], None]
) -> Trace:
    """The trace in `path`, which must be of the bundle's engines, or the one that `request` asks for.

    Raises DataError, OptionError, BundleError or BackendError.
    """
    if path is None:
        return trace_for(bundle, request, progress=progress, say=say)
    trace = load_trace(path)
    if not is_of(trace, load_manifest(bundle)):
        raise DataError(
            f"calibrate: the trace {path} is of {trace.backend} {trace.precision} engines that {bundle} does not have; "
            f"record another with `offramp trace {bundle} --data DATA -o {path}`"
        )
    return trace


def calibrate_bundle(bundle: Path, trace: Trace, options: CalibrateOptions) -> Calibrated:
    """Give `bundle` the fastest policy within a drop seen on `trace`, or one for a speedup; without a certificate.

    A certificate that is there goes. Raises DataError or OptionError before anything is changed, then StorageError.
    """
    found = calibrate(trace, options)
    replace_policy(bundle, found.policy.to_json().encode())
    return Calibrated(found.policy, None, found.report, notes=("not certified: the drop is the one on these rows",))


def certify_bundle(
    bundle: Path, trace: Trace, base: Policy, options: CertifyOptions, is_compared: bool = False
) -> Calibrated:
    """Give `bundle` the policy over `base` with a certified risk on `trace`, and its certificate. Raises as above."""
    if load_manifest(bundle).decoder:
        raise OptionError(
            "calibrate: a decoder's rows are tokens of texts, which depend on each other: no test on them holds; use "
            "--max-drop (with --consistency against full depth) or --target-speedup"
        )
    certified = certify(trace, base, options)
    certificate = certified.certificate
    if certificate.class_name:
        certificate = replace(certificate, class_name=class_names(load_manifest(bundle))[options.class_index])
    found = alternatives(trace, certified, options) if is_compared else ()
    report = report_on(
        trace.rows(certified.tested), certified.policy, "label" if options.risk in LABELLED else "full_depth"
    )
    replace_policy(bundle, certified.policy.to_json().encode(), certificate.to_json().encode())
    return Calibrated(certified.policy, certificate, report, found, _notes(certified, trace))


def lines_from_calibrated(found: Calibrated) -> list[str]:
    """What was done, for people."""
    lines = [
        f"exit {each.exit_index}: threshold {'closed' if each.threshold is None else f'{each.threshold:.4f}'}, "
        f"temperature {each.temperature:.2f}, {each.share:.1%} of rows leave"
        for each in found.report.exits
    ]
    lost = "accuracy drop"
    if found.certificate and found.certificate.risk == "deviation":
        lost = "mean distance from full depth"
    elif found.report.error_full_depth is not None:
        lost = "mean absolute error added"
    lines += [
        f"mean depth {found.report.mean_depth:.2f} segments, {found.report.expected_speedup:.2f}x the speed of full "
        f"depth, {lost} {found.report.drop:.4f} on {found.report.num_rows} rows"
    ]
    if found.certificate:
        lines += ["certificate:", *(f"  {line}" for line in found.certificate.words())]
    if found.alternatives:
        lines += ["alternatives, on all rows:"]
        lines += [
            f"  {other.name:<38} risk {other.risk:.2%}, mean depth {other.mean_depth:.2f}, "
            f"{other.expected_speedup:.2f}x; known about other rows: {other.known}"
            for other in found.alternatives
        ]
    return [*lines, *found.notes]


def class_index(bundle: Path, name: str) -> int:
    """The number of the class called `name`, or of that number where classes have no names. Raises OptionError."""
    names = class_names(load_manifest(bundle))
    if name not in names:
        raise OptionError(f"calibrate: got class {name!r}, the model knows {', '.join(names)}")
    return names.index(name)


def _notes(certified: Certified, trace: Trace) -> tuple[str, ...]:
    """What is to be said beside the certificate."""
    policy = certified.policy
    if not policy.sources:
        return ()
    unnamed = int((trace.sources == "").sum())
    base = "full depth" if all(limit is None for limit in policy.limits) else "the strictest certified policy"
    return (f"requests from no source or another one: {base}; {unnamed} rows without a source were left out",)
