"""Threads, tasks and callbacks at the face of the pool, and what closing does to them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import tiny
from pooling import (
    PATIENCE_S,
    STAYS,
    exit_of,
    gated_runner,
    numbered_runner,
    numbers_of,
    occupy,
    request,
    rows_run,
)

from offramp.errors import ClosedError, DeadlineError
from offramp.runtime import Pool


def test_a_thread_and_a_task_get_the_same_answers() -> None:
    with Pool(numbered_runner(), max_batch=8) as pool:
        answers = [pool.submit(request(n, n + 1)) for n in range(40)]
        by_thread = [answer.result(PATIENCE_S) for answer in answers]

        async def ask() -> list[Any]:
            return await asyncio.gather(*(pool.submit(request(n, n + 1)) for n in range(40)))

        for n, (one, other) in enumerate(zip(by_thread, asyncio.run(ask()), strict=True)):
            tiny.assert_same(one, other)
            assert numbers_of(one) == [n, n + 1]
            assert one.exit_index.tolist() == [exit_of(n), exit_of(n + 1)]


@pytest.mark.parametrize("drain", [True, False])
def test_closing_answers_or_refuses_everything(drain: bool) -> None:
    runner, gate = gated_runner()
    pool = Pool(runner, max_batch=2)
    answers = [occupy(pool, gate), *(pool.submit(request(n)) for n in (1, 4, 3, 8))]
    closer = threading.Thread(target=pool.close, args=(drain,))
    closer.start()
    gate.let_go(3)
    closer.join(PATIENCE_S)
    assert all(answer.done() for answer in answers)
    kinds = [type(answer.exception()) for answer in answers]
    assert kinds == ([type(None)] * 5 if drain else [ClosedError] * 5)
    assert pool.num_rows == 0
    with pytest.raises(ClosedError, match="open another"):
        pool.submit(request(1))
    pool.close()


def test_an_error_inside_the_with_block_does_not_wait_for_the_queue() -> None:
    runner, gate = gated_runner()
    with pytest.raises(KeyError), Pool(runner, max_batch=1) as pool:  # noqa: PT012
        answers = [occupy(pool, gate, 1), pool.submit(request(1))]
        gate.let_go(1)
        raise KeyError
    assert isinstance(answers[1].exception(0), ClosedError) or answers[1].result(0)


def test_a_callback_may_use_the_pool_and_close_it() -> None:
    pool = Pool(numbered_runner())
    closed = threading.Event()

    def then(answer: Any) -> None:
        pool.submit(request(3)).cancel()
        pool.close()
        closed.set()

    pool.submit(request(1)).add_done_callback(then)
    assert closed.wait(PATIENCE_S)
    pool.close()


def test_a_callback_that_raises_is_logged_and_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    runner, gate = gated_runner()
    called: list[Any] = []
    with Pool(runner, max_batch=2) as pool:
        occupy(pool, gate)
        answers = [pool.submit(request(n)) for n in (1, 3)]
        answers[0].add_done_callback(lambda _: 1 / 0)
        answers[0].add_done_callback(called.append)
        answers[1].add_done_callback(called.append)
        with pytest.raises(TimeoutError, match="may still come"):
            answers[0].result(0)
        gate.let_go(2)
        assert [numbers_of(answer.result(PATIENCE_S)) for answer in answers] == [[1], [3]]
    answers[0].add_done_callback(called.append)
    assert called == [*answers, answers[0]]
    assert "a callback of an answer failed" in caplog.text


def test_a_broken_worker_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    runner, gate = gated_runner()
    pool = Pool(runner, max_batch=1, workers=2)
    first = occupy(pool, gate)
    second = pool.submit(request(STAYS))
    gate.wait_begun()
    third = pool.submit(request(STAYS))
    monkeypatch.setattr(pool, "_settle", None)
    gate.let_go(9)
    assert all(isinstance(answer.exception(PATIENCE_S), ClosedError) for answer in (first, second, third))
    pool.close()
    assert seen


def test_cancelling_a_task_takes_its_rows_out() -> None:
    runner, gate = gated_runner()

    async def ask(pool: Pool) -> None:
        first = occupy(pool, gate)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.submit(request(8)), 0.001)
        task = asyncio.ensure_future(pool.submit(request(12)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.num_rows == 1
        gate.let_go(1)
        assert numbers_of(await first) == [STAYS]
        assert numbers_of(await first) == [STAYS]  # there already
        refused = pool.submit(request(1), deadline_ms=-1)
        with pytest.raises(DeadlineError):
            await refused

    with Pool(runner, max_batch=1) as pool:
        asyncio.run(ask(pool))
    assert rows_run(runner, 0) == [1]


def test_whoever_awaits_a_cancelled_answer_is_told() -> None:
    runner, gate = gated_runner()

    async def ask(pool: Pool) -> None:
        occupy(pool, gate)
        answer = pool.submit(request(8))
        waiters = [asyncio.ensure_future(answer) for _ in range(2)]
        await asyncio.sleep(0)
        threading.Thread(target=answer.cancel).start()
        found = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in found)
        with pytest.raises(asyncio.CancelledError):
            await answer
        gate.let_go(1)

    with Pool(runner, max_batch=1) as pool:
        asyncio.run(ask(pool))


def test_a_loop_that_is_gone_disturbs_nobody() -> None:
    runner, gate = gated_runner()
    kept: list[Any] = []

    async def ask(pool: Pool) -> None:
        kept.append(occupy(pool, gate))
        waiter = kept[0].__await__()
        next(waiter)  # registered, and the loop ends
        kept.append(waiter)

    with Pool(runner, max_batch=1) as pool:
        asyncio.run(ask(pool))
        gate.let_go(2)
        assert numbers_of(kept[0].result(PATIENCE_S)) == [STAYS]
        assert numbers_of(pool.submit(request(1)).result(PATIENCE_S)) == [1]
