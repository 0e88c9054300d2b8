"""A load generator in a process of its own, so that its Python does not compete with the server's for the interpreter.

A request crosses the pipe as its number only; both sides know the inputs. Many numbers travel in one message, and so do
the answers: (number, prediction, exit). Latency counts from the moment a request was due to the moment its answer was
read here, so a generator that falls behind shows up as latency, not as a lighter load.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from time import clock_gettime, perf_counter, pthread_getcpuclockid
from types import TracebackType
from typing import Any, Self

import numpy as np

from offramp.runtime import Answer, Result

Submit = Callable[[dict[str, np.ndarray]], "Future[Result] | Answer"]


@dataclass(frozen=True)
class Server:
    """What is asked, and the threads in which it runs the engines."""

    submit: Submit
    threads: list[threading.Thread]

    def cpu_seconds(self) -> float:
        """CPU time of those threads so far."""
        return sum(clock_gettime(pthread_getcpuclockid(thread.ident or 0)) for thread in self.threads)


@dataclass(frozen=True)
class Load:
    """What one round sends: `num_requests`, by `clients` that wait for each answer, or at `rate` per second."""

    num_requests: int
    clients: int = 0
    rate: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """What one round found."""

    seconds: float  # from the first request to the last answer
    latency_ms: np.ndarray  # (N,)
    answers: np.ndarray  # (N, 2): prediction and exit of every request
    cpu_seconds: float = 0.0  # of the threads that run the engines


class LoadGenerator:
    """The server's side of the pipe; `with LoadGenerator() as generator: generator.drive(load, server, samples)`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._conn, there = context.Pipe()
        self._process = context.Process(target=_generate, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._conn.send(None)
        self._process.join(10)

    def drive(self, load: Load, server: Server, samples: list[dict[str, np.ndarray]]) -> Round:
        """Serve one round: request i asks about samples[i % len(samples)]."""
        self._conn.send(load)
        cpu_start = server.cpu_seconds()
        outbox: deque[tuple[int, Future[Result] | Answer]] = deque()
        there = threading.Event()

        def put(number: int, answer: Future[Result] | Answer) -> None:
            outbox.append((number, answer))
            there.set()

        sender = threading.Thread(target=_send_answers, args=(self._conn, outbox, there, load.num_requests))
        sender.start()
        taken = 0
        while taken < load.num_requests:
            numbers = np.frombuffer(self._conn.recv_bytes(), np.int64).tolist()
            taken += len(numbers)
            for number in numbers:
                answer = server.submit(samples[number % len(samples)])
                answer.add_done_callback(lambda answer, number=number: put(number, answer))
        sender.join()
        cpu_seconds = server.cpu_seconds() - cpu_start
        found: Round = self._conn.recv()
        return replace(found, cpu_seconds=cpu_seconds)


def _send_answers(
    conn: Connection, outbox: deque[tuple[int, Future[Result] | Answer]], there: threading.Event, num_requests: int
) -> None:
    sent = 0
    while sent < num_requests:
        there.wait()
        there.clear()
        rows = []
        while outbox:
            number, answer = outbox.popleft()
            result = answer.result()
            rows.append((number, int(result.prediction[0]), int(result.exit_index[0])))
        if rows:
            conn.send_bytes(np.array(rows, np.int64).tobytes())
            sent += len(rows)


def _generate(conn: Connection) -> None:
    """The generator's side: one round per Load, until None."""
    while (load := conn.recv()) is not None:
        conn.send(_run_round(conn, load))


def _run_round(conn: Connection, load: Load) -> Round:
    due = np.full(load.num_requests, np.inf)
    if load.rate:
        due = np.cumsum(np.random.default_rng(load.seed).exponential(1 / load.rate, load.num_requests))
    answered = np.empty(load.num_requests)
    answers = np.empty((load.num_requests, 2), np.int64)
    start = perf_counter()
    sent = done = 0
    if load.clients:
        sent = _send(conn, 0, min(load.clients, load.num_requests))
        due[:sent] = 0
    while done < load.num_requests:
        timeout: Any = None
        if load.rate and sent < load.num_requests:
            ready = int(np.searchsorted(due, perf_counter() - start, side="right"))
            sent = _send(conn, sent, ready)
            timeout = max(due[sent] - (perf_counter() - start), 0) if sent < load.num_requests else None
        if not conn.poll(timeout):
            continue
        rows = np.frombuffer(conn.recv_bytes(), np.int64).reshape(-1, 3)
        now = perf_counter() - start
        answered[rows[:, 0]], answers[rows[:, 0]] = now, rows[:, 1:]
        done += len(rows)
        if load.clients:
            after = min(sent + len(rows), load.num_requests)
            due[sent:after] = now
            sent = _send(conn, sent, after)
    return Round(perf_counter() - start, (answered - due) * 1e3, answers)


def _send(conn: Connection, first: int, end: int) -> int:
    if end > first:
        conn.send_bytes(np.arange(first, end).tobytes())
    return max(first, end)
