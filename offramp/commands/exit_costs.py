"""What an exit costs: the bundle with all exits against the same without one of them, in this process.

Physics. A row that passes exit k pays, beyond the layers: the exit head and the score head (some 15 operators on a few
numbers: all launch), a second call into the engine, the gather of the rows that go on, the carry written and read, the
policy's decision and the runner's loop, and whatever the cut kept the backend from fusing. Nearly nothing of this
depends on the length of the row, and most of it runs with cold caches, because the layers' weights have gone through
them since the last exit: a loop over one segment would show a fifth of it. So whole passes of the runner are timed, on
real rows, row by row in rounds that hold every variant once, and only the segments that differ are compared. A row
that leaves at an exit pays for its head, too, but for no hand-over; that part stays with the segment.

Where precisions below FP32 run, the exit costs are measured on the FP32 graphs: heads, scores and the carry are FP32
in all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from offramp.bundle import Manifest, SegmentSpec, load_manifest, read_file
from offramp.commands.dataset import Inputs
from offramp.commands.uncut import load_reference, uncut_model
from offramp.errors import DataError, OptionError
from offramp.export.attention import fused_from_segment
from offramp.export.cut import CutModel, probed_graph, segments_from_probed
from offramp.export.export_bundle import reference_path
from offramp.export.recut import source_from_bundle, with_exits
from offramp.export.roles import Roles
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.backends import ONNXRUNTIME
from offramp.runtime.engine import Engine, SegmentOutput
from offramp.runtime.onnxruntime_engine import OnnxRuntimeEngine, open_session
from offramp.runtime.timing import interleaved_ms
from offramp.storage import write_file
from offramp.tuning.placement_data import Costs

_REPEATS = 3  # of every row; the fastest counts, which is the one that nothing else disturbed
_WARM_UP_ROUNDS = 8
_NEVER = 1e3  # a temperature at which no row is sure: every decision is made, nobody leaves

Progress = Callable[[str], None]
_Pass = Callable[[Inputs], list[float]]  # one row -> milliseconds of every segment


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs, and how well they add up: a single segment as measured, which should be all segments less all exits."""

    costs: Costs
    no_exits_ms: float
    num_rows: int

    @property
    def residual(self) -> float:
        """Predicted ÷ measured time of the chain without any early exit, less 1."""
        return float(self.costs.path_ms(())[-1]) / self.no_exits_ms - 1


def cached_costs(
    bundle: Path, runner: Runner, rows: Sequence[Inputs], threads: int, progress: Progress, is_anew: bool = False
) -> MeasuredCosts:
    """The costs measured before for these very engines and this number of threads, else measured now and kept.

    They lie in BUNDLE.reference/exit-costs/, because they are this machine's; `is_anew` measures in any case, and what
    cannot be read is measured again.
    """
    key = hashlib.sha256(f"{runner.manifest.fingerprint} {runner.precision} {threads}".encode()).hexdigest()[:16]
    path = reference_path(bundle) / "exit-costs" / f"{key}.json"
    kept = None if is_anew else _kept_costs(path)
    if kept is not None:
        return kept
    measured = measured_costs(bundle, runner, rows, threads, progress)
    write_file(path, (json.dumps(asdict(measured), indent=2) + "\n").encode())
    return measured


