"""Capture: from a torch model to one ONNX graph with all exits as outputs.

A model is any `nn.Module` whose forward returns what its exits say in order, the final exit last. An exit is a tensor
of logits, or a NamedTuple of `logits` and what it has to say beside them, per row: `learned`, the probability that
these logits are right, and `retention`, the share of the row's tokens that is left at this exit.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir.passes.common
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from offramp.bundle import PREVIOUS_ROWS, ROW_OUTPUTS, ROWS, DimensionSpec
from offramp.errors import CaptureError, OptionError
from offramp.export.chain import open_session
from offramp.export.row_outputs import WORDS
from offramp.export.sizes import nominal_size, probing_sizes, resize_inputs
from offramp.export.source import MASK_NAME, MAX_ROWS, input_specs

DEFAULT_OPSET = 20  # from 23 on, torch writes Attention: ONNX Runtime's CPU provider refuses its masks
LOGITS = "logits"  # outputs are called logits_1, learned_1, …: the exit's number follows, from 1
_COMPARED_SIZES = 3  # sizes at which model and graph are compared
_RTOL, _ATOL = 1e-2, 1e-2  # wide enough for FP16 weights; what tracing fixed is wrong altogether
_MAX_MESSAGE = 600
_DTYPES = frozenset(
    {
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.float32, torch.float64),
    }
)


@dataclass(frozen=True)
class Example:
    """What a model is shown when it is captured, and which of its dimensions may change.

    `inputs` maps the names of forward's arguments to tensors with the row axis first, real data if possible: they
    calibrate FP16 too. Axis 0 is always dynamic; `dynamic` names further dynamic axes, as in
    `{"input_ids": {1: "sequence"}}`, and `ranges` their closed ranges, as in `{"sequence": (1, 128)}`. `masks` are the
    inputs that are 0/1 masks with at least one 1 per row; an input called attention_mask is one anyway.
    """

    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    max_rows: int = MAX_ROWS
    masks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.inputs or not all(isinstance(tensor, Tensor) for tensor in self.inputs.values()):
            kinds = {name: type(tensor).__name__ for name, tensor in self.inputs.items()}
            raise OptionError(f"example: got inputs {kinds or '(none)'}; expected torch tensors by argument name")
        for name, tensor in self.inputs.items():
            if tensor.dtype not in _DTYPES:
                raise OptionError(f"example: input {name!r} is {tensor.dtype}, which ONNX Runtime or numpy cannot take")
        counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in self.inputs.items()}
        if len(set(counts.values())) != 1 or min(counts.values()) < 2:
            raise OptionError(
                f"example: got {counts} rows; expected the same number everywhere, at least 2 (torch.export takes "
                f"a single row for a constant)"
            )
        if unknown := sorted({*self.dynamic, *self.masks} - self.inputs.keys()):
            raise OptionError(
                f"example: dynamic or masks name {', '.join(unknown)}; inputs are {', '.join(self.inputs)}"
            )
        self._check_dimensions()

    def _check_dimensions(self) -> None:
        lengths: dict[str, int] = {}
        for name, axes in self.dynamic.items():
            for axis, symbol in axes.items():
                if not 0 < axis < self.inputs[name].ndim or symbol in (ROWS, PREVIOUS_ROWS):
                    raise OptionError(
                        f"example: dynamic axis {axis} of {name!r} is called {symbol!r}; expected an axis from 1 to "
                        f"{self.inputs[name].ndim - 1} (axis 0 holds the rows and is always dynamic) and another name "
                        f"than {ROWS!r} or {PREVIOUS_ROWS!r}"
                    )
                length = self.inputs[name].shape[axis]
                if lengths.setdefault(symbol, length) != length:
                    raise OptionError(f"example: dimension {symbol!r} is {lengths[symbol]} and, in {name!r}, {length}")
        if lengths.keys() != self.ranges.keys():
            raise OptionError(
                f"example: `dynamic` names dimensions {', '.join(sorted(lengths)) or '(none)'}, `ranges` has "
                f"{', '.join(sorted(self.ranges)) or '(none)'}; expected the same"
            )
        for symbol, (low, high) in ({ROWS: (1, self.max_rows)} | dict(self.ranges)).items():
            if not 1 <= low <= lengths.get(symbol, low) <= high:
                raise OptionError(
                    f"example: dimension {symbol!r} has range {low} to {high} and length {lengths.get(symbol)}; "
                    f"expected 1 <= low <= length <= high"
                )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.inputs.items()}

    def mask_names(self) -> tuple[str, ...]:
        return self.masks or tuple(name for name in self.inputs if name == MASK_NAME)

    def dimensions(self) -> dict[str, DimensionSpec]:
        """Ranges of all symbolic dimensions, the row axis included."""
        found = {symbol: DimensionSpec(low, high) for symbol, (low, high) in self.ranges.items()}
        return found | {ROWS: DimensionSpec(1, self.max_rows)}


def graph_from_model(model: nn.Module, example: Example, opset: int = DEFAULT_OPSET) -> ModelProto:
    """Export `model` whole, all exits as outputs `logits_1` … `logits_E`, with dynamic rows.

    After them come `learned_k` and `retention_k` of every exit k that has them. The same model gives the same bytes.
    Raises CaptureError when torch cannot export it, or when it returns something else than described above.
    """
    with _evaluating(model):
        exits = _example_exits(model, example)
        flat = model if all(isinstance(said, Tensor) for said in exits) else _Flat(model, tuple(example.inputs))
        program = _exported(flat, example, list(_named(exits)), opset)
        onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # source paths and code lines
        graph = program.model_proto
        _check_against_model(model, example, graph)
    return graph


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval(), and afterwards every part of it in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _exported(model: nn.Module, example: Example, names: list[str], opset: int) -> torch.onnx.ONNXProgram:
    shapes: Any = {name: {0: ROWS, **example.dynamic.get(name, {})} for name in example.inputs}
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"kwargs": dict(example.inputs)}
    exported = model
    if not parameters.keys() >= shapes.keys():  # torch.export gives inputs that land in **kwargs no dynamic axes
        exported = model if isinstance(model, _Flat) else _Flat(model, tuple(example.inputs))
        arguments, shapes = {"args": tuple(example.inputs.values())}, (tuple(shapes.values()),)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                exported,
                **arguments,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=list(example.inputs),
                output_names=names,
                external_data=False,
            )
    except Exception as exc:  # torch raises many classes here; all mean the same to the caller
        raise CaptureError(f"capturing {_kind(model)}: torch.onnx.export failed: {_in_short(exc)}") from exc
    if program is None:
        raise CaptureError(f"capturing {_kind(model)}: torch.onnx.export returned nothing")
    return program


class _Flat(nn.Module):
    """A model called with its inputs in order, which returns a flat tuple of tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.training = model.training

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_named(self.model(**dict(zip(self.names, inputs, strict=True)))).values())


