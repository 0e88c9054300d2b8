"""The pool: many threads or asyncio tasks submit small requests, and rows that wait at the same segment run together.

with Pool(runner, max_batch=8, costs=measure_batch_costs(runner, sample)) as pool:
    answer = pool.submit(inputs, deadline_ms=50)   # answer.result() in a thread, await answer in a task

New rows form batches of at most `max_batch`. Survivors of an exit run on at once, or wait for the survivors of other
batches where the measured costs promise throughput for it: schedule.py has the rule. An answer is that of
`runner.run` on the request alone, to the bit where the engines answer a row the same in every batch. Threads are all
there is beneath; asyncio gets one call into its loop per batch.

The pool does not own the runner. Its threads do not survive a fork: open it in the child. A busy Python thread beside
it costs every engine call up to the interpreter's switch interval (5 ms): `sys.setswitchinterval`, the process's own
choice, shortens that.
"""

from __future__ import annotations

import atexit
import heapq
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import ROWS
from offramp.errors import ClosedError, DeadlineError, InputError, OptionError, QueueFullError
from offramp.runtime.admission import Admission, check_options, padded_row_shapes, plain_shapes
from offramp.runtime.answer import Answer, finish, refuse
from offramp.runtime.batch import Leaving, by_policy, decided, gathered, merged_inputs, whole_result
from offramp.runtime.costs import BatchCosts
from offramp.runtime.inputs import check_values, checked_arrays
from offramp.runtime.runner import Runner
from offramp.runtime.schedule import Plan, choose, plan_from_costs, plan_without_costs
from offramp.runtime.waiting import Epoch, Group, Lane, Queue

_REPLAN_BATCHES = 16  # a lane looks so often whether its plan still fits
_REPLAN_SHIFT = 0.02  # of a survival rate; less moves a predicted gain by less than costs are known
_SHAPES_KNOWN = 4096  # of requests; beyond that they are learned anew
_STALE_DEADLINES = 1024  # entries of answered requests are swept out beyond this
_LATE = DeadlineError("pool: the request's deadline passed before it was answered; allow more, or ask for less at once")
_CLOSED = ClosedError("pool: it was closed before this request was answered; send it elsewhere")


