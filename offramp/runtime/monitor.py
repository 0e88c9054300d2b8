"""The monitor: watches requests as they run, and holds every row to full depth when the certificate no longer holds.

monitor = Monitor.from_certificate(runner_certificate)
runner = Runner.open(bundle, monitor=monitor)
…
print("\n".join(lines_from_snapshot(monitor.snapshot())))

It counts (monitor_figures.py), runs some rows to full depth to see what the early answer would have been worth
(monitor_watch.py), tests exit mix and risk (monitor_evidence.py) and acts on it (monitor_states.py). What it decides is
in force for every request that begins afterwards. One lock, held for a few microseconds at the beginning and end of a
request.

Requests are evidence in the order in which they came, not in that in which they ended, because shallow rows end first:
a request waits for those that came before it, at most MOST_PENDING of them. Those without an answer are no evidence.

It never fails a request: errors of its own and of whoever is told are counted, and `Snapshot.is_blind` says so.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

from offramp.bundle import LEARNED
from offramp.certificate import Certificate
from offramp.errors import OptionError
from offramp.policy import Policy, Veto
from offramp.runtime.monitor_figures import Figures, FiguresBySource
from offramp.runtime.monitor_sink import Sink
from offramp.runtime.monitor_snapshot import Snapshot, SourceSnapshot, StreamSnapshot
from offramp.runtime.monitor_states import Baseline, Change, MonitorOptions, Stream, baselines_from_certificate
from offramp.runtime.monitor_watch import Watch

if TYPE_CHECKING:
    from offramp.runtime.runner import Result, Setting

_LOG = logging.getLogger(__name__)
MOST_PENDING = 4096  # requests of a stream under way; the oldest is given up as evidence beyond that
_SECRET = secrets.SystemRandom()  # the operating system's: nobody can tell which rows will be audited


class Monitor:
    """Watches one runner, and the pools over it, from any number of threads."""

    def __init__(
        self,
        baseline: Baseline | None = None,
        options: MonitorOptions = MonitorOptions(),  # noqa: B008  (frozen)
        sources: Mapping[str, Baseline] | None = None,
        on_change: Callable[[Change], object] = lambda change: None,
        rng: Random = _SECRET,
    ) -> None:
        """Watch for what `baseline` says of all requests, and `sources` of those that name one of these sources.

        Without a baseline it only counts. `on_change(change)` is called in a thread of its own, in order. `rng` chooses
        the audits; pass a seeded one in tests only. Raises OptionError.
        """
        baselines = {**({} if baseline is None else {"": baseline}), **(sources or {})}
        if sources and baseline is None:
            raise OptionError("monitor: got baselines of sources alone, expected one for all other requests too")
        if len({len(found.exit_counts) for found in baselines.values()}) > 1:
            raise OptionError("monitor: got baselines with different numbers of exits, expected those of one model")
        self.options = options
        self._changes: list[Change] = []
        self._sink = Sink(on_change)
        self._lock = threading.Lock()  # of everything below
        self._streams = {
            name: Stream(name, found, options, len(baselines), rng, self._changes.append)
            for name, found in baselines.items()
        }
        self._pending: dict[str, deque[Watch]] = {name: deque() for name in baselines}
        self._figures: FiguresBySource | None = None  # None: not given to a runner yet
        self._unlearned: frozenset[int] = frozenset()  # exits without a learned score
        self._policy: Policy | None = None
        self._has_vetoes = False
        self._process = secrets.token_hex(8)
        self._lost = 0
        self._errors = 0

    @classmethod
    def from_certificate(
        cls,
        certificate: Certificate,
        options: MonitorOptions = MonitorOptions(),  # noqa: B008  (frozen)
        labels: Sequence[str] = (),
        on_change: Callable[[Change], object] = lambda change: None,
        rng: Random = _SECRET,
    ) -> Monitor:
        """Watch for what `certificate` says, also of each source that it makes a statement of its own about.

        `labels` are the model's (`runner.manifest.labels`), for a certificate about one class. Raises OptionError.
        """
        baseline, sources = baselines_from_certificate(certificate, labels)
        return cls(baseline, options, sources, on_change, rng)

    # For the runner and the pool

    def attach(self, num_exits: int, unlearned: Sequence[int] = ()) -> None:
        """It will watch a model of `num_exits` exits; `unlearned` have no learned score. Raises OptionError."""
        known = [len(stream.audits) for stream in self._streams.values()]
        known += [self._figures.num_exits] if self._figures else []
        if any(number != num_exits for number in known):
            raise OptionError(
                f"monitor: it is for {known[0]} exits, the model has {num_exits}; make another with this model's "
                f"certificate"
            )
        with self._lock:
            if self._figures is None:
                self._figures = FiguresBySource(num_exits, self.options.max_sources)
                for name in self._streams:
                    self._figures.of(name)
            self._unlearned = frozenset(unlearned)

    def policy_changed(self, policy: Policy) -> None:
        """The runner's next requests have this policy. What forces full depth stays in force."""
        sha256 = policy.sha256
        with self._lock:
            self._policy = policy
            self._has_vetoes = any(found.veto != Veto() for found in (policy, *policy.sources.values()))
            for stream in self._streams.values():
                stream.policy_changed(sha256)
        self._tell()

    def begin(self, source: str, num_rows: int, setting: Setting) -> Watch:
        """A request begins: which of its rows are audited, or that all go to full depth. Never raises."""
        watch = Watch(self, source, setting.policy_of(source))
        try:
            with self._lock:
                watch.counts_vetoes = self._has_vetoes
                stream = self._streams.get(source) or self._streams.get("")
                if stream is not None and num_rows:
                    self._enter(watch, stream, num_rows, setting.policy is self._policy)
        except Exception:
            self._failed("at the beginning of a request")
        return watch

    def observe(self, watch: Watch, result: Result) -> None:
        """A request has its answer; the reasons of its audited rows are set right in it. Never raises."""
        try:
            stream = watch.stream
            if watch.audited is None:
                watch.exits = exits = result.exit_index.tolist()
            else:
                exits = result.exit_index.tolist()
                watch.compare(result, stream.baseline.class_index if stream else -1)
            unscored = self._unlearned if watch.policy.score == LEARNED else ()
            with self._lock:
                figures = self._figures_of(watch.source)
                figures.add(exits, watch.exits, result.score.tolist(), result.reason, unscored)
                figures.vetoes += sum(watch.vetoes)
                figures.add_retention(watch.retention)
                self._end(watch)
            if self._changes:
                self._tell()
        except Exception:
            self._failed("noting an answer")

    def forget(self, watch: Watch) -> None:
        """A request has no answer. Never raises."""
        try:
            with self._lock:
                watch.exits, watch.audits = (), ()
                self._figures_of(watch.source).failed += 1
                self._end(watch)
            if self._changes:
                self._tell()
        except Exception:
            self._failed("forgetting a request")

    # For whoever operates it

    def state_of(self, source: str = "") -> str:
        """The state that requests from `source` are in; see monitor_states. "" without a baseline."""
        stream = self._streams.get(source) or self._streams.get("")
        return stream.state if stream else ""

    def renew(self, baseline: Baseline, source: str = "") -> None:
        """Take another certificate, for `source` where that had one of its own: the state is normal again.

        Raises OptionError when there was none, or it is for another number of exits.
        """
        stream = self._streams.get(source)
        if stream is None or len(stream.audits) != len(baseline.exit_counts):
            raise OptionError(
                f"monitor: got a baseline of {len(baseline.exit_counts)} exits for source {source!r}, expected one to "
                f"take the place of another; make another monitor"
            )
        with self._lock:
            stream.renew(baseline)
        self._tell()

    def snapshot(self) -> Snapshot:
        """What was seen so far."""
        with self._lock:
            figures = self._figures
            return Snapshot(
                (self._process,),
                time.time(),
                figures.num_exits if figures else 0,
                {name: _frozen(found) for name, found in figures.by_source.items()} if figures else {},
                {name: _stream_snapshot(stream) for name, stream in self._streams.items()},
                self._lost,
                self._errors,
                self._sink.errors,
            )

    def wait_told(self, timeout_s: float = 5.0) -> bool:
        """Wait until all changes of state so far were told to `on_change`; whether they were."""
        return self._sink.wait(timeout_s)

    # Under the lock

    def _figures_of(self, source: str) -> Figures:
        assert self._figures is not None, "a monitor is attached before requests come"
        return self._figures.of(source)

    def _enter(self, watch: Watch, stream: Stream, num_rows: int, is_evidence: bool) -> None:
        """A request of `stream` begins."""
        watch.stream = stream
        if is_evidence:
            watch.epoch = stream.epoch
        positions = stream.chosen(num_rows)
        if positions:
            watch.is_forced = stream.forces_full_depth
            watch.audit(positions, num_rows, len(stream.audits))
        pending = self._pending[stream.name]
        pending.append(watch)
        if len(pending) > MOST_PENDING:
            self._lost += 1
            pending.popleft()
            self._drain(stream)

    def _end(self, watch: Watch) -> None:
        watch.is_done = True
        if watch.stream is not None:
            self._drain(watch.stream)

    def _drain(self, stream: Stream) -> None:
        """Requests that ended, up to the first that did not, are evidence."""
        pending = self._pending[stream.name]
        while pending and pending[0].is_done:
            watch = pending.popleft()
            if watch.exits and watch.epoch == stream.epoch:
                stream.update(watch.exits, watch.audits)

    # Without it

    def _tell(self) -> None:
        with self._lock:  # so that nobody tells of a later change first
            changes = self._changes[:]
            self._changes.clear()
            self._sink.put(changes)

    def _failed(self, doing: str) -> None:
        _LOG.exception("the monitor failed %s", doing)
        with self._lock:
            self._errors += 1


def _frozen(figures: Figures) -> SourceSnapshot:
    return SourceSnapshot(
        figures.rows,
        tuple(figures.depths),
        tuple(figures.exits),
        dict(figures.reasons),
        tuple(dict(bins) for bins in figures.scores),
        dict(figures.retention),
        figures.nan_scores,
        figures.vetoes,
        figures.failed,
    )


def _stream_snapshot(stream: Stream) -> StreamSnapshot:
    return StreamSnapshot(
        state=stream.state,
        cause=stream.cause,
        risk=stream.baseline.risk,
        max_risk=stream.baseline.max_risk,
        is_certified=stream.is_certified,
        trips=stream.trips,
        attempts=stream.recertification.attempts,
        audits=tuple(stream.audits),
        losses=tuple(stream.losses),
        current_audits=stream.risk.audits,
        current_losses=stream.risk.losses,
        mix_evidence=stream.mix.value if stream.mix else 0.0,
        mix_alarm=stream.mix_alarm,
        risk_evidence=stream.risk.value,
        risk_alarm=stream.risk_alarm,
        lifetime_alarm=stream.lifetime_alarm,
    )
