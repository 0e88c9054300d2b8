"""Verify a bundle again, on this machine: every file, and the segments against the whole graph beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from offramp.bundle import load_manifest, read_file, read_policy
from offramp.commands.uncut import load_reference
from offramp.errors import DataError
from offramp.export.chain import Arrays, Chain
from offramp.export.export_bundle import INPUTS, reference_path
from offramp.export.verify import Parity, verify_fp32


def verify_bundle(bundle: Path) -> Parity:
    """Check hashes of all files, then the FP32 chain against the reference on the inputs kept beside it.

    Raises BundleError for files, ParityError for numbers.
    """
    manifest = load_manifest(bundle)
    read_policy(bundle, manifest)
    records = [record for segment in manifest.segments for record in segment.graphs.values()]
    records += [plan.file for segment in manifest.segments for plan in segment.plans]
    records += [manifest.text.tokenizer] if manifest.text else []
    for record in records:
        read_file(bundle, record)
    models = [onnx.load_model_from_string(read_file(bundle, spec.graphs["fp32"])) for spec in manifest.segments]
    parity = Parity()
    whole = load_reference(bundle, manifest)
    verify_fp32(parity, Chain.open(manifest.segments, models), whole, manifest.exits, [_inputs(bundle)])
    parity.check()
    return parity


def _inputs(bundle: Path) -> Arrays:
    path = reference_path(bundle) / INPUTS
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as exc:
        raise DataError(f"reading {path}: {exc}; export the bundle again to have it") from exc
