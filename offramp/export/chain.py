"""Run segment graphs one after another on ONNX Runtime's CPU provider: the export's own, obvious reference.

It knows nothing of the runtime's runner, so that one can be checked against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from offramp.bundle import INVERSE_TEMPERATURE, ROWS, TensorSpec
from offramp.cpu import saturates_bytes
from offramp.errors import ParityError

Arrays = dict[str, NDArray[np.generic]]

# As the runtime opens them, so that bits can be compared: the first pass crashes on FP16 graphs in ONNX Runtime 1.31
# (microsoft/onnxruntime#26717), the second one makes them slower.
_DISABLED_OPTIMIZERS = ["FuseFp16InitializerToFp32NodeTransformer", "SkipLayerNormFusion"]


def open_session(model: ModelProto) -> ort.InferenceSession:
    """A CPU session for `model`, with idle threads that sleep. Raises ParityError when it does not load."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its errors come back as exceptions; here they would be said twice
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if saturates_bytes():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_DISABLED_OPTIMIZERS,
        )
    except Exception as exc:  # ONNX Runtime's exceptions have no common base of their own
        raise ParityError(f"ONNX Runtime does not load {model.graph.name}: {exc}") from exc


class Interface(Protocol):
    """What a segment is given, takes over and hands on: a cut Segment, or a SegmentSpec of a manifest."""

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def carry_in(self) -> tuple[TensorSpec, ...]: ...
    @property
    def carry_out(self) -> tuple[TensorSpec, ...]: ...


@dataclass(frozen=True)
class Chain:
    """Segment graphs of one precision, ready to run."""

    segments: Sequence[Interface]
    sessions: Sequence[ort.InferenceSession]
    models: Sequence[ModelProto]

    @classmethod
    def open(cls, segments: Sequence[Interface], models: Sequence[ModelProto]) -> Chain:
        return cls(segments, [open_session(model) for model in models], models)

    def run_segment(self, index: int, feed: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """All outputs of one segment at temperature 1, by name."""
        session = self.sessions[index]
        names = [output.name for output in session.get_outputs()]
        if any(given.name == INVERSE_TEMPERATURE for given in session.get_inputs()):
            feed = {**feed, INVERSE_TEMPERATURE: np.array(1, np.float32)}
        try:
            values = session.run(names, feed)
        except Exception as exc:
            raise ParityError(f"ONNX Runtime does not run segment {index}: {exc}; please report this model") from exc
        return dict(zip(names, values, strict=True))

    def feed(self, index: int, before: Arrays, rows: NDArray[np.int64]) -> Arrays:
        """Inputs of segment `index` >= 1 for the rows `rows` of what the segment before it put out."""
        handed = zip(self.segments[index].carry_in, self.segments[index - 1].carry_out, strict=True)
        return {ROWS: rows} | {inside.name: before[outside.name] for inside, outside in handed}

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        survivors: Callable[[int, Arrays], NDArray[np.int64]] = lambda _, out: np.arange(len(out["prediction"])),
    ) -> list[tuple[Arrays, Arrays]]:
        """(feed, outputs) of every segment; `survivors` chooses the positions that go on after each."""
        feed = {name: inputs[name] for name in self.segments[0].inputs}
        late = dict(inputs)
        done = []
        for index in range(len(self.sessions)):
            out = self.run_segment(index, feed)
            done.append((feed, out))
            if index + 1 < len(self.sessions):
                rows = survivors(index, out)
                late = {name: late[name][rows] for segment in self.segments[index + 1 :] for name in segment.inputs}
                feed = self.feed(index + 1, out, rows) | {name: late[name] for name in self.segments[index + 1].inputs}
        return done
