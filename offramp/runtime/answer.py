"""The answer to one request of a pool, to come: one object for threads and for asyncio.

It looks like a concurrent.futures.Future and is none: that has a lock, a condition and two lists of its own, which cost
more than all else a pool does for a request. An answer has the pool's lock.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any

from offramp.runtime.runner import Part, Result

if TYPE_CHECKING:
    from offramp.policy import Policy
    from offramp.runtime.monitor_watch import Watch
    from offramp.runtime.pool import Pool

_LOG = logging.getLogger(__name__)


class Answer:
    """The answer to a request: `answer.result()` in a thread, `await answer` in a task of any event loop.

    Both raise what refused the request: InputError, DeadlineError, ClosedError, BackendError; or CancelledError, each
    world its own. `cancel()`, or cancelling the task that awaits, takes the rows out of the pool before their next
    segment; the segment that runs is not interrupted.
    """

    __slots__ = (
        "_callbacks",
        "_error",
        "_is_done",
        "_pool",
        "_result",
        "_waiters",
        "deadline_ms",
        "is_open",
        "num_left",
        "num_rows",
        "parts",
        "policy",
        "watch",
    )

    def __init__(self, pool: Pool, num_rows: int, policy: Policy, deadline_ms: float = inf) -> None:
        self.num_rows = num_rows
        self.policy = policy
        self.deadline_ms = deadline_ms  # on the pool's clock
        self.watch: Watch | None = None  # what a monitor notes of it
        # All below is written under the pool's lock.
        self.num_left = num_rows  # rows of which nothing was said yet
        self.is_open = True  # nobody has decided yet what the answer will be
        self.parts: tuple[Part, ...] = ()  # of a request of several rows
        self._pool = pool
        self._is_done = False
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._callbacks: tuple[Callable[[Answer], object], ...] = ()
        self._waiters: tuple[Any, ...] = ()  # asyncio futures

    def done(self) -> bool:
        """Whether the answer, or what refused it, is there."""
        return self._is_done

    def cancelled(self) -> bool:
        """Whether it was taken back."""
        return isinstance(self._error, CancelledError)

    def cancel(self) -> bool:
        """Take the request back; False when its answer is there or being written."""
        if self._pool._claim(self):
            finish([self], [CancelledError()])
        return self.cancelled()

    def result(self, timeout: float | None = None) -> Result:
        """The answer, as soon as it is there. Raises what refused it, or TimeoutError after `timeout` seconds."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        assert self._result is not None, "done without an error"
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What refused the request, as soon as that is known; None when it was answered. Raises TimeoutError."""
        if not self._is_done:
            there = threading.Lock()
            there.acquire()
            self.add_done_callback(lambda _: there.release())
            if not there.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
                raise TimeoutError(f"the answer was not there after {timeout} seconds; it may still come")
        return self._error

    def add_done_callback(self, callback: Callable[[Answer], object]) -> None:
        """Call `callback(answer)` once it is there: in a thread of the pool, which waits for it, or at once, here."""
        with self._pool._lock:
            if not self._is_done:
                self._callbacks = (*self._callbacks, callback)
                return
        _call(callback, self)

    def add(self, part: Part) -> None:
        """Note what was said about some of the rows."""
        with self._pool._lock:
            self.parts = (*self.parts, part)

    def __await__(self) -> Generator[Any, None, Result]:
        import asyncio  # here, because importing it costs those who use threads 40 ms

        if not self._is_done:
            waiter = asyncio.get_running_loop().create_future()
            with self._pool._lock:
                self._waiters = (*self._waiters, waiter)
                is_done = self._is_done
            if not is_done:
                try:
                    yield from waiter
                except asyncio.CancelledError:
                    self.cancel()
                    raise
        if self.cancelled():
            raise asyncio.CancelledError
        return self.result()


def finish(answers: Sequence[Answer], outcomes: Sequence[Result | BaseException]) -> None:
    """Write the answers, which the caller has claimed, and wake who waits: one call into each event loop."""
    if not answers:
        return
    _observe(answers, outcomes)
    called: list[Answer] = []
    waiters: dict[Any, list[Any]] = {}  # loop -> asyncio futures
    with answers[0]._pool._lock:
        for answer, outcome in zip(answers, outcomes, strict=True):
            if isinstance(outcome, Result):
                answer._result = outcome
            else:
                answer._error = outcome
            answer._is_done = True
            if answer._callbacks:
                called.append(answer)
            for waiter in answer._waiters:
                waiters.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, woken in waiters.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_set_waiters, woken)
    for answer in called:
        for callback in answer._callbacks:
            _call(callback, answer)
        answer._callbacks = ()


def _observe(answers: Sequence[Answer], outcomes: Sequence[Result | BaseException]) -> None:
    """Tell the monitor, before anybody is told: what it decides is in force for whoever asks next."""
    for answer, outcome in zip(answers, outcomes, strict=True):
        if answer.watch is None:
            continue
        if isinstance(outcome, Result):
            answer.watch.monitor.observe(answer.watch, outcome)
        else:
            answer.watch.monitor.forget(answer.watch)


def refuse(answers: Sequence[Answer], error: Exception) -> None:
    """Write an error of its own into each answer: one that several threads raise would collect all their frames."""
    finish(answers, [_copied(error) for _ in answers])


def _copied(error: Exception) -> Exception:
    try:
        own = copy.copy(error)
    except Exception:  # some cannot be made from their arguments
        return error
    own.__cause__ = error.__cause__
    return own.with_traceback(error.__traceback__)


def _call(callback: Callable[[Answer], object], answer: Answer) -> None:
    try:
        callback(answer)
    except Exception:  # the caller's affair, and no reason to stop answering others
        _LOG.exception("a callback of an answer failed")


def _set_waiters(waiters: list[Any]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
