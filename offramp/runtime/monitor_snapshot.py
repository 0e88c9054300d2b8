"""What a monitor has seen, as plain data: JSON, and sums over processes.

Merging is commutative and associative: counters add up, states take the worse, evidence the larger. The evidence over
the whole life follows from counts, so that of merged snapshots is exact. A snapshot knows which processes are in it,
and none can be counted twice; take the latest of each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from offramp.binomial import upper_bound
from offramp.errors import DataError
from offramp.runtime.monitor_evidence import wealth
from offramp.runtime.monitor_figures import quantile
from offramp.runtime.monitor_states import STATES

SCHEMA = 1
_CURE = "write it again with `offramp run BUNDLE --monitor FILE`"

Bins = Mapping[int, int]  # bin of monitor_figures -> rows
_K = TypeVar("_K", int, str)


@dataclass(frozen=True)
class SourceSnapshot:
    """The counters of one source; see monitor_figures.Figures. Tuples have one entry per exit."""

    rows: int
    depths: tuple[int, ...]
    exits: tuple[int, ...]
    reasons: Mapping[str, int]
    scores: tuple[Bins, ...]
    retention: Bins
    nan_scores: int
    vetoes: int
    failed: int

    @property
    def mean_depth(self) -> float:
        """Segments executed per row, NaN for no rows."""
        return sum((k + 1) * count for k, count in enumerate(self.depths)) / self.rows if self.rows else float("nan")

    def merged(self, other: SourceSnapshot) -> SourceSnapshot:
        """Both."""
        return SourceSnapshot(
            self.rows + other.rows,
            _added(self.depths, other.depths),
            _added(self.exits, other.exits),
            _summed(self.reasons, other.reasons),
            tuple(_summed(left, right) for left, right in zip(self.scores, other.scores, strict=True)),
            _summed(self.retention, other.retention),
            self.nan_scores + other.nan_scores,
            self.vetoes + other.vetoes,
            self.failed + other.failed,
        )


@dataclass(frozen=True)
class StreamSnapshot:
    """How it stands with one certificate; see monitor_states.Stream."""

    state: str
    cause: str  # of that state
    risk: str
    max_risk: float
    is_certified: bool  # everywhere: the policy that runs is the one that was certified
    trips: int
    attempts: int  # of recertification, begun
    audits: tuple[int, ...]  # E: rows compared with full depth, by where the policy let them go
    losses: tuple[int, ...]  # E
    current_audits: int  # in the test of the risk that is running
    current_losses: int
    mix_evidence: float  # the largest of one process; an alarm at `mix_alarm`
    mix_alarm: float
    risk_evidence: float
    risk_alarm: float
    lifetime_alarm: float  # for `wealth`

    @property
    def wealth(self) -> float:
        """The evidence that the risk is above max_risk, over the life of the test that is running."""
        return wealth(self.current_audits, self.current_losses, self.max_risk)

    @property
    def risk_bound(self) -> float:
        """The risk in force is at most this, at 95 %; Clopper-Pearson over the audits of the test that is running."""
        return upper_bound(self.current_losses, self.current_audits, 0.05)

    def merged(self, other: StreamSnapshot) -> StreamSnapshot:
        """Both. Raises DataError when they are about different certificates."""
        for name in ("risk", "max_risk", "mix_alarm", "risk_alarm", "lifetime_alarm"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(
                    f"merging snapshots: {name} is {getattr(self, name)} in one and {getattr(other, name)} in another; "
                    f"expected snapshots of one certificate, watched alike"
                )
        worse = max(self, other, key=lambda stream: (STATES.index(stream.state), stream.cause))
        return dataclasses.replace(
            worse,
            is_certified=self.is_certified and other.is_certified,
            audits=_added(self.audits, other.audits),
            losses=_added(self.losses, other.losses),
            **{name: getattr(self, name) + getattr(other, name) for name in _ADDED},
            **{name: max(getattr(self, name), getattr(other, name)) for name in ("mix_evidence", "risk_evidence")},
        )


_ADDED = ("trips", "attempts", "current_audits", "current_losses")


@dataclass(frozen=True)
class Snapshot:
    """What the monitors of some processes have seen until `time_s`."""

    processes: tuple[str, ...]  # sorted: a name that each monitor drew for itself
    time_s: float  # since 1970, of the latest
    num_exits: int
    sources: Mapping[str, SourceSnapshot]
    streams: Mapping[str, StreamSnapshot]  # "": everybody without a certificate of their own
    lost: int  # requests that came too late to be evidence
    errors: int  # of the monitor itself, which cost a request its place in the figures
    callback_errors: int

    @property
    def is_blind(self) -> bool:
        """Whether something kept a monitor from seeing, or from telling."""
        return bool(self.lost or self.errors or self.callback_errors)

    @property
    def total(self) -> SourceSnapshot:
        """All sources together."""
        return reduce(SourceSnapshot.merged, self.sources.values(), empty_source(self.num_exits))

    def merged(self, other: Snapshot) -> Snapshot:
        """Both. Raises DataError when they are about different models or have a process in common."""
        if self.num_exits != other.num_exits:
            raise DataError(f"merging snapshots: got {self.num_exits} and {other.num_exits} exits, expected one model")
        if twice := sorted(set(self.processes) & set(other.processes)):
            raise DataError(f"merging snapshots: process {twice[0]} is in both; take the latest snapshot of each")
        return Snapshot(
            tuple(sorted(self.processes + other.processes)),
            max(self.time_s, other.time_s),
            self.num_exits,
            _joined(self.sources, other.sources),
            _joined(self.streams, other.streams),
            self.lost + other.lost,
            self.errors + other.errors,
            self.callback_errors + other.callback_errors,
        )

    def to_json(self) -> str:
        """The snapshot as JSON; `from_json` gives back exactly this snapshot."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "snapshot") -> Snapshot:
        """The snapshot written by `to_json`. Raises DataError when it is anything else."""
        try:
            document: Any = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
            raise DataError(f"{name} is not JSON: {exc}; {_CURE}") from exc
        if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
            raise DataError(f"{name}: expected a JSON object with schema {SCHEMA}; {_CURE}")
        try:
            sources = {source: _source(found) for source, found in document.pop("sources").items()}
            streams = {source: StreamSnapshot(**_tuples(found)) for source, found in document.pop("streams").items()}
            snapshot = cls(**_tuples(document), sources=sources, streams=streams)
            _check(snapshot)
        except (TypeError, AttributeError, KeyError, ValueError) as exc:
            raise DataError(f"{name} is no snapshot of a monitor ({exc}); {_CURE}") from exc
        return snapshot


def merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """All of them, at least one. Raises DataError."""
    return reduce(Snapshot.merged, snapshots)


def empty_source(num_exits: int) -> SourceSnapshot:
    """A source of which nothing was seen."""
    zeros = (0,) * num_exits
    return SourceSnapshot(0, zeros, zeros, {}, tuple({} for _ in zeros), {}, 0, 0, 0)


def lines_from_snapshot(snapshot: Snapshot) -> list[str]:
    """The snapshot in words."""
    total, last = snapshot.total, snapshot.num_exits
    lines = [
        f"{total.rows} rows of {len(snapshot.processes)} processes, "
        f"mean depth {total.mean_depth:.2f} of {last} segments"
    ]
    for name, stream in sorted(snapshot.streams.items()):
        lines += _stream_lines(name, stream)
    lines.append("left by the policy at each exit: " + ", ".join(_share(n, total.rows) for n in total.exits))
    lines.append("answered by each exit:           " + ", ".join(_share(n, total.rows) for n in total.depths))
    for k, bins in enumerate(total.scores):
        if bins:
            lines.append(f"scores at exit {k} (5 %, median, 95 %): {_quantiles(bins)}")
    if total.retention:
        lines.append(f"tokens kept (5 %, median, 95 %): {_quantiles(total.retention)}")
    lines += [f"reason {reason!r}: {_share(n, total.rows)}" for reason, n in sorted(total.reasons.items())]
    for name, found in sorted(snapshot.sources.items()):
        if name:
            lines.append(f"source {name!r}: {found.rows} rows, mean depth {found.mean_depth:.2f}")
    lines.append(f"scores that are no number: {total.nan_scores}; vetoes: {total.vetoes}; failed: {total.failed}")
    if snapshot.is_blind:
        lines.append(
            f"BLIND: {snapshot.lost} requests were lost to the tests, {snapshot.errors} to errors of the monitor, and "
            f"{snapshot.callback_errors} changes of state could not be told"
        )
    return lines


