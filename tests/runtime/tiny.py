"""A three-segment classifier of token sequences, small enough to compute by hand, as a bundle and in numpy.

Weights are fixed multiples of 1/8 and activations stay small, so that every sum is exact in float32: the
numpy reference and any engine must agree on logits bit for bit, in any order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
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
    TextSpec,
    file_record,
    save_manifest,
)
from offramp.policy import Policy

NUM_SEGMENTS, NUM_CLASSES, WIDTH, NUM_TOKENS = 3, 3, 4, 16
MAX_ROWS, MAX_LENGTH = 8, 12
INPUTS = (
    InputSpec("ids", "int64", ("rows", "sequence"), 0, NUM_TOKENS - 1, False),
    InputSpec("mask", "int64", ("rows", "sequence"), 0, 1, True),
)
CARRY = (
    TensorSpec("carry_in_0", "float32", ("rows", "sequence", WIDTH)),
    TensorSpec("carry_in_1", "float32", ("rows", 1, "sequence")),
)

Inputs = dict[str, NDArray[np.int64]]
Edit = Callable[[onnx.ModelProto, int], onnx.ModelProto]

_HEAD = """
    pooled = MatMul (keep, hidden)
    pooled_rows = Squeeze (pooled, axis_1)
    logits = MatMul (pooled_rows, head)
    scaled = Mul (logits, inverse_temperature)
    probability = Softmax <axis = 1> (scaled)
    log_probability = LogSoftmax <axis = 1> (scaled)
    terms = Mul (probability, log_probability)
    negative = ReduceSum <keepdims = 1> (terms, axis_1)
    entropy = Mul (negative, entropy_scale)
    top, places = TopK <axis = 1> (probability, two)
    first, second = Split <axis = 1, num_outputs = 2> (top)
    margin = Sub (first, second)
    scores = Concat <axis = 1> (first, margin, entropy)
    prediction = ArgMax <axis = 1, keepdims = 0> (logits)
"""
_LAYER = {
    "fp32": "product = MatMul (before, weight)",
    "fp16": """
        before_half = Cast <to = 10> (before)
        product_half = MatMul (before_half, weight)
        product = Cast <to = 1> (product_half)
    """,
}


def weights(seed: int, *shape: int) -> NDArray[np.float32]:
    """Fixed multiples of 1/8 in [-1, 1]."""
    angles = np.arange(int(np.prod(shape))) * 2.4 + seed
    return (np.round(np.sin(angles) * 8) / 8).reshape(shape).astype(np.float32)


TABLE = weights(1, NUM_TOKENS, WIDTH)
LAYERS = [weights(10 + k, WIDTH, WIDTH) for k in range(NUM_SEGMENTS)]
HEADS = [weights(20 + k, WIDTH, NUM_CLASSES) for k in range(NUM_SEGMENTS)]


def reference_logits(inputs: Inputs, exit_index: int) -> NDArray[np.float32]:
    """What exit `exit_index` says, (N, C)."""
    hidden = TABLE[inputs["ids"]]  # (N, T, D)
    for layer in LAYERS[: exit_index + 1]:
        hidden = np.maximum(hidden @ layer, np.float32(0))
    keep = inputs["mask"].astype(np.float32)[:, None]  # (N, 1, T)
    logits: NDArray[np.float32] = (keep @ hidden)[:, 0] @ HEADS[exit_index]
    return logits


def segment_graph(index: int, precision: str) -> onnx.ModelProto:
    """Segment `index` as ONNX, following the segment contract."""
    carries = f"float[rows, sequence, {WIDTH}] carry_out_0, float[rows, 1, sequence] carry_out_1, "
    outputs = (
        f"float[rows, {NUM_CLASSES}] logits, int64[rows] prediction, float[rows, 3] scores, float inverse_temperature"
    )
    if index:
        before = f"float[previous_rows, sequence, {WIDTH}] carry_in_0, float[previous_rows, 1, sequence] carry_in_1"
        inputs = f"int64[rows] rows, {before}"
        start = "before = Gather (carry_in_0, rows) keep = Gather (carry_in_1, rows)"
    else:
        inputs = "int64[rows, sequence] ids, int64[rows, sequence] mask"
        start = "before = Gather (table, ids) flags = Cast <to = 1> (mask) keep = Unsqueeze (flags, axis_1)"
    outputs, temperature = outputs.rsplit(", ", 1)
    is_last = index == NUM_SEGMENTS - 1
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    segment ({inputs}, {temperature}) => ({"" if is_last else carries}{outputs}) {{
        {start} {_LAYER[precision]}
        hidden = Relu (product)
        {"" if is_last else "carry_out_0 = Identity (hidden) carry_out_1 = Identity (keep)"}
        {_HEAD}
    }}"""
    return _with_constants(onnx.parser.parse_model(text), index, precision)


