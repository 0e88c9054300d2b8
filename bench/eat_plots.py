"""The paper's figures of ours, in one picture: frontier, where rows leave, and what is left of them by length."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from eat_points import AS_STATIC, CERTIFIED, DENSE, EAT, FASTEST, FULL_DEPTH, PATIENCE, STATIC

from offramp.storage import write_file
from offramp.trace import Trace

_MARKS = {
    DENSE: ("D", "black"),
    STATIC: ("s", "dimgrey"),
    EAT: ("o", "black"),
    CERTIFIED: ("^", "black"),
    PATIENCE: ("v", "dimgrey"),
    FASTEST: ("P", "dimgrey"),
    AS_STATIC: ("X", "black"),
    FULL_DEPTH: ("d", "darkgrey"),
}
_LENGTH_BINS = 8


def draw(
    rows: Sequence[Mapping[str, Any]], tests: Sequence[Trace], exits: Sequence[int], name: str, path: Path
) -> None:
    """Write the picture as an SVG; it reads in greyscale."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "offramp"  # the same figures give the same file
    from matplotlib import pyplot

    widths = [1.4, 1.1, 1] if all(test.retention.shape[1] for test in tests) else [1.4, 1.1]
    size = 13 / 3.5 * sum(widths), 4.6
    figure, axes = pyplot.subplots(1, len(widths), figsize=size, layout="constrained", width_ratios=widths)
    _frontier(axes[0], rows)
    _leaving(axes[1], rows, exits)
    if len(widths) == 3:
        _retention(axes[2], tests)
    figure.suptitle(name, fontsize=11)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    write_file(path, stream.getvalue())


def _frontier(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy over the mean time of one row, means over seeds, with their deviations."""
    for model, (marker, colour) in _MARKS.items():
        chosen = sorted((row for row in rows if row["model"] == model), key=lambda row: row["latency_ms"])
        if not chosen:
            continue
        x, y = [row["latency_ms"] for row in chosen], [100 * row["accuracy"] for row in chosen]
        line = "-" if model == EAT else ":" if len(chosen) > 1 else ""
        bars = [100 * row["accuracy_sd"] for row in chosen]
        axes.errorbar(x, y, bars, marker=marker, ls=line, color=colour, lw=1, elinewidth=0.6, capsize=2, label=model)
        if model == EAT:
            for row, left, up in zip(chosen, x, y, strict=True):
                axes.annotate(row["tau"], (left, up), (3, -11), textcoords="offset points", fontsize=7)
    top = next(100 * row["accuracy"] for row in rows if row["model"] == DENSE)
    axes.axhline(top - 1, color="darkgrey", lw=1, ls=":", zorder=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean time of one row, ms (dotted: one point below dense)")
    axes.set_ylabel("accuracy on test rows, %")
    axes.legend(fontsize=7, frameon=False)


def _leaving(axes: Any, rows: Sequence[Mapping[str, Any]], exits: Sequence[int]) -> None:
    """Where rows leave, a bar per policy."""
    chosen = [row for row in rows if len(row["shares"]) == len(exits) and row["model"] != FULL_DEPTH]
    names = [f"{row['model'].removeprefix('eat, ')} {row['tau']}".strip() for row in chosen]
    left = np.zeros(len(chosen))
    greys = np.linspace(0.25, 0.9, len(exits))
    for k, layers in enumerate(exits):
        values = np.array([100 * row["shares"][k] for row in chosen])
        axes.barh(names, values, left=left, color=str(greys[k]), edgecolor="white", label=f"after {layers}")
        left += values
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("rows that leave, %")
    axes.legend(fontsize=7, frameon=False, ncols=len(exits), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _retention(axes: Any, tests: Sequence[Trace]) -> None:
    """The share of tokens that the final exit sees, over the length of a row: median and the middle 90 %."""
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("tokens left at the final exit, %")
    lengths = np.concatenate([test.lengths for test in tests])
    left = 100 * np.concatenate([test.retention[:, -1] for test in tests])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _LENGTH_BINS + 1)))
    which = np.digitize(lengths, edges[1:-1], right=True)
    groups = [left[which == k] for k in np.unique(which)]
    middles = [float(lengths[which == k].mean()) for k in np.unique(which)]
    low, median, high = (np.array([np.percentile(group, share) for group in groups]) for share in (5, 50, 95))
    axes.fill_between(middles, low, high, color="lightgrey")
    axes.plot(middles, median, "o-", color="black", ms=4)
    axes.set_ylim(0, 100)