def _stream_lines(name: str, stream: StreamSnapshot) -> list[str]:
    who = f"source {name!r}" if name else "monitor"
    cause = f" ({stream.cause})" if stream.cause else ""
    certified = "" if stream.is_certified else "; the policy that runs is not the certified one"
    lines = [f"{who}: {stream.state.upper()}{cause}, {stream.trips} trips{certified}"]
    lines.append(
        f"  {stream.risk} at most {stream.max_risk:.2%}: {stream.current_losses} losses in {stream.current_audits} "
        f"audits, so at most {stream.risk_bound:.2%} at 95 %; {sum(stream.losses)} in {sum(stream.audits)} ever"
    )
    lines.append(
        f"  evidence, 1 is an alarm: exit mix {stream.mix_evidence / stream.mix_alarm:.2g}, risk "
        f"{stream.risk_evidence / stream.risk_alarm:.2g}, over the lifetime {stream.wealth / stream.lifetime_alarm:.2g}"
    )
    return lines


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})" if total else "0"


def _quantiles(bins: Bins) -> str:
    return ", ".join(f"{quantile(bins, share):.4f}" for share in (0.05, 0.5, 0.95))


def _added(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _summed(left: Mapping[_K, int], right: Mapping[_K, int]) -> dict[_K, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in left.keys() | right.keys()}


_Part = TypeVar("_Part", SourceSnapshot, StreamSnapshot)


def _joined(left: Mapping[str, _Part], right: Mapping[str, _Part]) -> dict[str, _Part]:
    joined = {**left, **right}
    for name in left.keys() & right.keys():
        joined[name] = left[name].merged(right[name])
    return joined


def _tuples(document: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}


def _bins(document: dict[str, Any]) -> dict[int, int]:
    return {int(index): count for index, count in document.items()}


def _source(document: dict[str, Any]) -> SourceSnapshot:
    values = _tuples(document)
    values["scores"] = tuple(map(_bins, document["scores"]))
    values["retention"] = _bins(document["retention"])
    return SourceSnapshot(**values)


def _check(snapshot: Snapshot) -> None:
    """Raise ValueError unless counts are counts, one per exit, and states are states."""
    counts = [snapshot.lost, snapshot.errors, snapshot.callback_errors]
    numbers = [snapshot.time_s]
    for found in snapshot.sources.values():
        counts += [*found.depths, *found.exits, *found.reasons.values(), *found.retention.values()]
        counts += [found.rows, found.nan_scores, found.vetoes, found.failed]
        for bins in found.scores:
            counts += bins.values()
        if {len(found.depths), len(found.exits), len(found.scores)} != {snapshot.num_exits}:
            raise ValueError(f"expected figures of {snapshot.num_exits} exits")
    for stream in snapshot.streams.values():
        if stream.state not in STATES or len(stream.audits) != len(stream.losses) or not 0 < stream.max_risk < 1:
            raise ValueError(f"got state {stream.state!r}")
        counts += [*stream.audits, *stream.losses, *(getattr(stream, name) for name in _ADDED)]
        alarms = [stream.mix_alarm, stream.risk_alarm, stream.lifetime_alarm]
        numbers += [stream.mix_evidence, stream.risk_evidence, *alarms]
        if min(alarms) <= 0:
            raise ValueError("evidence for an alarm is more than 0")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("counts are whole numbers, 0 or more")
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("times and evidence are numbers")
    if not all(isinstance(name, str) for name in snapshot.processes):
        raise ValueError("processes are names")
