"""Capture: from a torch model to one ONNX graph with all exits as outputs.

A model is any `nn.Module` whose forward returns the logits of its exits in order, the final exit last.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir.passes.common
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from offramp.bundle import ROWS, DimensionSpec
from offramp.errors import CaptureError, OptionError

DEFAULT_OPSET = 20  # from 23 on, torch writes Attention: ONNX Runtime's CPU provider refuses its masks
MAX_ROWS = 32  # default upper end of the row axis; larger batches run in chunks


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
        unknown = [name for name in self.dynamic if name not in self.inputs]
        if not self.inputs or unknown:
            raise OptionError(
                f"example: dynamic names {', '.join(unknown) or 'nothing'}, inputs are "
                f"{', '.join(self.inputs) or '(none)'}"
            )
        counts = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in self.inputs.items()}
        if len(set(counts.values())) != 1 or min(counts.values()) < 2:
            raise OptionError(
                f"example: got {counts} rows; expected the same number everywhere, at least 2 (torch.export takes "
                f"a single row for a constant)"
            )
        symbols = {symbol for axes in self.dynamic.values() for symbol in axes.values()}
        if missing := sorted(symbols - self.ranges.keys()):
            raise OptionError(f"example: dimension {', '.join(missing)} has no range; add it to `ranges`")

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.inputs.items()}

    def dimensions(self) -> dict[str, DimensionSpec]:
        """Ranges of all symbolic dimensions, the row axis included."""
        found = {symbol: DimensionSpec(low, high) for symbol, (low, high) in self.ranges.items()}
        return found | {ROWS: DimensionSpec(1, self.max_rows)}


def graph_from_model(model: nn.Module, example: Example, opset: int = DEFAULT_OPSET) -> ModelProto:
    """Export `model` whole, all exits as outputs `logits_1` … `logits_E`, with dynamic rows.

    The same model gives the same bytes. Raises CaptureError when torch cannot export it, or when it returns
    something else than one tensor of logits per exit.
    """
    was_training = model.training
    model.eval()
    try:
        num_exits = _count_exits(model, example)
        names = [f"logits_{position + 1}" for position in range(num_exits)]
        program = _exported(model, example, names, opset)
    finally:
        model.train(was_training)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # source paths and code lines
    return program.model_proto


def _exported(model: nn.Module, example: Example, names: list[str], opset: int) -> torch.onnx.ONNXProgram:
    shapes = {name: {0: ROWS, **example.dynamic.get(name, {})} for name in example.inputs}
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                model,
                kwargs=dict(example.inputs),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=list(example.inputs),
                output_names=names,
                external_data=False,
            )
    except Exception as exc:  # torch raises many classes here; all mean the same to the caller
        raise CaptureError(f"capturing {type(model).__name__}: torch.onnx.export failed: {exc}") from exc
    if program is None:
        raise CaptureError(f"capturing {type(model).__name__}: torch.onnx.export returned nothing")
    return program


def _count_exits(model: nn.Module, example: Example) -> int:
    rows = next(iter(example.inputs.values())).shape[0]
    try:
        with torch.no_grad():
            outputs = model(**example.inputs)
    except Exception as exc:
        raise CaptureError(f"running {type(model).__name__} on its example inputs: {exc}") from exc
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(value, Tensor) for value in outputs):
        raise CaptureError(
            f"{type(model).__name__}.forward returned {type(outputs).__name__}; expected a tuple with one tensor of "
            f"logits (rows, classes) per exit, the final exit last"
        )
    for position, logits in enumerate(outputs):
        if logits.ndim != 2 or logits.shape[0] != rows:
            raise CaptureError(
                f"exit {position + 1} of {type(model).__name__} is {tuple(logits.shape)} for {rows} rows; expected "
                f"({rows}, classes)"
            )
    return len(outputs)


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
