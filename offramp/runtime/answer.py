"""The answer to one request of a pool, to come: one object for threads and for asyncio."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any

from offramp.runtime.runner import Part, Result

if TYPE_CHECKING:
    from offramp.policy import Policy
    from offramp.runtime.pool import Pool


class Answer(Future[Result]):
    """A concurrent.futures.Future that can also be awaited, in any event loop: `result = await pool.submit(inputs)`.

    `result()` and `await` raise what refused the request: InputError, DeadlineError, ClosedError, BackendError.
    `cancel()`, or cancelling the task that awaits it, takes its rows out of the pool before their next segment;
    the segment that runs is not interrupted. Callbacks run in a thread of the pool, which waits for them.
    """

    is_open = True  # nobody has decided yet what it will be; set under the pool's lock
    parts: Sequence[Part] = ()  # of a request of several rows
    waiters: Sequence[Any] = ()  # asyncio futures, to be woken in their loops; set under the pool's lock

    def __init__(self, pool: Pool, num_rows: int, policy: Policy, deadline_ms: float = inf) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.policy = policy
        self.deadline_ms = deadline_ms  # on the pool's clock
        self.num_left = num_rows  # rows without an answer; under the pool's lock
        self._pool = pool

    def add(self, part: Part) -> None:
        """Note what was said about some of the rows."""
        with self._pool._lock:
            self.parts = (*self.parts, part)

    def cancel(self) -> bool:
        """Take the request back; False when its answer is there or being written."""
        if not self._pool._claim(self):
            return self.cancelled()
        super().cancel()
        self.set_running_or_notify_cancel()
        wake([self])
        return True

    def __await__(self) -> Generator[Any, None, Result]:
        import asyncio  # here, because importing it costs those who use threads 40 ms

        if not self.done():
            waiter = asyncio.get_running_loop().create_future()
            with self._pool._lock:
                self.waiters = (*self.waiters, waiter)
            if not self.done():  # looked at after the waiter can be seen, as it is woken after the answer can be
                try:
                    yield from waiter
                except asyncio.CancelledError:
                    self.cancel()
                    raise
        if self.cancelled():
            raise asyncio.CancelledError
        return self.result()


def refuse(answers: list[Answer], error: Exception) -> None:
    """Write an error of its own into each answer: one that several threads raise would collect all their frames."""
    for answer in answers:
        with suppress(InvalidStateError):  # somebody wrote into the future himself
            answer.set_exception(_copied(error))
    if answers:
        wake(answers)


def _copied(error: Exception) -> Exception:
    try:
        own = copy.copy(error)
    except Exception:  # some cannot be made from their arguments
        return error
    own.__cause__ = error.__cause__
    return own.with_traceback(error.__traceback__)


def wake(answers: Iterable[Answer]) -> None:
    """Wake everybody who awaits one of `answers`, which are there: one call into each event loop."""
    waiters: dict[Any, list[Any]] = {}  # loop -> asyncio futures
    for answer in answers:
        for waiter in answer.waiters:
            waiters.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, woken in waiters.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_set_waiters, woken)


def _set_waiters(waiters: list[Any]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