def _with_constants(model: onnx.ModelProto, index: int, precision: str) -> onnx.ModelProto:
    arrays = {
        "weight": LAYERS[index].astype(np.float16 if precision == "fp16" else np.float32),
        "head": HEADS[index],
        "table": TABLE,
        "axis_1": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "entropy_scale": np.array(-1 / np.log(NUM_CLASSES), np.float32),
    }
    if index:
        del arrays["table"]
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def make_bundle(
    bundle: Path,
    policy: Policy | None = None,
    edit: Edit = lambda model, index: model,
    tokenizer: bytes = b"",
) -> Manifest:
    """Write the tiny model as a bundle; `edit` may spoil a graph before it is hashed."""
    segments = []
    for index in range(NUM_SEGMENTS):
        graphs = {}
        for precision in ("fp32", "fp16"):
            path = f"segments/{index:02d}/{'model' if precision == 'fp32' else 'model.fp16'}.onnx"
            graphs[precision] = _store(bundle, path, edit(segment_graph(index, precision), index).SerializeToString())
        segments.append(
            SegmentSpec(
                index,
                () if index else tuple(spec.name for spec in INPUTS),
                CARRY if index else (),
                _renamed(CARRY) if index < NUM_SEGMENTS - 1 else (),
                graphs,
            )
        )
    manifest = Manifest(
        name="tiny",
        inputs=INPUTS,
        dimensions={"rows": DimensionSpec(1, MAX_ROWS), "sequence": DimensionSpec(1, MAX_LENGTH)},
        exits=tuple(ExitSpec(f"exit_{k}", NUM_CLASSES) for k in range(NUM_SEGMENTS)),
        segments=tuple(segments),
        policy=PolicyRecord(_store(bundle, "policy.json", (policy or Policy()).to_json().encode()).sha256),
        reference_sha256="0" * 64,
    )
    if tokenizer:
        record = _store(bundle, "tokenizer.json", tokenizer)
        manifest = replace(manifest, text=TextSpec(record, MAX_LENGTH, "ids", "mask"))
    save_manifest(bundle, manifest)
    return manifest


def request(token_lists: Sequence[Sequence[int]], width: int = 0) -> Inputs:
    """Token lists as inputs, padded to the longest, or to `width` where that is more."""
    width = max([width, 1, *map(len, token_lists)])
    ids, mask = np.zeros((2, len(token_lists), width), np.int64)
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"ids": ids, "mask": mask}


def sentences(num_rows: int) -> list[list[int]]:
    """Fixed token lists of many lengths and contents."""
    return [
        [(7 * row + 3 * place + row * place) % NUM_TOKENS for place in range(1 + (row * 5) % 7)]
        for row in range(num_rows)
    ]


def _renamed(carry: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(tensor, name=tensor.name.replace("in", "out")) for tensor in carry)


def _store(bundle: Path, path: str, content: bytes) -> FileRecord:
    (bundle / path).parent.mkdir(parents=True, exist_ok=True)
    (bundle / path).write_bytes(content)
    return file_record(path, content)


def assert_same(left: Any, right: Any) -> None:
    """Both Results are the same, bit for bit."""
    np.testing.assert_array_equal(left.outputs["logits"], right.outputs["logits"], strict=True)
    for name in ("prediction", "exit_index", "score"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), strict=True)
    assert left.reason == right.reason
