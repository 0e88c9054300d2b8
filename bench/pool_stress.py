"""The pool without a model: CPU per request besides the engines, and a hundred thousand requests at random.

Fake segments answer with the number of the request, so that an answer says whose it is; exit k lets go the numbers
whose bit k is set. bench/pool.py runs both and says what the figures mean.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, deque
from concurrent.futures import CancelledError
from typing import Any

import numpy as np

from offramp.bundle import InputSpec
from offramp.errors import DeadlineError
from offramp.policy import Policy
from offramp.runtime import Admission, Answer, BatchCosts, Pool, Result, Runner, fake_runner
from offramp.runtime.fake import fake_manifest

INPUTS = (
    InputSpec("input_ids", "int64", ("rows", "sequence"), 0, None, False),
    InputSpec("attention_mask", "int64", ("rows", "sequence"), 0, 1, True),
)
SURE = 5.0  # logits this far apart: max_prob 0.993
TOKENS = 8
NUM_SEGMENTS = 3
REPETITIONS = 7
CLIENT_THREADS = 8
MAX_OUTSTANDING = 32  # of one client


class _Forgetful(list[Any]):
    def append(self, call: Any) -> None:
        """Keep no record of calls."""


class TimedEngine:
    """An engine that says how much CPU its calls took."""

    keeps_carries = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.cpu_ns = 0

    def run(self, *arguments: Any) -> Any:
        start = time.thread_time_ns()
        out = self._inner.run(*arguments)
        self.cpu_ns += time.thread_time_ns() - start
        return out

    def merged(self, parts: Any) -> Any:
        return self._inner.merged(parts)

    def close(self) -> None:
        self._inner.close()


def numbered_runner() -> Runner:
    """Three fake segments over INPUTS; the first token is the request's number."""

    def answer(exit_index: int) -> Any:
        def logits(inputs: dict[str, np.ndarray]) -> np.ndarray:
            number = inputs["input_ids"][:, 0]
            return np.stack([number, number - SURE * (number >> exit_index & 1)], axis=1)

        return logits

    fake = fake_runner([answer(k) for k in range(NUM_SEGMENTS)], inputs=INPUTS)
    for engine in fake.engines:
        engine.calls = _Forgetful()  # type: ignore[attr-defined]
    policy = Policy.thresholds("max_prob", [0.9] * (NUM_SEGMENTS - 1))
    engines = [TimedEngine(engine) for engine in fake.engines]
    return Runner(engines, fake_manifest(NUM_SEGMENTS, 2, INPUTS), policy)


def request(number: int, rows: int = 1) -> dict[str, np.ndarray]:
    ids = np.arange(number, number + rows)[:, None] + np.zeros(TOKENS, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones((rows, TOKENS), np.int64)}


def is_right(result: Result, number: int, rows: int) -> bool:
    """Whether `result` is the answer to these rows and no others."""
    numbers = np.arange(number, number + rows)
    exits = np.where(numbers & 1, 0, np.where(numbers & 2, 1, 2))
    whose = result.outputs["logits"][:, 0]
    return np.array_equal(whose, numbers) and np.array_equal(result.exit_index, exits)


def weight_bound(batch: int) -> BatchCosts:
    """Costs at which everything is regrouped."""
    return BatchCosts((1, batch), ((1.0, 1.1),) * NUM_SEGMENTS)


def cpu_us_per_request(batch: int, face: str, num_requests: int) -> dict[str, Any]:
    """CPU of the whole process per request of one row, without the engines' own."""
    runner = numbered_runner()
    requests = [request(number) for number in range(512)]
    found = []
    with Pool(runner, batch, costs=weight_bound(batch)) as pool:
        for _ in range(REPETITIONS + 1):
            before = time.process_time_ns(), sum(engine.cpu_ns for engine in runner.engines)  # type: ignore[attr-defined]
            if face == "asyncio":
                asyncio.run(_ask_from_tasks(pool, requests, num_requests, 8 * batch))
            else:
                _ask_from_thread(pool, requests, num_requests, 8 * batch)
            engines_ns = sum(engine.cpu_ns for engine in runner.engines) - before[1]  # type: ignore[attr-defined]
            found.append((time.process_time_ns() - before[0] - engines_ns) / num_requests / 1e3)
    spread = np.quantile(found[1:], [0, 0.5, 1])
    return {
        "batch": batch,
        "face": face,
        **dict(zip(("least_us", "us", "most_us"), spread.round(1).tolist(), strict=True)),
    }


def _ask_from_thread(pool: Pool, requests: list[Any], num_requests: int, outstanding: int) -> None:
    answers: deque[Answer] = deque()
    for number in range(num_requests):
        answers.append(pool.submit(requests[number % len(requests)]))
        if len(answers) >= outstanding:
            for _ in range(outstanding // 2):
                answers.popleft().result()
    for answer in answers:
        answer.result()


async def _ask_from_tasks(pool: Pool, requests: list[Any], num_requests: int, num_tasks: int) -> None:
    async def client(first: int) -> None:
        for number in range(first, num_requests, num_tasks):
            await pool.submit(requests[number % len(requests)])

    await asyncio.gather(*(client(first) for first in range(num_tasks)))


def random_load(num_requests: int, seed: int = 0) -> dict[str, int]:
    """Outcomes of requests with random sizes, cancellations and deadlines; every one must be accounted for, once."""
    outcomes: Counter[str] = Counter()
    callbacks: Counter[int] = Counter()
    lock = threading.Lock()
    share = num_requests // CLIENT_THREADS
    with Pool(numbered_runner(), 16, costs=weight_bound(16), admission=Admission(max_rows=4096)) as pool:

        def client(index: int) -> None:
            mine = _ask_at_random(
                pool, range(index * share, (index + 1) * share), random.Random(seed + index), callbacks
            )
            with lock:
                outcomes.update(mine)

        threads = [threading.Thread(target=client, args=(index,)) for index in range(CLIENT_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcomes["rows_left"] = pool.num_rows
    return {
        "requests": share * CLIENT_THREADS,
        **{name: outcomes[name] for name in ("answered", "cancelled", "late", "mixed", "rows_left")},
        "lost": share * CLIENT_THREADS - sum(outcomes[name] for name in ("answered", "cancelled", "late", "mixed")),
        "duplicated": sum(count > 1 for count in callbacks.values()),
    }


def _ask_at_random(pool: Pool, numbers: range, chance: random.Random, callbacks: Counter[int]) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    outstanding: list[tuple[Answer, int, int]] = []
    for index in numbers:
        rows = chance.choice((1, 1, 1, 2, 5, 20))
        deadline_ms = chance.choice((float("inf"), float("inf"), 1e4, chance.uniform(0, 10)))
        answer = pool.submit(request(32 * index, rows), deadline_ms=deadline_ms)
        answer.add_done_callback(lambda _, index=index: callbacks.update([index]))
        outstanding.append((answer, 32 * index, rows))
        if chance.random() < 0.1:
            chance.choice(outstanding)[0].cancel()
        if len(outstanding) > MAX_OUTSTANDING:
            outcomes[_outcome(*outstanding.pop(0))] += 1
    outcomes.update(_outcome(*each) for each in outstanding)
    return outcomes


def _outcome(answer: Answer, number: int, rows: int) -> str:
    try:
        return "answered" if is_right(answer.result(timeout=60), number, rows) else "mixed"
    except CancelledError:
        return "cancelled"
    except DeadlineError:
        return "late"
    except TimeoutError:
        return "lost"
