"""An engine without a model, for the tests of whoever embeds a runner: scripted answers, recorded calls.

runner = fake_runner([0.6, 0.95], Policy.thresholds("max_prob", [0.9]))
result = runner.run({"x": np.zeros(3, np.float32)})
assert result.exit_index.tolist() == [1, 1, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.bundle import (
    LEARNED,
    RETENTION,
    ROW_OUTPUTS,
    ROWS,
    DimensionSpec,
    ExitSpec,
    InputSpec,
    Manifest,
    PolicyRecord,
    SegmentSpec,
)
from offramp.errors import BackendError, OptionError
from offramp.policy import Policy
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.runner import Runner
from offramp.scores import scores_from_logits

X = InputSpec("x", "float32", (ROWS,), None, None, False)  # one number per row: the input of a fake model
MAX_ROWS = 64  # of a fake bundle

Answer = Callable[[dict[str, NDArray[Any]]], ArrayLike]  # inputs of the S rows that are here -> logits (S, C)


@dataclass(frozen=True, slots=True)
class FakeCall:
    """One call of FakeEngine.run."""

    rows: NDArray[np.int64]  # (S,)
    inverse_temperature: float


class FakeEngine:
    """A segment whose exit says what `answer` says; what it carries are the model's inputs themselves.

    `calls` holds what it was asked, in order; `is_closed` whether `close` was called.
    """

    keeps_carries = True

    def __init__(self, answer: Answer, learned: Answer | None = None, retention: Answer | None = None) -> None:
        """`learned` and `retention` give those numbers (S,) of the rows, for an exit that has them."""
        self._answer = answer
        self._row_outputs = {LEARNED: learned, RETENTION: retention}
        self.calls: list[FakeCall] = []
        self.is_closed = False

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        """See Engine.run. Raises OptionError unless `answer` gives finite logits (S, C), C >= 2, the others [0, 1]."""
        if self.is_closed:
            raise BackendError("running a fake segment: the engine is closed; make another")
        self.calls.append(FakeCall(rows, float(inverse_temperature)))
        inputs = {name: array[rows] for name, array in carry.items()}
        logits = np.asarray(self._answer(inputs), np.float32)
        fits = logits.ndim == 2 and len(logits) == len(rows) and logits.shape[1] >= 2
        if not fits or not np.isfinite(logits).all():
            raise OptionError(
                f"fake engine: its answer to {len(rows)} rows has shape {logits.shape}, expected finite "
                f"logits ({len(rows)}, classes), at least 2 classes"
            )
        scores = scores_from_logits(logits, inverse_temperature)
        others = [self._row_output(name, inputs, len(rows)) for name in ROW_OUTPUTS]
        return SegmentOutput(inputs, logits, logits.argmax(axis=1), scores, *others)

    def _row_output(self, name: str, inputs: dict[str, NDArray[Any]], num_rows: int) -> NDArray[np.float32] | None:
        told = self._row_outputs[name]
        if told is None:
            return None
        values = np.asarray(told(inputs), np.float32)
        if values.shape != (num_rows,) or not ((values >= 0) & (values <= 1)).all():
            raise OptionError(
                f"fake engine: its {name} of {num_rows} rows has shape {values.shape}, expected ({num_rows},) in [0, 1]"
            )
        return values

    def trimmed(self, carry: Any, dimension: str, size: int) -> Any:
        """See Engine.trimmed: what a fake segment carries is as wide as ever."""
        return carry

    def merged(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
        """See Engine.merged."""
        return {name: np.concatenate([carry[name][rows] for carry, rows in parts]) for name in parts[0][0]}

    def close(self) -> None:
        """See Engine.close."""
        self.is_closed = True


def fake_runner(
    answers: Sequence[float | Answer],
    policy: Policy = Policy(),  # noqa: B008  (frozen)
    inputs: tuple[InputSpec, ...] = (X,),
    num_classes: int = 2,
    learned: Sequence[float | Answer | None] = (),
    retention: Sequence[float | Answer | None] = (),
) -> Runner:
    """A runner over one FakeEngine per answer.

    An answer is a function from the inputs of the rows that are still here to logits, or a number: then
    every row is said to be of class 0 with that probability. `learned` and `retention` have, per exit, its learned
    confidences and shares of tokens in the same two ways, or None for an exit without; exits beyond the end have none.
    """
    name = inputs[0].name
    others = [[*told, *[None] * (len(answers) - len(told))] for told in (learned, retention)]
    engines = [
        FakeEngine(
            answer if callable(answer) else _always(logits_from_max_prob([answer], num_classes), name),
            *(value if callable(value) or value is None else _always([value], name) for value in told),
        )
        for answer, *told in zip(answers, *others, strict=True)
    ]
    has = [[value is not None for value in told] for told in others]
    return Runner(engines, fake_manifest(len(answers), num_classes, inputs, *has), policy)


def fake_manifest(
    num_segments: int,
    num_classes: int,
    inputs: tuple[InputSpec, ...],
    has_learned: Sequence[bool] = (),
    has_retention: Sequence[bool] = (),
) -> Manifest:
    """A manifest without files, for fake engines; the last two tell the exits that have these."""
    segments = tuple(
        SegmentSpec(k, () if k else tuple(spec.name for spec in inputs), (), (), {}) for k in range(num_segments)
    )
    others = [
        [f"{name}_{k}" if k < len(has) and has[k] else "" for k in range(num_segments)]
        for name, has in ((LEARNED, has_learned), (RETENTION, has_retention))
    ]
    exits = tuple(ExitSpec(f"exit_{k}", num_classes, *told) for k, told in enumerate(zip(*others, strict=True)))
    dimensions = {ROWS: DimensionSpec(1, MAX_ROWS)}
    return Manifest("fake", inputs, dimensions, exits, segments, PolicyRecord(""), "")


def logits_from_max_prob(max_prob: ArrayLike, num_classes: int) -> NDArray[np.float32]:
    """Logits that give class 0 the probability max_prob (S,) and the others equal shares: (S, C)."""
    first = np.asarray(max_prob, np.float64)  # (S,)
    if not ((first >= 1 / num_classes) & (first < 1)).all():
        raise OptionError(
            f"fake engine: got max_prob {first.tolist()}, expected at least 1 / {num_classes} and below 1"
        )
    logits = np.log(np.repeat((1 - first)[:, None] / (num_classes - 1), num_classes, axis=1))
    logits[:, 0] = np.log(first)
    return logits.astype(np.float32)


def _always(answer: ArrayLike, name: str) -> Answer:
    """The same `answer` (1, …) for every row."""
    return lambda inputs: np.repeat(np.asarray(answer, np.float32), len(inputs[name]), axis=0)
