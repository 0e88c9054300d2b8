"""Times the runs of a sweep: all variants of one seed interleaved in one process, on the same test rows.

A model with early exits runs under its bundle's policy; one without is the uncut model in ONNX Runtime, as one would
deploy it. Accuracy, depth and token retention are read off the traces of test rows, by replaying the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from offramp.bundle import Manifest, load_manifest, read_policy
from offramp.commands.benchmark import WARMUP_ROWS, Answer, asking, runner_answer, uncut_answer
from offramp.commands.dataset import Inputs, open_rows
from offramp.commands.sweep_run import Place, State, done, load_record
from offramp.commands.sweep_steps import BUNDLE, TEST, TEST_TRACE, TRACE, exported, graphs_of
from offramp.commands.sweeps import Measure
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.timing import interleaved_ms, summary
from offramp.trace import load_trace
from offramp.tuning.replay import accuracy, mean_depth, replay

BENCH = "bench"


def bench_folder(folder: Path, point: str, seed: int) -> Path:
    """Return where the times of one seed lie."""
    return folder / BENCH / point / f"seed-{seed}"


def bench_seed(folder: Path, places: Sequence[Place], measure: Measure) -> State:
    """Time the runs of one seed and grid point, unless that is done; all of them must have been recorded."""
    manifests = {place.run.name: exported(place)[0] for place in places}
    traced = [load_record(place.path, TRACE) for place in places]
    if any(manifest is None for manifest in manifests.values()) or any(not (r and r.result) for r in traced):
        return "waits"
    made_from = {
        "runs": {name: graphs_of(manifest) for name, manifest in manifests.items() if manifest is not None},
        "policies": {place.run.name: policy_of(place).to_json() for place in places},
        "traces": {place.run.name: made.result for place, made in zip(places, traced, strict=True) if made},
        "options": asdict(measure.bench),
    }
    first = places[0]

    def make() -> dict[str, Any]:
        result = {place.run.name: on_test_rows(place) for place in places}
        for size in measure.bench.batch_sizes:
            first.say(f"timing {len(places)} models of seed {first.run.seed} on requests of {size}")
            for name, figures in timed(places, manifests, size, measure).items():
                result[name] |= {f"{figure}_{size}": value for figure, value in figures.items()}
        return result

    return done(bench_folder(folder, first.run.point, first.run.seed), BENCH, made_from, make, first.say)


def timed(
    places: Sequence[Place], manifests: dict[str, Manifest | None], size: int, measure: Measure
) -> dict[str, dict[str, float]]:
    """Return mean, percentiles and rows per second of every run on requests of `size` test rows, interleaved."""
    bench = measure.bench
    with ExitStack() as stack:
        calls = {}
        for place in places:
            manifest = manifests[place.run.name]
            assert manifest is not None, "looked at before"
            runner = Runner.open(place.path / BUNDLE, bench.backend, None, bench.threads, bench.precision)
            stack.enter_context(runner)
            answer: Answer = runner_answer(runner)
            if len(manifest.exits) == 1:
                answer = uncut_answer(place.path / BUNDLE, manifest, bench.threads)
            calls[place.run.name] = asking(answer, requests_of(place, runner, size, bench.num_rows))
        rounds = -(-bench.num_rows // size)
        times_ms = interleaved_ms(calls, rounds, -(-WARMUP_ROWS // size))
    return {
        name: {**summary(times), "rows_per_s": 1e3 * size / float(times.mean())} for name, times in times_ms.items()
    }


def requests_of(place: Place, runner: Runner, size: int, num_rows: int) -> list[Inputs]:
    """Return test rows as requests of `size`, whole ones; the same texts for every run of a data set."""
    rows = open_rows(runner, str(exported(place)[1][TEST]), TEST, size, limit=max(size, num_rows))
    requests = [dict(batch.inputs) for batch in rows]
    return [inputs for inputs in requests if len(next(iter(inputs.values()))) == size] or requests


def on_test_rows(place: Place) -> dict[str, Any]:
    """Return, by replay: accuracy, or the mean absolute error of a regression; mean depth in segments; and the share of
    tokens that is left where rows leave, of a model that drops some.
    """
    trace = load_trace(place.path / TEST_TRACE)
    decided = replay(policy_of(place), trace)
    at = np.arange(len(decided.exit_index)), decided.exit_index
    found: dict[str, Any] = {"mean_depth": mean_depth(decided.exit_index), "segments": trace.num_exits}
    if trace.is_regression:
        found["error"] = float(np.nanmean(np.abs(trace.logits[(*at, 0)] - trace.targets)))
    else:
        found["accuracy"] = accuracy(decided.prediction, trace.labels)
    if trace.retention.shape[1]:
        found["retention"] = float(np.nanmean(trace.retention[at]))
    return found


def policy_of(place: Place) -> Policy:
    """Return the policy of a run's bundle. Raises BundleError."""
    bundle = place.path / BUNDLE
    return Policy.from_json(read_policy(bundle, load_manifest(bundle)))


def benched(place: Place) -> dict[str, Any]:
    """Return what timing said of a run as it is now; nothing where that was of other graphs or another policy."""
    record = load_record(bench_folder(place.folder, place.run.point, place.run.seed), BENCH)
    manifest, _ = exported(place)
    if record is None or record.result is None or manifest is None:
        return {}
    name = place.run.name
    graphs, policy = (record.made_from[key].get(name) for key in ("runs", "policies"))
    same = graphs == graphs_of(manifest) and policy == policy_of(place).to_json()
    return dict(record.result.get(name, {})) if same else {}
