"""Parity: does the chain of segments say what the whole graph says? Checked for everything, then judged.

Three questions, on real data: the FP32 chain against the whole graph with everybody on board; the same with rows
leaving at every boundary, each row then alone; and each lowering against FP32, segment by segment and end to end,
down to the predictions and exits that change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from offramp.bundle import SCORES
from offramp.errors import ParityError
from offramp.export.chain import Arrays, Chain, open_session

# The chain and the whole graph run the same operators; fusions of ONNX Runtime that see only one side of a cut
# may add in another order. docs/tolerances.md says how each of these was measured.
FP32_TOLERANCE = (1e-5, 1e-5)
# A graph that is in FP16 already: ONNX Runtime computes it in FP32, and rounds at cuts where it would not otherwise.
HALF_TOLERANCE = (2e-3, 2e-3)
DECISION_THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95)  # of max_prob, at which changed exits are counted


@dataclass
class Difference:
    """The worst absolute difference seen, how it compares with what is allowed, and where it was."""

    max_abs: float = 0.0
    allowed_ratio: float = 0.0  # |a - b| / (atol + rtol |b|), at most 1 when all is well
    where: str = ""

    def update(
        self,
        got: NDArray[np.generic],
        expected: NDArray[np.generic],
        tolerance: tuple[float, float],
        where: str,
    ) -> None:
        if not got.size:
            return
        left, right = got.astype(np.float64), expected.astype(np.float64)
        same = (left == right) | (np.isnan(left) & np.isnan(right))  # infinite masks are carried, too
        left, right = np.where(same, 0, left), np.where(same, 0, right)
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            self.max_abs = self.allowed_ratio = float("inf")
            self.where = where
            return
        difference = np.abs(left - right)
        ratio = float((difference / (tolerance[0] + tolerance[1] * np.abs(right))).max())
        self.max_abs = max(self.max_abs, float(difference.max()))
        if ratio > self.allowed_ratio:
            self.allowed_ratio, self.where = ratio, where


@dataclass
class Parity:
    """What verification found; `failures` is empty when everything is within tolerance."""

    rows: int = 0
    chain: Difference = field(default_factory=Difference)
    chain_bit_equal: bool = True
    compacted: Difference = field(default_factory=Difference)
    compacted_bit_equal: bool = True
    fp16_segments: list[Difference] = field(default_factory=list)
    fp16_chain: Difference = field(default_factory=Difference)
    fp16_predictions_changed: int = 0  # of rows x exits
    fp16_exits_changed: dict[str, int] = field(default_factory=dict)  # threshold -> rows
    fp16_weight_share: list[float] = field(default_factory=list)

    @property
    def is_bit_equal(self) -> bool:
        """Did all FP32 logits have the bits of the whole graph?"""
        return self.chain_bit_equal and self.compacted_bit_equal

    def figures(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    def failures(self) -> list[str]:
        """A line for everything beyond tolerance."""
        checks = [("chain against whole graph", self.chain), ("rows that go on alone", self.compacted)]
        checks += [(f"FP16 segment {index}", found) for index, found in enumerate(self.fp16_segments)]
        return [
            f"{name}: {found.where} differs by up to {found.max_abs:.3g}, {found.allowed_ratio:.3g} x the tolerance"
            for name, found in checks
            if found.allowed_ratio > 1
        ]

    def check(self) -> None:
        """Raise ParityError with all failures."""
        if failures := self.failures():
            raise ParityError(
                "verification failed:\n  " + "\n  ".join(failures) + "\n"
                "a model that computes differently in another batch cannot be cut; for FP16, calibrate on more data "
                "(`--calibration-data`), widen `--atol`/`--rtol` knowingly, or use `--precision fp32`"
            )


def verify_fp32(
    parity: Parity, chain: Chain, whole: ModelProto, exits: Sequence[str], batches: Iterable[Arrays]
) -> None:
    """Compare the FP32 chain with the whole graph on `batches`, at full depth and with rows leaving."""
    session = open_session(whole)
    is_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in whole.graph.initializer)
    tolerance = HALF_TOLERANCE if is_half else FP32_TOLERANCE
    for batch in batches:
        expected = _run_whole(session, exits, batch)
        for name, wanted in zip(exits, expected, strict=True):
            if not np.isfinite(wanted).all():
                raise ParityError(
                    f"exit {name} of the whole graph is NaN or infinite on the example data; look for a row without a "
                    f"token or a value out of range, and pass data that the model is made for"
                )
        logits = [out["logits"] for _, out in chain.run(batch)]
        parity.rows += len(logits[0])
        for name, got, wanted in zip(exits, logits, expected, strict=True):
            parity.chain.update(got, wanted, tolerance, f"exit {name}")
            parity.chain_bit_equal &= np.array_equal(got, wanted)
        _verify_compacted(parity, chain, batch, dict(zip(exits, expected, strict=True)), tolerance)


def verify_fp16(
    parity: Parity, fp32: Chain, fp16: Chain, batches: Iterable[Arrays], tolerance: tuple[float, float]
) -> None:
    """Compare FP16 segments on the FP32 chain's own inputs, and the FP16 chain end to end."""
    parity.fp16_segments = [Difference() for _ in fp32.segments]
    parity.fp16_exits_changed = {str(threshold): 0 for threshold in DECISION_THRESHOLDS}
    for batch in batches:
        reference = fp32.run(batch)
        for index, (feed, expected) in enumerate(reference):
            for name, value in fp16.run_segment(index, feed).items():
                if name != "prediction":
                    parity.fp16_segments[index].update(value, expected[name], tolerance, f"output {name}")
        lowered = [out for _, out in fp16.run(batch)]
        wanted = [out for _, out in reference]
        for out, other in zip(lowered, wanted, strict=True):
            parity.fp16_chain.update(out["logits"], other["logits"], tolerance, "logits")
            parity.fp16_predictions_changed += int((out["prediction"] != other["prediction"]).sum())
        for threshold in DECISION_THRESHOLDS:
            changed = _exit_indices(lowered, threshold) != _exit_indices(wanted, threshold)
            parity.fp16_exits_changed[str(threshold)] += int(changed.sum())


