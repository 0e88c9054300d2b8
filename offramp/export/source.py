"""What export needs to know about a model, and how to learn it from a factory or an ONNX file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto, helper, inliner

from offramp.bundle import PREVIOUS_ROWS, ROW_OUTPUTS, ROWS, DimensionSpec, InputSpec
from offramp.errors import CaptureError, CutError, OptionError
from offramp.export.chain import Arrays
from offramp.export.graph import GraphView
from offramp.export.row_outputs import RowOutputs, row_outputs_from_names

if TYPE_CHECKING:
    from offramp.export.capture import Example

MASK_NAME = "attention_mask"  # what transformers calls the input that tells tokens from padding
NOMINAL_LENGTH = 64  # of dynamic dimensions when a graph comes without example data
NOMINAL_RANGE = DimensionSpec(1, 512)
MAX_ROWS = 32  # default upper end of the row axis; larger batches run in chunks
_NOMINAL_ROWS = 8
_INPUT_DTYPES = frozenset(
    {"bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
)


@dataclass(frozen=True)
class TextSource:
    """The tokenizer that goes into the bundle, as the bytes of a tokenizer.json."""

    tokenizer: bytes
    max_length: int
    ids: str = "input_ids"
    mask: str = MASK_NAME


@dataclass(frozen=True)
class ModelSource:
    """One graph with several exits, its interface, and real inputs to look at it with."""

    name: str
    graph: ModelProto
    exits: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    dimensions: Mapping[str, DimensionSpec]
    example: Arrays  # what the graph is probed with
    calibration: tuple[Arrays, ...]  # batches that calibrate FP16 and verify the bundle
    labels: tuple[str, ...] = ()
    text: TextSource | None = None
    row_outputs: RowOutputs = field(default_factory=dict)  # of the exits that have some
    late: tuple[str, ...] = ()  # inputs given to the segments that read them, never carried (export/roles.py)


def source_from_model(name: str, model: Any, example: Example, opset: int, exits: Sequence[str] = ()) -> ModelSource:
    """Capture an `nn.Module`; `exits` chooses some of logits_1 … logits_E, all of them when empty.

    Raises CaptureError.
    """
    from offramp.export.capture import LOGITS, graph_from_model

    graph = graph_from_model(model, example, opset)
    outputs = [value.name for value in graph.graph.output]
    names = tuple(exits) or tuple(name for name in outputs if name.startswith(f"{LOGITS}_"))
    others = {kind: [name.replace(f"{LOGITS}_", f"{kind}_") for name in names] for kind in ROW_OUTPUTS}
    present = {
        kind: [other if other in {*outputs} - {*names} else "-" for other in listed] for kind, listed in others.items()
    }
    return ModelSource(
        name=name,
        graph=graph,
        exits=names,
        inputs=input_specs(graph, example.mask_names()),
        dimensions=example.dimensions(),
        example=example.arrays(),
        calibration=(example.arrays(),),
        row_outputs=row_outputs_from_names(names, present),
    )


def source_from_factory(spec: str, opset: int, exits: Sequence[str] = ()) -> ModelSource:
    """Capture what `package.module:factory` returns: a pair of an `nn.Module` and an `Example`.

    Modules are looked up from the current directory too. Raises OptionError for a wrong name or return value.
    """
    from offramp.export.capture import Example

    module_name, _, factory_name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise OptionError(f"finding the model {spec!r}: {exc}; expected package.module:factory") from exc
    finally:
        sys.path.remove("")
    result = factory() if callable(factory) else None
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Example)):
        raise OptionError(
            f"{spec} returned {type(result).__name__}; expected a pair (nn.Module, offramp.export.capture.Example)"
        )
    return source_from_model(factory_name, result[0], result[1], opset, exits)


def source_from_onnx(
    path: Path,
    exits: Sequence[str],
    dimensions: Mapping[str, DimensionSpec],
    example: Arrays,
    row_outputs: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> ModelSource:
    """Read a multi-exit graph made elsewhere; axis 0 of every input must be its row axis.

    `row_outputs` names what the exits put out beside their logits, per kind in the order of the exits:
    {"learned": ["conf_1", "conf_2"]}; "-" for an exit without, and where a list is shorter the last exits have none.
    `dimensions` gives ranges of named dimensions (1 to 512 where it does not). Without `example` data, inputs are
    made up within their ranges, which is enough to cut but calibrates FP16 poorly. Raises OptionError or CutError.
    """
    if not exits:
        raise OptionError(f"{path}: pass `--exits logits_1,logits_2,…`, the outputs that are exits, in order of depth")
    for kind, listed in row_outputs.items():
        if len(listed) > len(exits):
            raise OptionError(
                f"{path}: got {len(listed)} outputs for --{kind} and {len(exits)} exits; expected one per exit, in "
                f"order of depth, and - for an exit without one"
            )
    try:
        graph = onnx.load(path)
        onnx.checker.check_model(graph)
    except Exception as exc:  # protobuf, onnx and the file system each raise their own
        raise CutError(f"reading {path}: {exc}; expected a valid ONNX model") from exc
    graph = inliner.inline_local_functions(graph) if graph.functions else graph
    graph = _with_named_rows(graph)
    inputs = input_specs(graph, [name for name in GraphView(graph).input_names if name == MASK_NAME])
    named = [symbol for spec in inputs for symbol in spec.shape if isinstance(symbol, str) and symbol != ROWS]
    ranges = {symbol: dimensions.get(symbol, NOMINAL_RANGE) for symbol in named}
    if unknown := sorted(dimensions.keys() - ranges.keys()):
        raise OptionError(
            f"{path} has no dimension {', '.join(unknown)} beside the rows; its dimensions are "
            f"{', '.join(ranges) or '(none)'}"
        )
    example = example or made_up_inputs(inputs, ranges)
    _check_example(inputs, example)
    return ModelSource(
        name=path.stem,
        graph=graph,
        exits=tuple(exits),
        inputs=inputs,
        dimensions=ranges | {ROWS: DimensionSpec(1, MAX_ROWS)},
        example=example,
        calibration=(example,),
        row_outputs=row_outputs_from_names(exits, row_outputs),
    )


def input_specs(graph: ModelProto, masks: Sequence[str]) -> tuple[InputSpec, ...]:
    """The model's inputs; the legal range of an integer input is read off the tables that it indexes."""
    view = GraphView(graph)
    specs = []
    for value in graph.graph.input:
        if value.name in view.initializers:
            continue
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "nothing"
        if dtype not in _INPUT_DTYPES:
            raise CaptureError(
                f"input {value.name!r} holds {dtype}; expected numbers or bool: "
                f"{', '.join(sorted(_INPUT_DTYPES))}; do the conversion before the model"
            )
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        is_mask = value.name in masks
        limit = 2 if is_mask else _table_size(view, value.name)
        specs.append(InputSpec(value.name, dtype, shape, None if limit is None else 0, limit and limit - 1, is_mask))
    return tuple(specs)


