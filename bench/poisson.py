"""A Poisson stream of single sentences against three servers: the uncut model, offramp's runner, and offramp's pool.

Physics: what arrives while the server is busy waits. A server that needs half the time per row stands twice the rate;
the pool adds that rows which wait together run together, which pays where a batch of b costs less than b rows alone.

Measured: the same arrivals, drawn once, for every server; latency from the moment when a request was due to its answer.
The uncut model and the runner answer in the order of arrival, one request at a time. Rates are shares of what the
runner alone can do. The load generator shares the process and the interpreter with the servers, for all three alike.
"""

from __future__ import annotations

import importlib
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from alternatives import OFFRAMP, UNCUT, runner_answer, uncut_alternative
from eager import Answer
from subject import Inputs, Subject, batch_of, rows_of
from timed import figures, progress

from offramp.errors import OfframpError
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.timing import interleaved_ms

POOLED = "offramp, pooled"
NO_POOL = "did not run: this offramp has no offramp.runtime.Pool"
LOADS = (0.6, 0.9)
MAX_BATCH = 32
ROUNDS = 2  # of every server at every rate

Submit = Callable[[Inputs], "Future[Any]"]


@contextmanager
def one_at_a_time(answer: Answer) -> Iterator[Submit]:
    """A server that answers in the order of arrival."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda inputs: executor.submit(answer, inputs)


def play(submit: Submit, requests: list[Inputs], due_s: np.ndarray) -> tuple[np.ndarray, int]:
    """Submit each request when it is due: latencies in ms of those answered, and how many were refused."""
    answered: queue.SimpleQueue[float] = queue.SimpleQueue()
    pending, refused = [], 0
    start = time.perf_counter()
    for inputs, due in zip(requests, due_s.tolist(), strict=True):
        time.sleep(max(0.0, start + due - time.perf_counter()))
        try:
            future = submit(inputs)
        except OfframpError:
            refused += 1
            continue
        future.add_done_callback(lambda _, due=due: answered.put((time.perf_counter() - start - due) * 1e3))
        pending.append(future)
    for future in pending:
        future.result()  # raises what an answer raised
    return np.array([answered.get() for _ in pending]), refused


def measure_poisson(subject: Subject, policy: Policy, threads: int, seconds: float) -> dict[str, Any]:
    """Latencies by rate and server; `seconds` is how long one server is asked at one rate, in all its rounds."""
    requests = subject.requests(1)
    with ExitStack() as stack:
        runner = stack.enter_context(Runner.open(subject.bundle, "onnxruntime", policy, threads))
        uncut = uncut_alternative(subject, threads).answer
        servers = {
            UNCUT: stack.enter_context(one_at_a_time(uncut)),
            OFFRAMP: stack.enter_context(one_at_a_time(runner_answer(runner))),
        }
        servers |= _pooled(stack, runner, requests)
        service_ms = _service_ms(runner, requests)
        found: dict[str, Any] = {"threads": threads, "service_ms": round(service_ms, 3), "loads": {}}
        for load in LOADS:
            count = max(20, int(seconds * 1e3 / ROUNDS / service_ms * load))
            gaps = np.random.default_rng(int(100 * load)).exponential(service_ms / load / 1e3, count)
            asked = [requests[i % len(requests)] for i in range(count)]
            rounds: dict[str, list[tuple[np.ndarray, int]]] = {name: [] for name in servers}
            for _ in range(ROUNDS):
                for name, submit in servers.items():
                    rounds[name].append(play(submit, asked, np.cumsum(gaps)))
            found["loads"][str(load)] = {name: _latencies(played) for name, played in rounds.items()}
            for name, latency in found["loads"][str(load)].items():
                progress(f"load {load}, {name}: p50 {latency['p50_ms']:.1f} ms, p99 {latency['p99_ms']:.1f} ms")
    if POOLED not in servers:
        found["did_not_run"] = {POOLED: NO_POOL}
    return found


def _pooled(stack: ExitStack, runner: Runner, requests: list[Inputs]) -> dict[str, Submit]:
    """The pool over `runner`, where this offramp has one."""
    runtime = importlib.import_module("offramp.runtime")
    if not hasattr(runtime, "Pool"):
        return {}
    sample = batch_of([row for request in requests[:MAX_BATCH] for row in rows_of(request)])
    costs = runtime.measure_batch_costs(runner, sample)
    pool = stack.enter_context(runtime.Pool(runner, max_batch=MAX_BATCH, costs=costs))
    return {POOLED: pool.submit}


def _service_ms(runner: Runner, requests: list[Inputs]) -> float:
    """Mean time of one row, none waiting."""
    asked = iter(requests * 2)
    count = min(len(requests), 100)
    return float(interleaved_ms({"": lambda: runner.run(next(asked))}, count, 3)[""].mean())


def _latencies(played: list[tuple[np.ndarray, int]]) -> dict[str, float]:
    """Over all rounds of one server."""
    found = figures(np.concatenate([times for times, _ in played]), 1)
    del found["rows_per_s"], found["rounds"]
    return found | {"answered": sum(len(times) for times, _ in played), "refused": sum(count for _, count in played)}
