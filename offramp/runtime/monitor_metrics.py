"""A monitor's snapshot as Prometheus metrics; needs prometheus-client (`pip install 'offramp[metrics]'`).

REGISTRY.register(MonitorCollector(monitor.snapshot))   # then start_http_server(9464), of prometheus_client
print(exposition(merged(snapshots)))                    # the same as text, for a file that node_exporter reads
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from offramp.errors import OptionError
from offramp.runtime.monitor_figures import quantile
from offramp.runtime.monitor_snapshot import Bins, Snapshot, SourceSnapshot, StreamSnapshot
from offramp.runtime.monitor_states import STATES

if TYPE_CHECKING:
    from prometheus_client.core import Metric

QUANTILES = (0.05, 0.5, 0.95)

_Samples = Iterable[tuple[tuple[str, ...], float]]  # label values, value


class MonitorCollector:
    """Reads a snapshot at every scrape; for `prometheus_client.CollectorRegistry.register`."""

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        """`read` is `monitor.snapshot`, or anything else that gives one. Raises OptionError without the client."""
        _client()
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """All metrics of the snapshot as it is now."""
        snapshot = self._read()
        yield from _source_metrics(snapshot.sources)
        yield from _stream_metrics(snapshot.streams)
        total = snapshot.total
        scores = [((str(k),), bins) for k, bins in enumerate(total.scores)]
        yield _gauge("score_quantile", "Scores of the answers given.", ("exit", "quantile"), _quantiles(scores))
        kept: list[tuple[tuple[str, ...], Bins]] = [((), total.retention)]
        yield _gauge("retention_quantile", "Share of tokens kept.", ("quantile",), _quantiles(kept))
        blind = {"lost": snapshot.lost, "errors": snapshot.errors, "callbacks": snapshot.callback_errors}
        samples = [((cause,), float(count)) for cause, count in blind.items()]
        yield _counter("monitor_blind", "What the monitor could not see, or not tell.", ("cause",), samples)


def exposition(snapshot: Snapshot) -> str:
    """The snapshot in Prometheus's text format. Raises OptionError without prometheus-client."""
    client = _client()
    registry = client.CollectorRegistry()
    registry.register(MonitorCollector(lambda: snapshot))
    text: bytes = client.generate_latest(registry)
    return text.decode()


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as exc:
        raise OptionError(
            f"metrics: prometheus-client is not installed here ({exc}); run `pip install 'offramp[metrics]'`"
        ) from exc
    return prometheus_client


def _counter(name: str, about: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(f"offramp_{name}", about, labels=labels), samples)


def _gauge(name: str, about: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(f"offramp_{name}", about, labels=labels), samples)


def _filled(family: Any, samples: _Samples) -> Metric:
    for values, number in samples:
        family.add_metric(values, number)
    metric: Metric = family
    return metric


def _source_metrics(sources: Mapping[str, SourceSnapshot]) -> Iterator[Metric]:
    per_exit: list[tuple[str, str, Callable[[SourceSnapshot], tuple[int, ...]]]] = [
        ("rows", "Rows by the exit that answered them.", lambda found: found.depths),
        ("policy_rows", "Rows by the exit where the policy lets them leave.", lambda found: found.exits),
    ]
    for name, about, counts in per_exit:
        samples = [
            ((source, str(k)), float(count))
            for source, found in sources.items()
            for k, count in enumerate(counts(found))
        ]
        yield _counter(name, about, ("source", "exit"), samples)
    reasons = [((source, why), float(n)) for source, found in sources.items() for why, n in found.reasons.items()]
    yield _counter("reasons", "Rows by what released them.", ("source", "reason"), reasons)
    for name, about in (
        ("nan_scores", "Rows whose score was not a number."),
        ("vetoes", "Decisions where the score sufficed and another condition kept the row in."),
        ("failed", "Requests without an answer."),
    ):
        samples_of = [((source,), float(getattr(found, name))) for source, found in sources.items()]
        yield _counter(name, about, ("source",), samples_of)


def _stream_metrics(streams: Mapping[str, StreamSnapshot]) -> Iterator[Metric]:
    states = [((name, state), float(found.state == state)) for name, found in streams.items() for state in STATES]
    yield _gauge("monitor_state", "1 for the state that requests are in.", ("source", "state"), states)
    trips = [((name,), float(found.trips)) for name, found in streams.items()]
    yield _counter("monitor_trips", "Falls back to full depth.", ("source",), trips)
    for metric, about in (
        ("audits", "Rows compared with full depth, by the exit where the policy let them go."),
        ("losses", "Those of them that full depth answers otherwise."),
    ):
        samples = [
            ((name, str(k)), float(n)) for name, found in streams.items() for k, n in enumerate(getattr(found, metric))
        ]
        yield _counter(f"monitor_{metric}", about, ("source", "exit"), samples)
    evidence = []
    for name, found in streams.items():
        evidence.append(((name, "exit_mix"), found.mix_evidence / found.mix_alarm))
        evidence.append(((name, "risk"), found.risk_evidence / found.risk_alarm))
        evidence.append(((name, "lifetime"), found.wealth / found.lifetime_alarm))
    yield _gauge("monitor_evidence", "Evidence against the certificate; 1 is an alarm.", ("source", "test"), evidence)
    bounds = [((name,), found.risk_bound) for name, found in streams.items()]
    yield _gauge("monitor_risk_bound", "The risk is at most this, at 95 %.", ("source",), bounds)


def _quantiles(bins: Iterable[tuple[tuple[str, ...], Bins]]) -> Iterator[tuple[tuple[str, ...], float]]:
    return (((*labels, str(q)), quantile(found, q)) for labels, found in bins if found for q in QUANTILES)