def _kept_costs(path: Path) -> MeasuredCosts | None:
    """What `cached_costs` wrote to `path`; None where there is nothing, or nothing that can be read."""
    try:
        document = json.loads(path.read_bytes())
        costs: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in document["costs"].items()
        }
        return MeasuredCosts(**document | {"costs": Costs(**costs)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, DataError):
        return None


def measured_costs(
    bundle: Path, runner: Runner, rows: Sequence[Inputs], threads: int, progress: Progress
) -> MeasuredCosts:
    """Time every segment, exit and the uncut model on `rows`, single rows, in turn.

    Raises OptionError for another backend than ONNX Runtime, and what reading and cutting the reference raises.
    """
    if runner.backend != ONNXRUNTIME:
        raise OptionError(
            f"place: what an exit costs cannot be measured on {runner.backend} yet, because each merged segment would "
            f"have to be built; pass --exit-ms, what a row pays for passing one"
        )
    progress("reading the whole graph, to cut it without each exit in turn")
    variants = _Variants.of(bundle, threads)
    num_early = len(runner.manifest.exits) - 1
    is_lowered = runner.precision != "fp32"
    passes: dict[str, _Pass] = {"all": _Clocked(runner.engines, runner.manifest)}
    with Runner.open(bundle, ONNXRUNTIME, Policy.full_depth(), threads, "fp32") as plain:
        if is_lowered:
            passes["fp32"] = _Clocked(plain.engines, plain.manifest)
        for k in range(num_early):
            progress(f"merging segments {k} and {k + 1}")
            passes[f"without {k}"] = variants.pass_without([k], plain)
        if num_early > 1:
            passes["none"] = variants.pass_without(range(num_early), plain)
        passes["uncut"] = variants.uncut_pass()
        progress(f"timing {len(passes)} variants on {len(rows)} rows, {_REPEATS} times each")
        times = _interleaved(passes, rows)
    return _costs_from_times(times, is_lowered)


def _costs_from_times(times: Mapping[str, NDArray[np.float64]], is_lowered: bool) -> MeasuredCosts:
    """Medians over the rows; an exit's cost is that of the differences, row by row, and at least 0."""
    chain = times["fp32" if is_lowered else "all"]  # (N, E)
    num_early = chain.shape[1] - 1
    exits_ms = [
        max(0.0, float(np.median(chain[:, k] + chain[:, k + 1] - times[f"without {k}"][:, k])))
        for k in range(num_early)
    ]
    segments_ms = np.median(times["all"], axis=0)
    # No uncut model exists in a lower precision: there one segment without early exits stands for it.
    uncut_ms = float(segments_ms.sum() - sum(exits_ms)) if is_lowered else float(np.median(times["uncut"]))
    costs = Costs(tuple(segments_ms.tolist()), tuple(exits_ms), uncut_ms)
    none = times.get("none", times.get("without 0", chain))
    no_exits_ms = float(costs.path_ms(())[-1]) if is_lowered else float(np.median(none.sum(axis=1)))
    return MeasuredCosts(costs, no_exits_ms, len(chain))


class _TimedEngine:
    """An engine that notes when it is called."""

    keeps_carries = True

    def __init__(self, engine: Engine) -> None:
        self.engine, self.called_at = engine, 0.0

    def run(self, carry: Any, rows: NDArray[np.int64], inverse_temperature: np.float32) -> SegmentOutput:
        self.called_at = perf_counter()
        return self.engine.run(carry, rows, inverse_temperature)

    def trimmed(self, carry: Any, dimension: str, size: int) -> Any:
        return self.engine.trimmed(carry, dimension, size)

    def merged(self, parts: Sequence[tuple[Any, NDArray[np.int64]]]) -> Any:
        return self.engine.merged(parts)

    def close(self) -> None:
        """The engine is not ours."""


class _Clocked:
    """A runner over some engines under which nobody leaves, and what each segment of a request took."""

    def __init__(self, engines: Sequence[Engine], manifest: Manifest) -> None:
        self.engines = [_TimedEngine(engine) for engine in engines]
        num_exits = len(engines)
        policy = Policy.thresholds("max_prob", [1.0] * (num_exits - 1), [_NEVER] * num_exits)
        self.runner = Runner(self.engines, manifest, policy)

    def __call__(self, inputs: Inputs) -> list[float]:
        """Milliseconds from one segment's call to the next, E; the first from the request on, the last to its end."""
        start = perf_counter()
        self.runner.run(inputs)
        moments = [start, *(engine.called_at for engine in self.engines[1:]), perf_counter()]
        return [1e3 * (after - before) for before, after in pairwise(moments)]


@dataclass(frozen=True)
class _Variants:
    """The whole graph of a bundle, ready to be cut with fewer exits and run in FP32."""

    bundle: Path
    manifest: Manifest
    threads: int
    whole: ModelProto
    cut_at: Callable[[Sequence[int]], CutModel]  # positions of exits
    is_fused: bool  # has the bundle attention as one operator?

    @classmethod
    def of(cls, bundle: Path, threads: int) -> _Variants:
        manifest = load_manifest(bundle)
        whole = load_reference(bundle, manifest)
        source = source_from_bundle(bundle, manifest, whole)
        roles = Roles(source.row_outputs, source.late)
        probed = probed_graph(whole, source.exits, source.inputs, source.dimensions, source.example, roles)

        def cut_at(kept: Sequence[int]) -> CutModel:
            chosen = with_exits(source, kept)
            return segments_from_probed(probed, chosen.exits, roles)

        segments = [onnx.load_model_from_string(read_file(bundle, s.graphs["fp32"])) for s in manifest.segments]
        is_fused = any(node.op_type == "MultiHeadAttention" for model in segments for node in model.graph.node)
        return cls(bundle, manifest, threads, whole, cut_at, is_fused)

    def pass_without(self, dropped: Sequence[int], plain: Runner) -> _Clocked:
        """The chain without the exits `dropped`; segments that are no others than those of `plain` are its engines."""
        kept = [k for k in range(len(self.manifest.exits)) if k not in dropped]
        cut = self.cut_at(kept)
        specs = tuple(
            SegmentSpec(
                index=segment.index,
                inputs=() if segment.index else tuple(spec.name for spec in self.manifest.inputs),
                carry_in=segment.carry_in,
                carry_out=segment.carry_out,
                graphs={},
            )
            for segment in cut.segments
        )
        manifest = replace(self.manifest, exits=tuple(self.manifest.exits[k] for k in kept), segments=specs, trims={})
        engines: list[Engine] = []
        for index, (k, before) in enumerate(zip(kept, [-1, *kept], strict=False)):
            old = self.manifest.segments[k]
            same = k == before + 1 and (old.carry_in, old.carry_out) == (specs[index].carry_in, specs[index].carry_out)
            engines.append(plain.engines[k] if same else self._engine(cut.segments[index].model, manifest, index))
        return _Clocked(engines, manifest)

    def _engine(self, model: ModelProto, manifest: Manifest, index: int) -> OnnxRuntimeEngine:
        model = fused_from_segment(model) if self.is_fused else model
        session = open_session(model.SerializeToString(), self.threads, f"segment {index} of {self.bundle}, cut again")
        return OnnxRuntimeEngine(session, manifest, index)

    def uncut_pass(self) -> _Pass:
        """The uncut model, opened as the segments are, and its classes."""
        model = uncut_model(self.whole, self.manifest.exits[-1].name)
        session = open_session(model.SerializeToString(), self.threads, str(reference_path(self.bundle)))

        def run(inputs: Inputs) -> list[float]:
            start = perf_counter()
            np.asarray(session.run(None, inputs)[0]).argmax(axis=1)
            return [1e3 * (perf_counter() - start)]

        return run


def _interleaved(passes: Mapping[str, _Pass], rows: Sequence[Inputs]) -> dict[str, NDArray[np.float64]]:
    """Milliseconds per segment, (rows, segments) for every pass: the fastest of `_REPEATS`.

    Each round is one row, and another pass comes first in the next one; the rows stand where the warm-up left off.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in passes}

    def asking(name: str) -> Callable[[], None]:
        coming = cycle(rows)
        return lambda: times[name].append(passes[name](next(coming)))

    interleaved_ms({name: asking(name) for name in passes}, _REPEATS * len(rows), _WARM_UP_ROUNDS)
    return {
        name: np.array(taken[_WARM_UP_ROUNDS:]).reshape(_REPEATS, len(rows), -1).min(axis=0)
        for name, taken in times.items()
    }
