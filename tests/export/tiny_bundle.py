"""A two-segment bundle made by hand, following the segment contract: no torch, fixed weights, about 20 KB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from offramp.bundle import (
    DimensionSpec,
    ExitSpec,
    FileRecord,
    InputSpec,
    Manifest,
    PolicyRecord,
    SegmentSpec,
    TensorSpec,
    file_record,
    save_manifest,
)

HIDDEN = 32
TOKENS = 50
DIMENSIONS = {"rows": DimensionSpec(1, 8), "sequence": DimensionSpec(2, 64)}
CARRY = (
    TensorSpec("hidden", "float32", ("rows", "sequence", HIDDEN)),
    TensorSpec("mask", "bool", ("rows", 1, "sequence")),
)
_HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
_HEAD = """
    pooled = ReduceMax <keepdims = 0> (hidden, axis_1)
    logits = MatMul (pooled, head)
    scaled = Mul (logits, inverse_temperature)
    probabilities = Softmax <axis = 1> (scaled)
    log_probabilities = LogSoftmax <axis = 1> (scaled)
    terms = Mul (probabilities, log_probabilities)
    entropy = ReduceSum <keepdims = 1> (terms, axis_1)
    normalised = Mul (entropy, minus_one_over_log_2)
    top, indices = TopK <axis = 1> (probabilities, two)
    top_1 = Slice (top, zero, axis_1, axis_1)
    top_2 = Slice (top, axis_1, two, axis_1)
    margin = Sub (top_1, top_2)
    scores = Concat <axis = 1> (top_1, margin, normalised)
    prediction = ArgMax <axis = 1, keepdims = 0> (logits)
"""
_OUTPUTS = "float[{s}, 2] logits, int64[{s}] prediction, float[{s}, 3] scores"
_BODY = """
    narrow = Cast <to = {kind}> (embedded)
    wide = Cast <to = {kind}> (weight)
    product = MatMul (narrow, wide)
    activated = Relu (product)
    summed = Add (activated, narrow)
    hidden = Cast <to = 1> (summed)
"""


def weights(seed: int, *shape: int) -> np.ndarray:
    """Fixed, non-random values in [-0.5, 0.5]."""
    return (np.sin(np.arange(np.prod(shape)) * 0.7 + seed).reshape(shape) / 2).astype(np.float32)


def model_from_text(text: str, seed: int, **more: np.ndarray) -> onnx.ModelProto:
    """An ONNX model from its textual form, with the constants that all segments share."""
    model = onnx.parser.parse_model(_HEADER + text)
    arrays = {
        "weight": weights(seed, HIDDEN, HIDDEN),
        "head": weights(seed + 1, HIDDEN, 2),
        "axis_1": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "two": np.array([2], np.int64),
        "minus_one_over_log_2": np.array([-1 / np.log(2)], np.float32),
    } | more
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def cast_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store `weight` in FP16, as a real converter does, instead of casting it in the graph."""
    for tensor in model.graph.initializer:
        if tensor.name == "weight":
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, "weight"))
    return model


def first_segment(precision: str) -> onnx.ModelProto:
    """Embedding, one layer, carry and exit 0."""
    kind = 10 if precision == "fp16" else 1  # onnx.TensorProto.FLOAT16, FLOAT
    outputs = f"float[rows, sequence, {HIDDEN}] hidden, bool[rows, 1, sequence] mask, " + _OUTPUTS.format(s="rows")
    text = f"""
    segment_00 (int64[rows, sequence] input_ids, int64[rows, sequence] attention_mask,
                float inverse_temperature) => ({outputs}) {{
        embedded = Gather (table, input_ids)
        flags = Cast <to = 9> (attention_mask)
        mask = Unsqueeze (flags, axis_1)
        {_BODY.format(kind=kind)} {_HEAD}
    }}"""
    model = model_from_text(text, 0, table=weights(7, TOKENS, HIDDEN))
    return cast_weights(model) if precision == "fp16" else model


def last_segment(precision: str) -> onnx.ModelProto:
    """The gather of the rows that go on, one layer, the final exit."""
    kind = 10 if precision == "fp16" else 1
    text = f"""
    segment_01 (int64[rows] rows, float[previous_rows, sequence, {HIDDEN}] carry_in_0,
                bool[previous_rows, 1, sequence] carry_in_1, float inverse_temperature)
                => ({_OUTPUTS.format(s="rows")}) {{
        mask = Gather <axis = 0> (carry_in_1, rows)
        gathered = Gather <axis = 0> (carry_in_0, rows)
        mask_float = Cast <to = 1> (mask)
        mask_column = Transpose <perm = [0, 2, 1]> (mask_float)
        embedded = Mul (gathered, mask_column)
        {_BODY.format(kind=kind)} {_HEAD}
    }}"""
    model = model_from_text(text, 3)
    return cast_weights(model) if precision == "fp16" else model


def make_bundle(directory: Path, graphs: list[dict[str, onnx.ModelProto]] | None = None) -> Path:
    """Write a bundle whose segments have these graphs by precision; FP32 and FP16 of both by default."""
    if graphs is None:
        graphs = [{p: make(p) for p in ("fp32", "fp16")} for make in (first_segment, last_segment)]
    manifest = Manifest(
        name="tiny",
        inputs=(
            InputSpec("input_ids", "int64", ("rows", "sequence"), 0, TOKENS - 1, False),
            InputSpec("attention_mask", "int64", ("rows", "sequence"), 0, 1, True),
        ),
        dimensions=DIMENSIONS,
        exits=(ExitSpec("exit_0", 2), ExitSpec("exit_1", 2)),
        segments=(
            SegmentSpec(0, ("input_ids", "attention_mask"), (), CARRY, _save_graphs(directory, 0, graphs[0])),
            SegmentSpec(1, (), CARRY, (), _save_graphs(directory, 1, graphs[1])),
        ),
        policy=PolicyRecord(file_record("policy.json", b"{}").sha256),
        reference_sha256="0" * 64,
    )
    (directory / "policy.json").write_bytes(b"{}")
    save_manifest(directory, manifest)
    return directory


def _save_graphs(directory: Path, index: int, graphs: dict[str, onnx.ModelProto]) -> dict[str, FileRecord]:
    records = {}
    for precision, model in graphs.items():
        name = "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"
        path = f"segments/{index:02d}/{name}"
        content = model.SerializeToString(deterministic=True)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
        records[precision] = file_record(path, content)
    return records
