"""The frontier: accuracy on test sentences against the mean time of one row, measured and drawn.

offramp is a curve, one point per accuracy that the thresholds were allowed to cost on validation; everything else is a
point. Drawn so that it reads in greyscale: the curves by their markers and lines, every point with its name beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from alternatives import FULL_DEPTH, INT8, OFFRAMP, UNCUT, Opened, runner_answer
from subject import Dataset, Subject
from timed import time_requests

from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.trace import Trace
from offramp.tuning.calibrate import CalibrateOptions, calibrate
from offramp.tuning.replay import accuracy, mean_depth, replay

CURVES = {"fp32": OFFRAMP, "int8": INT8}
_MARKERS = {OFFRAMP: ("o", "-", "black"), INT8: ("s", "--", "dimgrey")}
# Where a label may stand beside its point, in points; the first place where it covers nothing is taken.
_PLACES = [(dx, dy) for dy in (8, -12, 22, -26, 36, -40, 50, -54) for dx in (8, -8, 0)]  # points, the nearest first


class Point(NamedTuple):
    """One place of the picture; `max_drop` is None where nothing was calibrated."""

    name: str
    mean_ms: float
    accuracy: float
    max_drop: float | None = None
    mean_depth: float | None = None


def record(subject: Subject, dataset: Dataset, precision: str = "fp32") -> Trace:
    """What every exit says about the rows of `dataset`."""
    with Runner.open(subject.bundle, "onnxruntime", Policy.full_depth(), 1, precision) as runner:
        return runner.record(dataset.batches, dataset.labels)


def measure_frontier(
    subject: Subject, opened: Opened, accuracies: dict[str, float], threads: int, seconds: float
) -> list[Point]:
    """All points in one interleaved measurement, one row a request; every policy has sessions of its own."""
    others = [a for a in opened.alternatives if a.alone and a.name not in (OFFRAMP, FULL_DEPTH, INT8)]
    answers = {a.name: a.answer for a in others}
    known = {a.name: Point(a.name, 0.0, accuracies[a.name]) for a in others}
    with ExitStack() as stack:
        for precision, curve in CURVES.items():
            if precision not in subject.manifest.segments[0].graphs:
                continue
            validation, test = (record(subject, d, precision) for d in (subject.validation, subject.test))
            for drop in subject.max_drops:
                policy = calibrate(validation, CalibrateOptions(max_drop=drop)).policy
                decided = replay(policy, test)
                runner = Runner.open(subject.bundle, "onnxruntime", policy, threads, precision)
                key = f"{curve}, {drop}"
                answers[key] = runner_answer(stack.enter_context(runner))
                right = accuracy(decided.prediction, test.labels)
                known[key] = Point(curve, 0.0, right, drop, round(mean_depth(decided.exit_index), 3))
        found = time_requests(answers, subject.requests(1), seconds)
    return [point._replace(mean_ms=found[key]["mean_ms"]) for key, point in known.items()]


def accuracy_at(points: Sequence[Point], curve: str, mean_ms: float) -> float | None:
    """The accuracy of `curve` where it takes `mean_ms`, between its points; None outside of it."""
    ordered = sorted((point.mean_ms, point.accuracy) for point in points if point.name == curve)
    for (left, low), (right, high) in itertools.pairwise(ordered):
        if left <= mean_ms <= right:
            return low + (high - low) * (mean_ms - left) / max(right - left, 1e-9)
    return None


def draw_frontier(points: Sequence[Point], path: Path, title: str, num_rows: int) -> None:
    """Write the picture to `path`; its suffix (.svg, .png) says how."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # the same points give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.4), layout="constrained")
    axes.set_xscale("log")
    for curve, (marker, line, colour) in _MARKERS.items():
        chosen = sorted((point for point in points if point.name == curve), key=lambda point: point.mean_ms)
        if chosen:
            label = f"{curve}, labelled by the drop allowed on validation"
            places = [p.mean_ms for p in chosen], [p.accuracy for p in chosen]
            axes.plot(*places, line, marker=marker, color=colour, label=label)
    single = [point for point in points if point.max_drop is None]
    places = [p.mean_ms for p in single], [p.accuracy for p in single]
    axes.plot(*places, "x", color="black", label="alternatives")
    top = next(point.accuracy for point in points if point.name == UNCUT)
    axes.axhline(top, color="darkgrey", linewidth=1, zorder=0, label="accuracy of the uncut model")
    axes.axhline(top - 0.01, color="darkgrey", linewidth=1, linestyle=":", zorder=0, label="one point less")
    axes.set_xlabel("mean time of one row, ms (log scale, left is better)")
    axes.set_ylabel(f"accuracy on {num_rows} test rows")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.12, y=0.12)
    _set_ticks(axes, [point.mean_ms for point in points])
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _place_labels(figure, axes, points)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=130)
    pyplot.close(figure)


def _set_ticks(axes: Any, times_ms: Sequence[float]) -> None:
    """Plain numbers on the log axis."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    steps = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    low, high = min(times_ms) / 1.3, max(times_ms) * 1.3
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlim(low, high)


def _drawn_pixels(axes: Any, points: Sequence[Point]) -> Any:
    """Where points and curves are, (P, 2) pixels."""
    at = [axes.transData.transform([(point.mean_ms, point.accuracy) for point in points])]
    for curve in CURVES.values():
        bends = sorted((point.mean_ms, point.accuracy) for point in points if point.name == curve)
        for ends in itertools.pairwise(bends):
            at.append(np.linspace(*axes.transData.transform(ends), 40))
    return np.concatenate(at)


def _place_labels(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Name every point where the name covers no point and no other name."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    at = _drawn_pixels(axes, points)
    taken: list[Any] = []
    for point in sorted(points, key=lambda p: p.max_drop is not None):
        text = point.name if point.max_drop is None else f"{100 * point.max_drop:g} %"
        best = None
        for dx, dy in _PLACES:
            align = "left" if dx > 0 else "right" if dx < 0 else "center"
            label = axes.annotate(
                text,
                (point.mean_ms, point.accuracy),
                (dx, dy),
                textcoords="offset points",
                ha=align,
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5} if abs(dy) > 15 else None,
            )
            box = label.get_window_extent(renderer).padded(2)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            hits = (
                sum(box.contains(x, y) for x, y in at)
                + 5 * sum(box.overlaps(other) for other in taken)
                + 9 * (not inside)
            )
            if best is None or hits < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hits, label, box)
            else:
                label.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[2])