def made_up_inputs(inputs: Sequence[InputSpec], dimensions: Mapping[str, DimensionSpec]) -> Arrays:
    """Inputs within their ranges, the same every time: what to show a graph that comes without data."""
    random = np.random.default_rng(0)
    arrays: Arrays = {}
    for spec in inputs:
        lengths = {symbol: min(max(NOMINAL_LENGTH, limits.min), limits.max) for symbol, limits in dimensions.items()}
        lengths[ROWS] = _NOMINAL_ROWS
        shape = tuple(lengths[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        if spec.is_mask:
            arrays[spec.name] = np.ones(shape, spec.dtype)
        elif np.dtype(spec.dtype).kind in "iu":
            arrays[spec.name] = random.integers(0, (spec.maximum or 1) + 1, shape).astype(spec.dtype)
        else:
            arrays[spec.name] = random.standard_normal(shape).astype(spec.dtype)
    return arrays


def _table_size(view: GraphView, name: str) -> int | None:
    """Rows of the smallest constant table that the input indexes, directly or through casts and reshapes."""
    sizes, aliases = [], {name}
    for node in view.nodes:
        if (
            node.op_type in ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten")
            and node.input[0] in aliases
        ):
            aliases.update(node.output)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if node.op_type == "Gather" and node.input[1] in aliases and (table := view.initializers.get(node.input[0])):
            sizes.append(table.dims[axis])
    return min(sizes, default=None)


def _check_example(inputs: Sequence[InputSpec], example: Arrays) -> None:
    """Raise OptionError unless `example` has the graph's inputs in their dtypes and shapes."""
    if example.keys() != {spec.name for spec in inputs}:
        raise OptionError(
            f"example data: got {', '.join(sorted(example)) or 'nothing'}; expected "
            f"{', '.join(spec.name for spec in inputs)}"
        )
    sizes: dict[str, int] = {}
    for spec in inputs:
        value = example[spec.name]
        drawn = f"{spec.dtype} ({', '.join(map(str, spec.shape))})"
        fits = value.dtype.name == spec.dtype and value.ndim == len(spec.shape) and value.size > 0
        for length, dimension in zip(value.shape, spec.shape, strict=False):
            fits &= length == (sizes.setdefault(dimension, length) if isinstance(dimension, str) else dimension)
        if not fits:
            raise OptionError(f"example data: input {spec.name!r} is {value.dtype} {value.shape}; expected {drawn}")


def _with_named_rows(graph: ModelProto) -> ModelProto:
    """A copy in which the first dimension of every input, whatever its name, is called `rows`, and no other is."""
    named = ModelProto()
    named.CopyFrom(graph)
    initializers = {tensor.name for tensor in named.graph.initializer}
    inputs = [value for value in named.graph.input if value.name not in initializers]
    renamed = _row_aliases(inputs)
    for value in inputs:
        for position, dim in enumerate(value.type.tensor_type.shape.dim):
            fallback = f"{value.name}_{position}"
            if position and dim.dim_param in (ROWS, PREVIOUS_ROWS):
                renamed.setdefault(dim.dim_param, fallback)
            elif position and not dim.dim_param and not dim.HasField("dim_value"):
                dim.dim_param = fallback
            elif not position:
                dim.dim_param = dim.dim_param or ROWS
    for values in (inputs, named.graph.output, named.graph.value_info):
        for value in values:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in renamed:
                    dim.dim_param = renamed[dim.dim_param]
    return named


def _row_aliases(inputs: Sequence[ValueInfoProto]) -> dict[str, str]:
    """The names of the inputs' first dimensions -> `rows`. Raises CaptureError unless axis 0 holds the rows."""
    aliases: dict[str, str] = {}
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].HasField("dim_value"):
            got = "no dimensions" if not dims else f"a first dimension fixed at {dims[0].dim_value}"
            raise CaptureError(
                f"input {value.name!r} has {got}; axis 0 of every input must be the row axis and dynamic: export the "
                f"model again with a dynamic batch"
            )
        aliases |= {dims[0].dim_param: ROWS} if dims[0].dim_param else {}
    for value in inputs:
        for position, dim in enumerate(value.type.tensor_type.shape.dim):
            if position and dim.dim_param in aliases:
                raise CaptureError(
                    f"dimension {dim.dim_param!r} is axis {position} of input {value.name!r} and axis 0 of another; "
                    f"axis 0 of every input must be the row axis: transpose the input before the model"
                )
    return aliases