def _run_whole(session: ort.InferenceSession, exits: Sequence[str], batch: Arrays) -> list[NDArray[np.float32]]:
    return [logits.astype(np.float32) for logits in session.run(list(exits), batch)]


def _verify_compacted(
    parity: Parity,
    chain: Chain,
    batch: Arrays,
    expected: Mapping[str, NDArray[np.float32]],
    tolerance: tuple[float, float],
) -> None:
    """Every second survivor leaves at every boundary, in reverse order: the rest must not notice."""
    exits = list(expected)
    live = np.arange(len(expected[exits[0]]))
    order: list[NDArray[np.int64]] = [live]

    def every_second(_: int, out: Arrays) -> NDArray[np.int64]:
        rows = np.arange(len(out["prediction"]))[::-2].copy()
        order.append(order[-1][rows])
        return rows

    for index, (_, out) in enumerate(chain.run(batch, every_second)):
        wanted = expected[exits[index]][order[index]]
        where = f"exit {exits[index]} with {len(wanted)} of {len(live)} rows"
        parity.compacted.update(out["logits"], wanted, tolerance, where)
        parity.compacted_bit_equal &= np.array_equal(out["logits"], wanted)


def _exit_indices(outputs: Sequence[Arrays], threshold: float) -> NDArray[np.int64]:
    """The first exit of each row whose max_prob reaches `threshold`; the last one where none does."""
    scores = [out["scores"].astype(np.float32)[:, SCORES.index("max_prob")] for out in outputs]
    sure = np.stack(scores, axis=1) >= threshold
    sure[:, -1] = True
    return np.asarray(sure.argmax(axis=1), np.int64)
