"""Parity: does the chain of segments say what the whole graph says? Checked for everything, then judged.

Three questions, on real data: the FP32 chain against the whole graph with everybody on board; the same with rows
leaving at every boundary, each row then alone; and each lowering against FP32, segment by segment and end to end,
down to the predictions and exits that change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from offramp.bundle import RETENTION, ROW_OUTPUTS, SCORES, ExitSpec
from offramp.errors import CaptureError, ParityError
from offramp.export.chain import Arrays, Chain, open_session
from offramp.export.choices import with_same_choices
from offramp.export.row_outputs import WORDS


class Tolerance(NamedTuple):
    """What may differ: each value by atol + rtol |expected|, and all of a tensor by their RMS ÷ its RMS."""

    atol: float
    rtol: float
    rms: float = float("inf")


# The chain and the whole graph run the same operators; fusions of ONNX Runtime that see only one side of a cut
# may add in another order. docs/tolerances.md says how each of these was measured.
FP32_TOLERANCE = Tolerance(1e-5, 1e-5)
# A graph that is in FP16 already: ONNX Runtime computes it in FP32, and rounds at cuts where it would not otherwise.
HALF_TOLERANCE = Tolerance(2e-3, 2e-3)
# Rounding to 8 bits is noise on every value, so INT8 is judged by its size and by the decisions that change.
INT8_TOLERANCE = Tolerance(float("inf"), 0, rms=0.25)
_ROUNDING = 1e-3  # by which a row output may leave [0, 1]: a sum of FP16 probabilities; segments clip it
# A hidden state that nobody normalises may be large: FP16 rounds it by its own size, so `atol` is for values of about 1
# and grows with the RMS of a carried tensor, up to this. EfficientNet-Lite0's are 7 to 9.7 (docs/tolerances.md).
_LARGEST_CARRY = 16.0
DECISION_THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95)  # of max_prob, at which changed exits are counted


@dataclass
class Difference:
    """The worst absolute difference seen, how it compares with what is allowed, and where it was."""

    max_abs: float = 0.0
    rms: float = 0.0  # of a tensor's differences ÷ RMS of the tensor, the worst of any tensor
    allowed_ratio: float = 0.0  # of either to what is allowed, at most 1 when all is well
    where: str = ""

    def update(
        self,
        got: NDArray[np.generic],
        expected: NDArray[np.generic],
        tolerance: Tolerance,
        where: str,
    ) -> None:
        if not got.size:
            return
        left, right = got.astype(np.float64), expected.astype(np.float64)
        same = (left == right) | (np.isnan(left) & np.isnan(right))  # infinite masks are carried, too
        left, right = np.where(same, 0, left), np.where(same, 0, right)
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            self.max_abs = self.rms = self.allowed_ratio = float("inf")
            self.where = where
            return
        difference = np.abs(left - right)
        rms = relative_error([got], [expected])
        ratio = float((difference / (tolerance.atol + tolerance.rtol * np.abs(right))).max())
        ratio = max(ratio, rms / tolerance.rms)
        self.max_abs, self.rms = max(self.max_abs, float(difference.max())), max(self.rms, rms)
        if ratio > self.allowed_ratio:
            self.allowed_ratio, self.where = ratio, where


@dataclass
class Lowered:
    """What a lowering changes against FP32."""

    segments: list[Difference] = field(default_factory=list)
    chain: Difference = field(default_factory=Difference)
    predictions_changed: int = 0  # of rows x exits
    exits_changed: dict[str, int] = field(default_factory=dict)  # threshold -> rows
    weight_share: list[float] = field(default_factory=list)  # of each segment's weights, those that are lowered
    notes: list[dict[str, str]] = field(default_factory=list)  # per segment, what the lowering did out of the ordinary


@dataclass
class Parity:
    """What verification found; `failures` is empty when everything is within tolerance."""

    rows: int = 0
    chain: Difference = field(default_factory=Difference)
    chain_bit_equal: bool = True
    compacted: Difference = field(default_factory=Difference)
    compacted_bit_equal: bool = True
    lowered: dict[str, Lowered] = field(default_factory=dict)  # by precision
    trimming: dict[str, str] = field(default_factory=dict)  # precision -> what came of cutting off padding

    @property
    def is_bit_equal(self) -> bool:
        """Did all FP32 logits have the bits of the whole graph?"""
        return self.chain_bit_equal and self.compacted_bit_equal

    def figures(self) -> dict[str, Any]:
        """Everything as plain JSON values; those of a lowering begin with its name: fp16_chain, int8_chain."""
        figures = asdict(self)
        for precision, found in figures.pop("lowered").items():
            figures |= {f"{precision}_{name}": value for name, value in found.items()}
        return figures

    def failures(self) -> list[str]:
        """A line for everything beyond tolerance."""
        checks = [("chain against whole graph", self.chain), ("rows that go on alone", self.compacted)]
        for precision, lowered in self.lowered.items():
            checks += [(f"{precision.upper()} segment {index}", found) for index, found in enumerate(lowered.segments)]
            if precision == "int8":  # noise adds up from segment to segment
                checks.append(("INT8 end to end", lowered.chain))
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
                "a model that computes differently in another batch cannot be cut; for FP16 and INT8, calibrate on "
                "more data (`--calibration-data`), for FP16 widen `--atol`/`--rtol` knowingly, or use "
                "`--precision fp32`"
            )


def verify_fp32(
    parity: Parity, chain: Chain, whole: ModelProto, exits: Sequence[ExitSpec], batches: Iterable[Arrays]
) -> None:
    """Compare the FP32 chain with the whole graph on `batches`, at full depth and with rows leaving."""
    session = open_session(whole)
    is_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in whole.graph.initializer)
    tolerance = HALF_TOLERANCE if is_half else FP32_TOLERANCE
    for batch in batches:
        expected = _run_whole(session, exits, batch)
        outputs = [out for _, out in chain.run(batch)]
        parity.rows += len(outputs[0]["logits"])
        for spec, got, wanted in zip(exits, outputs, expected, strict=True):
            for name, value in wanted.items():
                parity.chain.update(got[name], value, tolerance, f"{name} of exit {spec.name}")
                parity.chain_bit_equal &= np.array_equal(got[name], value)
        _verify_compacted(parity, chain, batch, exits, expected, tolerance)


def verify_lowered(fp32: Chain, lowered: Chain, batches: Iterable[Arrays], tolerance: Tolerance) -> Lowered:
    """Compare lowered segments on inputs and choices of the FP32 chain, and the lowered chain end to end on its own."""
    found = Lowered([Difference() for _ in fp32.segments])
    found.exits_changed = {str(threshold): 0 for threshold in DECISION_THRESHOLDS}
    telling, taking, choices = with_same_choices(fp32, lowered)
    carried = [{spec.name for spec in segment.carry_out} for segment in fp32.segments]
    for batch in batches:
        reference = fp32.run(batch)
        for index, (feed, _) in enumerate(reference):
            expected = telling.run_segment(index, feed)
            given = {name: expected[name] for name in choices[index]}
            for name, value in taking.run_segment(index, {**feed, **given}).items():
                if name != "prediction":
                    allowed = carry_tolerance(tolerance, expected[name]) if name in carried[index] else tolerance
                    found.segments[index].update(value, expected[name], allowed, f"output {name}")
        answers = [out for _, out in lowered.run(batch)]
        wanted = [out for _, out in reference]
        for index, (out, other) in enumerate(zip(answers, wanted, strict=True)):
            for name in sorted(out.keys() & {"logits", *ROW_OUTPUTS}):
                found.chain.update(out[name], other[name], tolerance, f"{name} of exit {index}")
            found.predictions_changed += int((out["prediction"] != other["prediction"]).sum())
        for threshold in DECISION_THRESHOLDS:
            changed = _exit_indices(answers, threshold) != _exit_indices(wanted, threshold)
            found.exits_changed[str(threshold)] += int(changed.sum())
    return found


def carry_tolerance(tolerance: Tolerance, expected: NDArray[np.generic]) -> Tolerance:
    """`tolerance` for a carried tensor: `atol` times its RMS where that is between 1 and _LARGEST_CARRY."""
    if not expected.size or not np.issubdtype(expected.dtype, np.floating):
        return tolerance
    rms = float(np.sqrt(np.square(expected.astype(np.float64)).mean()))
    return tolerance._replace(atol=tolerance.atol * min(max(1.0, rms), _LARGEST_CARRY))


def relative_error(got: Sequence[NDArray[np.generic]], expected: Sequence[NDArray[np.generic]]) -> float:
    """RMS of the difference ÷ RMS of `expected`, both over several arrays; infinities that are equal do not count."""
    differences = values = 0.0
    for left, right in zip(got, expected, strict=True):
        is_same = left == right
        wide = np.where(np.isfinite(right) | ~is_same, right, 0).astype(np.float64)
        differences += float(np.square(np.where(is_same, wide, left) - wide).sum())
        values += float(np.square(wide).sum())
    return float(np.sqrt(differences / values)) if values else float(differences > 0)


def _run_whole(session: ort.InferenceSession, exits: Sequence[ExitSpec], batch: Arrays) -> list[Arrays]:
    """What the whole graph says at every exit, as the outputs of a segment. Raises ParityError or CaptureError."""
    said: list[Arrays] = []
    for spec in exits:
        values = session.run([spec.name, *spec.row_outputs.values()], batch)
        if not all(np.isfinite(value).all() for value in values):
            raise ParityError(
                f"exit {spec.name} of the whole graph is NaN or infinite on the example data; look for a row without a "
                f"token or a value out of range, and pass data that the model is made for"
            )
        out: Arrays = {"logits": values[0].astype(np.float32)}
        for kind, value in zip(spec.row_outputs, values[1:], strict=True):
            out[kind] = _row_output(spec, kind, value.astype(np.float32))
        said.append(out)
    return said


def _row_output(spec: ExitSpec, kind: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    """The row output `kind`, (N,) or (N, 1), as a segment puts it out, (N,)."""
    is_low = value.size and (value.min() <= 0 if kind == RETENTION else value.min() < -_ROUNDING)
    if value.size and (is_low or value.max() > 1 + _ROUNDING):
        called, expected = WORDS[kind]
        raise CaptureError(
            f"{called} {spec.row_outputs[kind]} of exit {spec.name} is {value.min():.3g} to {value.max():.3g} on the "
            f"example data; expected {expected}"
        )
    return np.clip(value.reshape(-1), np.float32(0), np.float32(1))


def _verify_compacted(
    parity: Parity,
    chain: Chain,
    batch: Arrays,
    exits: Sequence[ExitSpec],
    expected: Sequence[Arrays],
    tolerance: Tolerance,
) -> None:
    """Every second survivor leaves at every boundary, in reverse order: the rest must not notice."""
    live = np.arange(len(expected[0]["logits"]))
    order: list[NDArray[np.int64]] = [live]

    def every_second(_: int, out: Arrays) -> NDArray[np.int64]:
        rows = np.arange(len(out["prediction"]))[::-2].copy()
        order.append(order[-1][rows])
        return rows

    for (_, out), spec, wanted, rows in zip(chain.run(batch, every_second), exits, expected, order, strict=True):
        for name, value in wanted.items():
            where = f"{name} of exit {spec.name} with {len(rows)} of {len(live)} rows"
            parity.compacted.update(out[name], value[rows], tolerance, where)
            parity.compacted_bit_equal &= np.array_equal(out[name], value[rows])


def _exit_indices(outputs: Sequence[Arrays], threshold: float) -> NDArray[np.int64]:
    """The first exit of each row whose max_prob reaches `threshold`; the last one where none does."""
    scores = [out["scores"].astype(np.float32)[:, SCORES.index("max_prob")] for out in outputs]
    sure = np.stack(scores, axis=1) >= threshold
    sure[:, -1] = True
    return np.asarray(sure.argmax(axis=1), np.int64)
