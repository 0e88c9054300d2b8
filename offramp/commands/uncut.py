"""The uncut model: the whole graph with its final exit only. What early exits have to beat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import ModelProto

from offramp.bundle import Manifest, file_record
from offramp.commands.dataset import Inputs
from offramp.errors import BundleError
from offramp.export.export_bundle import WHOLE, reference_path
from offramp.export.graph import GraphView
from offramp.runtime import Runner
from offramp.runtime.backends import ONNXRUNTIME
from offramp.runtime.onnxruntime_engine import open_session


def load_reference(bundle: Path, manifest: Manifest) -> ModelProto:
    """The whole graph beside the bundle, all exits as outputs. Raises BundleError when it is not this bundle's."""
    path = reference_path(bundle) / WHOLE
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise BundleError(f"reading {path}: {exc}; export the bundle again to have it") from exc
    if file_record(path.name, content).sha256 != manifest.reference_sha256:
        raise BundleError(f"{path} belongs to another export than {bundle}; export the bundle again")
    return onnx.load_model_from_string(content)


def uncut_call(bundle: Path, runner: Runner, threads: int) -> Callable[[Inputs], object] | None:
    """The uncut model beside `bundle`, opened as the segments of `runner` were, to be timed on the same inputs.

    None where nothing is comparable: no reference, or segments that are not FP32 graphs on ONNX Runtime, as it is.
    Raises BundleError when the reference is not this bundle's.
    """
    if runner.backend != ONNXRUNTIME or runner.precision != "fp32" or not (reference_path(bundle) / WHOLE).is_file():
        return None
    model = uncut_model(load_reference(bundle, runner.manifest), runner.manifest.exits[-1].name)
    session = open_session(model.SerializeToString(), threads, str(reference_path(bundle) / WHOLE))
    return lambda inputs: session.run(None, inputs)


def uncut_model(whole: ModelProto, final: str) -> ModelProto:
    """`whole` without the exits before `final` and whatever only they need."""
    view = GraphView(whole)
    nodes = view.upstream([final], view.reads)
    model = ModelProto()
    model.CopyFrom(whole)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(view.nodes[index] for index in sorted(nodes))
    model.graph.output.extend(value for value in whole.graph.output if value.name == final)
    return model
