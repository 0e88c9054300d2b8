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
    ROWS,
    SCORES,
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

    def __init__(self, answer: Answer, learned: Answer | None = None) -> None:
        """`learned` gives the learned confidences (S,) of the rows, for an exit that has them."""
        self._answer = answer
        self._learned = learned
        self.calls: list[FakeCall] = []
        self.is_closed = False

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        """See Engine.run. Raises OptionError unless `answer` gives finite logits (S, C), C >= 2 (`learned`: [0, 1])."""
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
        return SegmentOutput(inputs, logits, logits.argmax(axis=1), scores, self._confidence(inputs, len(rows)))

    def _confidence(self, inputs: dict[str, NDArray[Any]], num_rows: int) -> NDArray[np.float32] | None:
        if self._learned is None:
            return None
        learned = np.asarray(self._learned(inputs), np.float32)
        if learned.shape != (num_rows,) or not ((learned >= 0) & (learned <= 1)).all():
            raise OptionError(
                f"fake engine: its learned confidences of {num_rows} rows have shape {learned.shape}, expected "
                f"({num_rows},) in [0, 1]"
            )
        return learned

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
) -> Runner:
    """A runner over one FakeEngine per answer.

    An answer is a function from the inputs of the rows that are still here to logits, or a number: then
    every row is said to be of class 0 with that probability. `learned` has, per exit, its learned confidences in the
    same two ways, or None for an exit without; exits beyond its end have none.
    """
    name, confidences = inputs[0].name, [*learned, *[None] * (len(answers) - len(learned))]
    engines = [
        FakeEngine(
            answer if callable(answer) else _always(logits_from_max_prob([answer], num_classes), name),
            confidence if callable(confidence) or confidence is None else _always([confidence], name),
        )
        for answer, confidence in zip(answers, confidences, strict=True)
    ]
    has_learned = [confidence is not None for confidence in confidences]
    return Runner(engines, fake_manifest(len(answers), num_classes, inputs, has_learned), policy)


def fake_manifest(
    num_segments: int, num_classes: int, inputs: tuple[InputSpec, ...], has_learned: Sequence[bool] = ()
) -> Manifest:
    """A manifest without files, for fake engines; `has_learned` tells the exits with a learned confidence."""
    segments = tuple(
        SegmentSpec(k, () if k else tuple(spec.name for spec in inputs), (), (), {}) for k in range(num_segments)
    )
    learned = [f"learned_{k}" if k < len(has_learned) and has_learned[k] else "" for k in range(num_segments)]
    exits = tuple(ExitSpec(f"exit_{k}", num_classes, learned[k]) for k in range(num_segments))
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


def scores_from_logits(logits: NDArray[np.float32], inverse_temperature: np.float32) -> NDArray[np.float32]:
    """What the score head of a segment computes: logits (S, C) -> (S, 3), see bundle.SCORES."""
    scaled = logits * inverse_temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    log_probability = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    probability = np.exp(log_probability)
    top = np.sort(probability, axis=1)[:, -2:]  # (S, 2) ascending
    scores = np.empty((len(logits), len(SCORES)), np.float32)
    scores[:, 0] = top[:, 1]
    scores[:, 1] = top[:, 1] - top[:, 0]
    scores[:, 2] = -(probability * log_probability).sum(axis=1) / np.log(logits.shape[1])
    return scores.clip(0, 1)


def _always(answer: ArrayLike, name: str) -> Answer:
    """The same `answer` (1, …) for every row."""
    return lambda inputs: np.repeat(np.asarray(answer, np.float32), len(inputs[name]), axis=0)
