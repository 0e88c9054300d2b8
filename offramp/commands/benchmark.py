"""Measure a bundle against its alternatives, request by request, one row at a time, as a gateway would ask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Manifest
from offramp.commands.dataset import Inputs, load_dataset
from offramp.commands.uncut import load_reference, uncut_model
from offramp.export.export_bundle import reference_path
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.onnxruntime_engine import open_session
from offramp.runtime.timing import interleaved_ms, summary
from offramp.trace import UNKNOWN

Answer = Callable[[Inputs], int]  # one row in, its class out
_WARMUP = 20


@dataclass(frozen=True)
class Measured:
    """One alternative: time per request, and accuracy over the requests with a label (None without)."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    accuracy: float | None


def compare(
    alternatives: Mapping[str, Answer], requests: Sequence[Inputs], labels: NDArray[np.int64], num_requests: int
) -> dict[str, Measured]:
    """Time all alternatives on the same `num_requests` requests, interleaved; all requests count for accuracy."""
    answers = {name: np.full(len(requests), UNKNOWN) for name in alternatives}
    asking = {name: _asking(answer, requests, answers[name]) for name, answer in alternatives.items()}
    times_ms = interleaved_ms(asking, num_requests, _WARMUP)
    known = labels != UNKNOWN
    measured = {}
    for name, answer in alternatives.items():
        for row in np.flatnonzero(known & (answers[name] == UNKNOWN)).tolist():
            answers[name][row] = answer(requests[row])
        accuracy = float((answers[name] == labels)[known].mean()) if known.any() else None
        measured[name] = Measured(**summary(times_ms[name]), accuracy=accuracy)
    return measured


def _asking(answer: Answer, requests: Sequence[Inputs], answers: NDArray[np.int64]) -> Callable[[], None]:
    """A function that asks the next request, from the first again after the last, and keeps the answer."""
    positions = itertools.cycle(range(len(requests)))

    def ask() -> None:
        row = next(positions)
        answers[row] = answer(requests[row])

    return ask


def bench_bundle(
    bundle: Path, data: str, num_requests: int, backend: str, precision: str, threads: int
) -> dict[str, Measured]:
    """Time `bundle` under its policy, at full depth, and, where its reference is there, uncut, which is in FP32 always.

    Raises what opening the bundle and reading the data raise.
    """
    with (
        Runner.open(bundle, backend, threads=threads, precision=precision) as runner,
        Runner.open(bundle, runner.backend, Policy.full_depth(), threads, precision) as full_depth,
    ):
        dataset = load_dataset(runner, data, "test")
        alternatives: dict[str, Answer] = {}
        if reference_path(bundle).is_dir():
            alternatives["uncut"] = uncut_answer(bundle, runner.manifest, threads)
        alternatives |= {"full depth": runner_answer(full_depth), "offramp": runner_answer(runner)}
        return compare(alternatives, dataset.rows(), dataset.labels, num_requests)


def runner_answer(runner: Runner) -> Answer:
    return lambda inputs: int(runner.run(inputs).prediction[0])


def uncut_answer(bundle: Path, manifest: Manifest, threads: int) -> Answer:
    """The whole model beside `bundle` with its final exit only, in one session with the engines' own settings."""
    whole = load_reference(bundle, manifest)
    model = uncut_model(whole, manifest.exits[-1].name)
    session = open_session(model.SerializeToString(), threads, str(reference_path(bundle)))
    return lambda inputs: int(session.run(None, inputs)[0][0].argmax())
