"""Verify a bundle again, on this machine: every file, and the segments against the whole graph beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from offramp.bundle import Manifest, load_manifest, read_file, read_policy
from offramp.commands.uncut import load_reference
from offramp.errors import DataError, ParityError
from offramp.export.chain import Arrays, Chain, open_session
from offramp.export.export_bundle import INPUTS, reference_path
from offramp.export.trim import verified_trims
from offramp.export.verify import Parity, verify_fp32
from offramp.export.verify_decoder import DecoderParts, verify_decoder


def verify_bundle(bundle: Path) -> Parity:
    """Check hashes of all files, then the FP32 chain against the reference on the inputs kept beside it.

    Raises BundleError for files, ParityError for numbers.
    """
    manifest = load_manifest(bundle)
    read_policy(bundle, manifest)
    records = [record for part in manifest.parts for record in part.graphs.values()]
    records += [plan.file for part in manifest.parts for plan in part.plans]
    records += [manifest.text.tokenizer] if manifest.text else []
    for record in records:
        read_file(bundle, record)
    models = [onnx.load_model_from_string(read_file(bundle, spec.graphs["fp32"])) for spec in manifest.segments]
    parity, chain, batches = Parity(), Chain.open(manifest.segments, models), [_inputs(bundle)]
    if manifest.decoder:
        _verify_decoder(parity, bundle, manifest, chain, batches[0])
        parity.check()
        return parity
    verify_fp32(parity, chain, load_reference(bundle, manifest), manifest.exits, batches)
    parity.check()
    trims, parity.trimming = verified_trims({"fp32": chain}, manifest.inputs, manifest.dimensions, batches)
    if "fp32" in manifest.trims and not trims:
        raise ParityError(
            f"{bundle}: padding was cut off without changing a bit where it was exported, and changes some here: "
            f"{parity.trimming['fp32']}; export the bundle on this machine"
        )
    return parity


def _verify_decoder(parity: Parity, bundle: Path, manifest: Manifest, chain: Chain, batch: Arrays) -> None:
    assert manifest.decoder is not None, "a decoder"
    graphs = {head.name: read_file(bundle, head.graphs["fp32"]) for head in manifest.heads}
    sessions = {name: open_session(onnx.load_model_from_string(content)) for name, content in graphs.items()}
    parts = DecoderParts(
        chain,
        [sessions[spec.head] for spec in manifest.exits],
        manifest.exits,
        [[state.tensor.name for state in segment.states] for segment in manifest.segments],
        manifest.decoder,
    )
    verify_decoder(parity, parts, open_session(load_reference(bundle, manifest)), batch)
    parity.rows = len(batch[manifest.decoder.past_length])


def _inputs(bundle: Path) -> Arrays:
    path = reference_path(bundle) / INPUTS
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as exc:
        raise DataError(f"reading {path}: {exc}; export the bundle again to have it") from exc