def _kind(model: nn.Module) -> str:
    return type(model.model if isinstance(model, _Flat) else model).__name__


def _named(exits: Any) -> dict[str, Tensor]:
    """What forward returned under the names of the graph's outputs: all logits first, then what else there is."""
    logits = {f"{LOGITS}_{k}": said if isinstance(said, Tensor) else said.logits for k, said in enumerate(exits, 1)}
    others = {f"{kind}_{k}": getattr(said, kind, None) for kind in ROW_OUTPUTS for k, said in enumerate(exits, 1)}
    return logits | {name: tensor for name, tensor in others.items() if tensor is not None}


def _example_exits(model: nn.Module, example: Example) -> Any:
    """What the model's exits say about its example, checked."""
    rows = next(iter(example.inputs.values())).shape[0]
    try:
        with torch.no_grad():
            exits = model(**example.inputs)
    except Exception as exc:
        raise CaptureError(f"running {type(model).__name__} on its example inputs: {_in_short(exc)}") from exc
    # one exit's NamedTuple is itself a tuple of tensors
    if not isinstance(exits, (tuple, list)) or not exits or hasattr(exits, "logits") or not all(map(_is_exit, exits)):
        raise CaptureError(
            f"{type(model).__name__}.forward returned {_drawn(exits)}; expected a tuple with one tensor of "
            f"logits (rows, classes) per exit, the final exit last; or, per exit, a NamedTuple with the fields logits "
            f"and any of {', '.join(ROW_OUTPUTS)}"
        )
    for name, tensor in _named(exits).items():
        kind, _, number = name.partition("_")
        place = f"exit {number} of {type(model).__name__}"
        if kind == LOGITS and (tensor.ndim != 2 or tensor.shape[0] != rows):
            raise CaptureError(f"{place} is {tuple(tensor.shape)} for {rows} rows; expected ({rows}, classes)")
        if kind in ROW_OUTPUTS and tensor.shape not in ((rows,), (rows, 1)):
            raise CaptureError(
                f"{place}: its {WORDS[kind].called} is {tuple(tensor.shape)} for {rows} rows; expected ({rows},) or "
                f"({rows}, 1)"
            )
    return exits


