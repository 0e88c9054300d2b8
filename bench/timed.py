"""Times requests against several alternatives: interleaved call by call, and each by itself in a row."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from eager import Answer
from subject import Inputs

from offramp.runtime.timing import interleaved_ms, summary

WARMUP = 3
MIN_ROUNDS = 5
IN_A_ROW = 60  # calls


class Asking:
    """Asks the next request at every call, from the first again after the last; only requests of full size."""

    def __init__(self, answer: Answer, requests: Sequence[Inputs]) -> None:
        rows = num_rows(requests[0])
        self.requests = [inputs for inputs in requests if num_rows(inputs) == rows]
        self.answer = answer
        self.position = -WARMUP

    def __call__(self) -> None:
        self.answer(self.requests[self.position % len(self.requests)])
        self.position += 1


def time_requests(
    answers: Mapping[str, Answer], requests: Sequence[Inputs], seconds: float
) -> dict[str, dict[str, float]]:
    """Times of whole requests in milliseconds and rows per second, by alternative; all get the same requests.

    `in_a_row_ms` is the median of the same requests with no other alternative between them.
    """
    start = time.perf_counter()
    for answer in answers.values():
        answer(requests[0])
    estimate = time.perf_counter() - start
    rounds = max(MIN_ROUNDS, int(seconds / estimate))
    times_ms = interleaved_ms({name: Asking(answer, requests) for name, answer in answers.items()}, rounds, WARMUP)
    calls = min(IN_A_ROW, rounds)
    in_a_row_ms = {
        name: interleaved_ms({name: Asking(answer, requests)}, calls, WARMUP)[name] for name, answer in answers.items()
    }
    progress(f"{num_rows(requests[0])} rows a request: {rounds} rounds of {len(answers)}")
    return {
        name: figures(times, num_rows(requests[0])) | {"in_a_row_ms": round(float(np.median(in_a_row_ms[name])), 4)}
        for name, times in times_ms.items()
    }


def figures(times_ms: Any, rows: int) -> dict[str, float]:
    """What times (R,) of requests of `rows` rows come to; jitter is p99 - p50."""
    found = {name: round(value, 4) for name, value in summary(times_ms).items()}
    return found | {"rows_per_s": round(1e3 * rows / float(times_ms.mean()), 1), "rounds": len(times_ms)}


def num_rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
