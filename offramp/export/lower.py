"""Lower segment graphs to FP16 with NVIDIA ModelOpt AutoCast, calibrated on the inputs they really get."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, TensorShapeProto, numpy_helper

from offramp.errors import ModelError
from offramp.export.chain import Arrays
from offramp.export.graph import describe_node, inner_graphs
from offramp.export.score_head import PREFIX

# A node stays in FP32 when a value beyond this passes it. AutoCast's own 512 would keep attention masks of -1e4
# and everything after them in FP32; FP16 ends at 65,504, and this leaves a factor of 3 for unseen inputs.
_MAX_ABS_VALUE = 20_000.0
# LayerNormalization sums squares: the one operator that users report to overflow (NVIDIA/TensorRT#2564, #4493).
_FP32_OPERATORS = ["LayerNormalization"]


def fp16_from_segment(model: ModelProto, feeds: Sequence[Arrays]) -> ModelProto:
    """`model` in mixed FP16, with inputs, outputs and score head in FP32.

    `feeds` are complete inputs of the segment, from real data; their ranges decide what stays in FP32. Raises
    ModelError when AutoCast cannot convert the graph.
    """
    with tempfile.TemporaryDirectory(prefix="offramp-") as folder, _quiet_modelopt():
        from modelopt.onnx.autocast import convert_to_mixed_precision  # 4 s to import

        source, data = Path(folder, "segment.onnx"), Path(folder, "calibration")
        onnx.save(model, source)
        data.mkdir()
        for position, feed in enumerate(feeds):
            np.savez(data / f"{position:04d}.npz", allow_pickle=False, **feed)
        try:
            lowered: ModelProto = convert_to_mixed_precision(
                onnx_path=str(source),
                low_precision_type="fp16",
                keep_io_types=True,
                calibration_data=str(data),
                nodes_to_exclude=[f"{PREFIX}.*"],
                nodes_to_include=_lookups(model),
                op_types_to_exclude=_FP32_OPERATORS,
                data_max=_MAX_ABS_VALUE,
                providers=["cpu"],  # its default is a list that it changes when it meets a custom operator
            )
        except Exception as exc:  # AutoCast lets through whatever its parts raise
            raise ModelError(
                f"lowering {model.graph.name} to FP16: {exc}{_suspects(model)}; export with `--precision fp32` to go "
                f"without"
            ) from exc
    return _normalised(lowered, model)


def _lookups(model: ModelProto) -> list[str]:
    """Patterns for the names of the Gathers that read a table of weights which FP16 can hold.

    AutoCast looks at all values that pass a node, at the indices too: a token id above its limit would keep the
    whole table of words in FP32.
    """
    tables = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    return [
        f"^{re.escape(node.name)}$"
        for node in model.graph.node
        if node.op_type == "Gather" and node.name and node.input[0] in tables
        if np.abs(numpy_helper.to_array(tables[node.input[0]])).max() < _MAX_ABS_VALUE
    ]


def _suspects(model: ModelProto) -> str:
    """Operators that AutoCast is known not to convert, as an addition to its own message."""
    found = sorted(
        describe_node(node)
        for node in model.graph.node
        if any(inner_graphs(node)) or node.domain or "Sequence" in node.op_type
    )
    return f" (AutoCast may not convert {', '.join(found)})" if found else ""


def _normalised(lowered: ModelProto, original: ModelProto) -> ModelProto:
    """`lowered` with the original's name, inputs and outputs, and in an order that does not change from run to run."""
    lowered.graph.name = original.graph.name
    lowered.graph.ClearField("doc_string")
    shapes = _shapes(lowered, original)
    values = sorted(lowered.graph.value_info, key=lambda value: value.name)  # AutoCast's order is that of a set
    del lowered.graph.value_info[:]
    for value in values:
        if value.name in shapes:
            value.type.tensor_type.shape.CopyFrom(shapes[value.name])
            lowered.graph.value_info.append(value)
    for values, wanted in (
        (lowered.graph.input, original.graph.input),
        (lowered.graph.output, original.graph.output),
    ):
        del values[:]
        values.extend(wanted)
    onnx.checker.check_model(lowered)
    return lowered


def _shapes(lowered: ModelProto, original: ModelProto) -> dict[str, TensorShapeProto]:
    """What is known about shapes: the original's, which the casts between keep.

    AutoCast calls every length it does not know "unk", and what has one name has one length: ONNX Runtime then
    reuses buffers that do not fit.
    """
    graph = original.graph
    shapes = {value.name: value.type.tensor_type.shape for value in (*graph.value_info, *graph.input, *graph.output)}
    for node in lowered.graph.node:
        if node.op_type == "Cast" and node.input[0] in shapes:
            shapes.setdefault(node.output[0], shapes[node.input[0]])
    return shapes


@contextlib.contextmanager
def _quiet_modelopt() -> Iterator[None]:
    """Keep ModelOpt's log, a line per node, and the warnings of what it imports away from the user."""
    before, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
