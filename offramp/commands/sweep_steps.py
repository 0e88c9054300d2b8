"""What a sweep does with a trained run: export it, record what its exits say, calibrate it.

Each step is what the command of the same name does, made again when what it was made from has changed.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from offramp.bundle import LEARNED, MANIFEST, POLICY, Manifest, load_manifest
from offramp.commands.calibration import certify_bundle
from offramp.commands.sources import source_from_argument
from offramp.commands.sweep_run import Place, State, done, is_trained, load_record, sha256_of
from offramp.commands.sweeps import Measure
from offramp.commands.traces import TraceRequest, record_bundle, stored_trace
from offramp.commands.training import load_splits
from offramp.errors import OfframpError
from offramp.export.capture import DEFAULT_OPSET
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.models.checkpoint import WEIGHTS_FILE
from offramp.models.data import TextSplits
from offramp.policy import Policy
from offramp.storage import write_file

EXPORT, TRACE, CALIBRATE = "export", "trace", "calibrate"
BUNDLE, TEST_TRACE = "bundle", "test.npz"  # of a run's folder
VALIDATION, TEST = "validation", "test"


def export_run(place: Place, measure: Measure) -> State:
    """Export a trained run, and write the rows that it is calibrated and measured on beside it."""
    if not is_trained(place.checkpoint):
        return "waits"
    made_from = {"weights": sha256_of(place.checkpoint / WEIGHTS_FILE), "precision": measure.precision}

    def make() -> dict[str, Any]:
        rows = save_rows(place)
        place.say(f"{place.run.name}: capturing")
        source = source_from_argument(str(place.checkpoint), (), DEFAULT_OPSET, "", {})
        options = ExportOptions(measure.precision)
        manifest = export_bundle(
            source, place.path / BUNDLE, options, lambda step: place.say(f"{place.run.name}: {step}")
        )
        return {"exits": len(manifest.exits), "rows": {name: file.name for name, file in rows.items()}}

    return done(place.path, EXPORT, made_from, make, place.say, lambda: (place.path / BUNDLE / MANIFEST).is_file())


def trace_run(place: Place, measure: Measure) -> State:
    """Record what an exported run says about test rows, and about validation rows where there is a policy to choose."""
    manifest, rows = exported(place)
    if manifest is None:
        return "waits"
    bench = measure.bench
    limits = {VALIDATION: measure.validation_rows, TEST: measure.test_rows}
    made_from = {"files": graphs_of(manifest), "limits": limits, "engines": [bench.backend, bench.precision]}

    def make() -> dict[str, Any]:
        made = {}
        for split, limit in limits.items():
            if split == VALIDATION and len(manifest.exits) == 1:
                continue
            place.say(f"{place.run.name}: recording {split} rows")
            request = TraceRequest(
                str(rows[split]), limit=limit, backend=bench.backend, precision=bench.precision, threads=bench.threads
            )
            output = place.path / TEST_TRACE if split == TEST else None
            made[split] = record_bundle(place.path / BUNDLE, request, output, place.progress)[1]
        return made

    return done(place.path, TRACE, made_from, make, place.say, lambda: (place.path / TEST_TRACE).is_file())


def calibrate_run(place: Place, measure: Measure) -> State:
    """Give an exported run a certified policy; one without early exits has nothing to calibrate."""
    manifest, _ = exported(place)
    traced = load_record(place.path, TRACE)
    if manifest is None or traced is None or traced.result is None or traced.made_from["files"] != graphs_of(manifest):
        return "waits"
    bundle, bench = place.path / BUNDLE, measure.bench
    made_from = {"trace": traced.result.get(VALIDATION, ""), "options": asdict(measure.calibrate)}

    def make() -> dict[str, Any]:
        if len(manifest.exits) == 1:
            return {}
        trace = stored_trace(bundle, bench.backend, bench.precision)
        base = Policy(LEARNED if manifest.is_regression else "max_prob")
        found = certify_bundle(bundle, trace, base, measure.calibrate)
        return found.document() | {"words": list(found.certificate.words()) if found.certificate else []}

    def is_there() -> bool:
        record = load_record(place.path, CALIBRATE)
        policy = record.result.get("policy") if record is not None and record.result is not None else None
        return policy is None or json.loads((bundle / POLICY).read_text()) == policy

    return done(place.path, CALIBRATE, made_from, make, place.say, is_there)


def exported(place: Place) -> tuple[Manifest | None, dict[str, Path]]:
    """Return the manifest of a run's bundle and its files of rows; None unless it is of the present checkpoint."""
    record = load_record(place.path, EXPORT)
    if record is None or record.result is None or not is_trained(place.checkpoint):
        return None, {}
    if record.made_from.get("weights") != sha256_of(place.checkpoint / WEIGHTS_FILE):
        return None, {}
    try:
        manifest = load_manifest(place.path / BUNDLE)
    except OfframpError:
        return None, {}
    return manifest, {split: place.path / name for split, name in record.result["rows"].items()}


def graphs_of(manifest: Manifest) -> list[str]:
    """Return the hashes of all graphs of a bundle."""
    return [graph.sha256 for segment in manifest.segments for _, graph in sorted(segment.graphs.items())]


def save_rows(place: Place) -> dict[str, Path]:
    """Write the validation and test rows of a run's data as files that a bundle reads. Raises StorageError."""
    splits = load_splits(place.run.recipe)
    if isinstance(splits, TextSplits):
        files = {split: place.path / f"{split}.jsonl" for split in (VALIDATION, TEST)}
        names = splits.label_names
        for split, file in files.items():
            lines = [
                json.dumps({"text": example.text, "label": names[int(example.label)] if names else example.label})
                for example in getattr(splits, split)
            ]
            write_file(file, ("\n".join(lines) + "\n").encode())
        return files
    files = {split: place.path / f"{split}.npz" for split in (VALIDATION, TEST)}
    for split, file in files.items():
        rows = getattr(splits, split)
        batch = next(rows.batches(len(rows.targets), seed=0))
        stream = io.BytesIO()
        np.savez_compressed(stream, labels=batch.targets, **dict(batch.inputs))
        write_file(file, stream.getvalue())
    return files