def _is_exit(said: Any) -> bool:
    """Logits, or a NamedTuple of logits and perhaps ROW_OUTPUTS: what else it had would be lost in silence."""
    if isinstance(said, Tensor):
        return True
    fields = getattr(said, "_fields", ())
    if LOGITS not in fields or not {LOGITS, *ROW_OUTPUTS}.issuperset(fields):
        return False
    return isinstance(said.logits, Tensor) and all(
        isinstance(getattr(said, kind, None), (Tensor, type(None))) for kind in ROW_OUTPUTS
    )


def _drawn(exits: Any) -> str:
    """The kind of what forward returned, and what is in it where that is no tensor."""
    kinds = [type(said) for said in exits] if isinstance(exits, (tuple, list)) else []
    inside = [
        f"{kind.__name__}({', '.join(kind._fields)})" if hasattr(kind, "_fields") else kind.__name__
        for kind in kinds
        if kind is not Tensor
    ]
    return type(exits).__name__ + (f" of {', '.join(dict.fromkeys(inside))}" if inside else "")


def _check_against_model(model: nn.Module, example: Example, graph: ModelProto) -> None:
    """Raise CaptureError unless the graph says what the model says, at other sizes than the example's too."""
    inputs, dimensions, arrays = input_specs(graph, example.mask_names()), example.dimensions(), example.arrays()
    session = open_session(graph)
    for size in probing_sizes(nominal_size(inputs, dimensions, arrays), dimensions)[:_COMPARED_SIZES]:
        feed = resize_inputs(inputs, arrays, size)
        tensors = {name: torch.from_numpy(value).to(example.inputs[name].device) for name, value in feed.items()}
        try:
            with torch.no_grad():
                expected = {name: said.double().cpu().numpy() for name, said in _named(model(**tensors)).items()}
        except Exception:
            continue  # a length that the model itself refuses
        place = f"{type(model).__name__} at {', '.join(f'{symbol}={length}' for symbol, length in size.items())}"
        cure = "something in forward was fixed when it was traced; compute it from tensor shapes"
        try:
            got = session.run(list(expected), feed)
        except Exception as exc:
            raise CaptureError(f"{place}: the exported graph does not run ({exc}) and the model does; {cure}") from exc
        for (name, wanted), said in zip(expected.items(), got, strict=True):
            if said.shape != wanted.shape or not np.allclose(said, wanted, _RTOL, _ATOL, equal_nan=True):
                worst = np.abs(said - wanted).max() if said.shape == wanted.shape else said.shape
                raise CaptureError(f"{place}: {name} of the exported graph differs from the model ({worst}); {cure}")


def _in_short(exc: Exception) -> str:
    """What an exception of the exporter says, without colours, advice to its developers and stack traces."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(exc)).split("## Exception summary")[-1]
    text = re.split(r"\(Refer to the full stack trace|While executing %|For more information", text)[0].strip()
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} …"


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress prints and its internal deprecation warnings away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