class Pool:
    """Answers requests from any number of threads and event loops with `workers` threads of its own."""

    def __init__(
        self,
        runner: Runner,
        max_batch: int = 32,
        max_wait_ms: float = 0.0,
        workers: int = 1,
        costs: BatchCosts | None = None,
        admission: Admission = Admission(),  # noqa: B008  (frozen)
    ) -> None:
        """A pool over `runner`, which must stay open as long as the pool is.

        With `max_wait_ms=0` the workers never idle while a row waits; more lets rows wait that long for company when
        there is nothing else to do. `costs` are measured here (`measure_batch_costs`); without them every batch runs
        to completion. Raises OptionError.
        """
        check_options(runner, max_batch, max_wait_ms, workers, costs)
        limits = runner.manifest.dimensions.get(ROWS)
        self.runner = runner
        self.max_batch = min(max_batch, limits.max) if limits else max_batch
        self.max_wait_ms = max_wait_ms
        self.costs = costs
        self.admission = admission
        self._specs = runner.manifest.inputs
        self._may_regroup = all(engine.keeps_carries for engine in runner.engines)
        self._dtypes = [(spec.name, np.dtype(spec.dtype)) for spec in self._specs]
        self._num_classes = runner.manifest.exits[0].num_classes
        self._lock = threading.Lock()  # of everything below
        self._wake = threading.Condition(self._lock)
        self._epoch = Epoch(runner.setting, len(runner.engines))
        self._waiting: list[Queue] = []  # those that are not empty
        self._deadlines: list[tuple[float, int, Answer]] = []  # a heap, over answers that have one
        self._order = count()  # of deadlines that are equal
        self._num_rows = 0
        self._num_idle = 0
        self._num_workers = workers
        self._is_closed = False  # to new requests
        self._is_refusing = False  # what waits is refused
        self._is_over = False
        self._threads = [threading.Thread(target=self._work, name=f"pool-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close, False)

    def submit(self, inputs: Mapping[str, NDArray[Any]], source: str = "", deadline_ms: float = inf) -> Answer:
        """The answer to N >= 0 rows, to come. The arrays must not change until it is there.

        A request that has no answer `deadline_ms` from now is refused with DeadlineError. Raises InputError for
        names, dtypes and shapes (values are looked at with the batch: the answer raises), OptionError,
        QueueFullError or ClosedError.
        """
        if deadline_ms != deadline_ms:
            raise OptionError(f"pool: got deadline_ms={deadline_ms!r}, expected a number of milliseconds from now")
        lane, arrays, num_rows = self._admitted(inputs)
        now_ms = monotonic() * 1e3
        answer = Answer(self, num_rows, lane.epoch.setting.policy_of(source), now_ms + deadline_ms)
        if not num_rows:
            answer.is_open = False
            finish([answer], [self.runner.run(arrays, source)])
            return answer
        group = Group.of_request(answer, arrays, now_ms)
        with self._lock:
            if self._is_closed:
                raise ClosedError("pool: it was closed; open another on the runner")
            if self._num_rows + num_rows > self.admission.max_rows:
                raise QueueFullError(
                    f"pool: it holds {self._num_rows} rows and takes {self.admission.max_rows}, got {num_rows} more; "
                    f"try again later, or open it with Admission(max_rows=…)"
                )
            self._num_rows += num_rows
            if (monitor := self.runner.monitor) is not None:  # it may come and go at any time
                answer.watch = monitor.begin(source, num_rows, lane.epoch.setting)
            self._push(lane.queues[0], group)
            if deadline_ms != inf:
                self._note_deadline(answer)
        return answer

    @property
    def num_rows(self) -> int:
        """How many rows are in the pool, waiting or running."""
        return self._num_rows

    @property
    def plans(self) -> dict[int, Plan]:
        """How rows of each size that was seen under the present policy are run: row size -> plan."""
        with self._lock:
            return {lane.row_size: lane.plan for lane in self._epoch.lanes.values()}

    def close(self, drain: bool = True) -> None:
        """Take no more requests, answer those that are here (`drain`) or refuse them with ClosedError, and stop.

        Returns when every answer is there; closing twice is fine. The runner stays open.
        """
        refused: list[Answer] = []
        with self._lock:
            self._is_closed = True
            if not drain:
                self._is_refusing = True
                groups = [group for queue in self._waiting for group in queue.groups]
                self._waiting.clear()
                refused = self._claimed(owner for group in groups for owner in group.owners)
            self._wake.notify_all()
        refuse(refused, _CLOSED)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    # Admission

    def _admitted(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[Lane, dict[str, NDArray[Any]], int]:
        """The lane of a request, its inputs and its number of rows. Shapes that were checked before are not again."""
        epoch = self._epoch
        shapes = plain_shapes(inputs, self._dtypes)
        if shapes and epoch.setting is self.runner.setting:
            lane = epoch.by_shapes.get(shapes)
            if lane is not None:
                return lane, dict(inputs), shapes[0][0]
        arrays, num_rows = checked_arrays(inputs, self.runner.manifest)
        shapes = tuple(array.shape for array in arrays.values())
        row_shapes, row_size = padded_row_shapes(arrays, self.runner.manifest, self.admission.pad_to)
        with self._lock:
            if self._epoch.setting is not self.runner.setting:
                self._epoch = Epoch(self.runner.setting, len(self.runner.engines))
            epoch = self._epoch
            key = tuple(row_shapes.values())
            lane = epoch.lanes.get(key)
            if lane is None:
                plan = plan_without_costs(len(self.runner.engines), self.max_batch)
                lane = epoch.lanes[key] = Lane(epoch, row_shapes, row_size, self.admission.pad_to > 1, plan)
            if len(epoch.by_shapes) >= _SHAPES_KNOWN:
                epoch.by_shapes.clear()
            epoch.by_shapes[shapes] = lane
        return lane, arrays, num_rows

    def _push(self, queue: Queue, group: Group) -> None:
        """Under the lock."""
        if not queue.groups:
            self._waiting.append(queue)
        queue.push(group)
        if self._num_idle:
            self._wake.notify()

    def _note_deadline(self, answer: Answer) -> None:
        """Under the lock."""
        if len(self._deadlines) > max(_STALE_DEADLINES, 2 * self._num_rows):
            self._deadlines = [entry for entry in self._deadlines if entry[2].is_open]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (answer.deadline_ms, next(self._order), answer))
        if self._num_idle and self._deadlines[0][2] is answer:
            self._wake.notify()

    # Who decides what an answer will be

    def _claim(self, answer: Answer) -> bool:
        """Whether the caller, and nobody else, may say what `answer` is."""
        with self._lock:
            return bool(self._claimed([answer]))

    def _claimed(self, answers: Iterable[Answer]) -> list[Answer]:
        """Those of `answers` that were still open; the caller says what they are. Under the lock."""
        claimed = []
        for answer in answers:
            if answer.is_open:
                answer.is_open = False
                self._num_rows -= answer.num_rows
                claimed.append(answer)
        return claimed

    def _expired(self, now_ms: float) -> list[Answer]:
        """Open answers whose time is over, claimed. Under the lock."""
        if not self._deadlines:
            return []
        over = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            over.append(heapq.heappop(self._deadlines)[2])
        return self._claimed(over)

    # Workers

    def _work(self) -> None:
        """What a thread of the pool does, until the pool is over."""
        groups: list[Group] = []
        try:
            while (batch := self._next_batch()) is not None:
                lane, segment, groups = batch
                del batch
                self._replan(lane, segment)
                self._run(lane, segment, groups)
                groups = []  # their carries go while the next batch is awaited
        except BaseException as exc:  # a bug of ours: leave nobody waiting
            with self._lock:
                self._num_workers -= 1
            self._fail(groups, ClosedError(f"pool: its worker failed ({exc!r}); open another"))
            threading.Thread(target=self.close, args=(False,)).start()
            raise

    def _next_batch(self) -> tuple[Lane, int, list[Group]] | None:
        """Wait for the next batch, lane, segment and groups; None when the pool is over."""
        while True:
            with self._lock:
                now_ms = monotonic() * 1e3
                expired = self._expired(now_ms)
                if not expired:
                    queue, wake_ms = choose(self._waiting, now_ms, 0.0 if self._is_closed else self.max_wait_ms)
                    if queue is not None:
                        groups = queue.take()
                        if not queue.groups:
                            self._waiting.remove(queue)
                        if groups:
                            return queue.lane, queue.segment, groups
                    elif self._is_over or (self._is_closed and self._num_idle == self._num_workers - 1):
                        self._is_over = True
                        self._wake.notify_all()
                        return None
                    else:
                        self._idle(wake_ms, now_ms)
            refuse(expired, _LATE)

    def _idle(self, wake_ms: float, now_ms: float) -> None:
        """Wait for something to happen. Under the lock."""
        if wake_ms != inf and self._deadlines:
            wake_ms = min(wake_ms, self._deadlines[0][0])
        self._num_idle += 1
        self._wake.wait(None if wake_ms == inf else (wake_ms - now_ms) / 1e3)
        self._num_idle -= 1

    def _replan(self, lane: Lane, segment: int) -> None:
        """Look now and then whether another plan is better for the rows of a lane."""
        if self.costs is None or segment:
            return
        lane.batches += 1
        if lane.batches % _REPLAN_BATCHES != 1:
            return
        rates = lane.epoch.survival.rates()
        if lane.seen and max(map(abs, np.subtract(rates, lane.seen))) <= _REPLAN_SHIFT:
            return
        plan = plan_from_costs(self.costs, rates, self.max_batch, lane.row_size)
        with self._lock:
            lane.seen = rates
            lane.adopt(plan if self._may_regroup else replace(plan, regroup=(False,) * len(plan.regroup)))

    def _run(self, lane: Lane, segment: int, groups: list[Group]) -> None:
        """Run a batch through `segment`, and further as long as its survivors need not wait for others."""
        setting, engines = lane.epoch.setting, self.runner.engines
        while groups:
            try:
                groups = by_policy(groups)
                if segment:
                    carry, rows = gathered(engines[segment], groups)
                else:
                    carry, groups = self._begun(lane, groups)
                    if not groups:
                        return
                    rows = np.arange(sum([len(group.owners) for group in groups]))
                out = engines[segment].run(carry, rows, setting.inverse_temperatures[segment])
                is_final = segment == len(engines) - 1
                survivors, leaving = decided(segment, is_final, groups, out, monotonic() * 1e3)
            except Exception as exc:  # whatever it is, it is about this batch only
                self._fail(groups, exc)
                return
            del carry, out  # before the next call allocates
            groups = self._settle(lane, segment, survivors, leaving)
            segment += 1

    def _begun(self, lane: Lane, groups: list[Group]) -> tuple[dict[str, NDArray[Any]], list[Group]]:
        """Inputs whose values are fine, and the groups whose rows they hold; the other requests are refused."""
        inputs = merged_inputs(groups, lane, self._specs)
        try:
            check_values(inputs, 1, self.runner.manifest)
        except InputError:
            groups = [group for group in groups if self._is_sound(group)]
            inputs = merged_inputs(groups, lane, self._specs) if groups else {}
        return inputs, groups

    def _is_sound(self, group: Group) -> bool:
        """Whether the values of one request are fine; refuses it when they are not."""
        try:
            check_values(group.carry, group.owners[0].num_rows, self.runner.manifest)
        except InputError as exc:
            self._fail([group], exc)
            return False
        return True

    def _settle(self, lane: Lane, segment: int, survivors: list[Group], leaving: Sequence[Leaving]) -> list[Group]:
        """Answer who left, and let survivors wait, or refuse them in a closing pool; the groups to run on at once."""
        for leave in leaving:
            leave.add_parts()
        expired: list[Answer] = []
        refused: list[Answer] = []
        with self._lock:
            whole = [(leave, *self._completed(leave.owners)) for leave in leaving]
            if segment < len(self.runner.engines) - 1:
                lane.epoch.survival.observe(segment, *_entered_and_stayed(survivors, leaving))
            if survivors:
                expired = self._expired(monotonic() * 1e3)
                if self._is_refusing:
                    refused = self._claimed(owner for group in survivors for owner in group.owners)
                elif lane.plan.regroup[segment + 1]:
                    for group in survivors:
                        self._push(lane.queues[segment + 1], group)
                    survivors = []
        for leave, rows, answers in whole:
            self._give(leave, rows, answers)
        refuse(expired, _LATE)
        refuse(refused, _CLOSED)
        return [group for group in map(Group.open_part, survivors) if group is not None]

    def _completed(self, owners: list[Answer]) -> tuple[list[int], list[Answer]]:
        """The answers that these rows complete, claimed, and the rows that completed them. Under the lock."""
        rows, answers = [], []
        for row, owner in enumerate(owners):
            owner.num_left -= 1
            if not owner.num_left and owner.is_open:
                owner.is_open = False
                self._num_rows -= owner.num_rows
                rows.append(row)
                answers.append(owner)
        return rows, answers

    def _give(self, leave: Leaving, rows: list[int], answers: list[Answer]) -> None:
        """Write the answers whose (last) rows are `rows` of `leave`, and wake who waits."""
        if not answers:
            return
        single = leave.results()
        outcomes = [
            single[row] if answer.num_rows == 1 else whole_result(answer, self._num_classes)
            for answer, row in zip(answers, rows, strict=True)
        ]
        finish(answers, outcomes)

    def _fail(self, groups: list[Group], error: Exception) -> None:
        with self._lock:
            answers = self._claimed(owner for group in groups for owner in group.owners)
        refuse(answers, error)


def _entered_and_stayed(survivors: list[Group], leaving: Sequence[Leaving]) -> tuple[int, int]:
    stayed = sum([len(group.owners) for group in survivors])
    return stayed + sum([len(leave.owners) for leave in leaving]), stayed
