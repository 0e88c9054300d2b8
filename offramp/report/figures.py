"""The figures of the report, each from its findings. Drawn small, so that their text can be read on a phone.

Nothing is drawn per row: a trace of a million rows gives a page of the same size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from offramp.report.findings import (
    Alternative,
    Confusion,
    ExitFinding,
    Findings,
    RetentionBin,
    RiskPath,
    Waterfall,
)
from offramp.report.naming import name_points
from offramp.report.svg import ACCENT, CARD, INFO, INK, MUTED, SOFT, WARN, drawing, printable
from offramp.report.words import RISK_AXES, share
from offramp.tuning.diagnostics import Quality, ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, HALF, SMALL = 420.0, 360.0, 170.0  # points; 1 pt of text is 0.8 to 1 px on a phone
BAR = 23.0  # height of one horizontal bar
_MOST_CLASSES = 20  # of a confusion matrix that can be read
_LONGEST_NAME = 14


def frontier(found: Findings) -> str:
    """Accuracy (agreement without labels) over mean time, of the policy and everything else."""
    labelled = found.chosen.accuracy is not None

    def height(point: Alternative) -> float | None:
        value = point.accuracy if labelled else point.agreement
        return None if value is None else 100 * value

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        swept = [p for p in found.alternatives if p.kind == "sweep"]
        axes.plot([p.ms for p in swept], [height(p) or 0 for p in swept], "-", color=MUTED, lw=1.2, zorder=2)
        axes.plot([p.ms for p in swept], [height(p) or 0 for p in swept], "o", color=MUTED, ms=2.6, zorder=2)
        marks = {"exit alone": ("s", SOFT, 6.0), "full depth": ("D", INK, 6.5), "uncut": ("D", CARD, 6.5)}
        marks |= {
            "fixed 0.9": ("^", INFO, 8.0),
            "tuned": ("v", INFO, 6.5),
            "measured": ("o", CARD, 6.0),
            "chosen": ("o", ACCENT, 11.0),
        }
        for point in sorted(found.alternatives, key=lambda p: p.kind == "chosen"):
            y = height(point)
            if point.kind == "sweep" or y is None:
                continue
            marker, fill, size = marks[point.kind]
            edge = CARD if point.kind in ("chosen", "fixed 0.9", "tuned") else INK if fill == CARD else fill
            axes.plot([point.ms], [y], marker, color=fill, mec=edge, mew=1.2, ms=size, zorder=4)
        axes.margins(x=0.1, y=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel("mean time per row, ms")
        _title_axis(axes, "accuracy, %" if labelled else "same answer as full depth, %")
        figure.draw_without_rendering()  # settles the layout, which the names need to know
        name_points(axes, found.alternatives, height)

    quality = "accuracy" if labelled else "agreement with full depth"
    return drawing("frontier", (WIDE, 300), f"Scatter of {quality} over mean time per row for each alternative", draw)


def leaving(exits: tuple[ExitFinding, ...]) -> str:
    """Share of the rows that leave at each exit."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values = [100 * found.share for found in exits]
        axes.barh(range(len(exits)), values, color=ACCENT, height=0.62)
        for k, value in enumerate(values):
            axes.text(value + 1.2, k, f"{value:.1f}", va="center", color=INK)
        _exit_rows(axes, [f"exit {k}" for k in range(len(exits) - 1)] + ["final exit"])
        axes.set_xlim(0, max(values) * 1.14 + 2)
        axes.set_xlabel("% of the rows")

    return drawing(
        "leaving", (HALF, 52 + BAR * max(len(exits), 3)), "Bars: share of the rows leaving at each exit", draw
    )


def survivors(exits: tuple[ExitFinding, ...]) -> str:
    """Share of the rows that each segment still runs for."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        reached = [100 * found.reached for found in exits]
        edges = [k - 0.5 for k in range(len(exits) + 1)]
        axes.stairs(reached, edges, fill=True, color=ACCENT, alpha=0.22)
        axes.stairs(reached, edges, color=ACCENT, lw=2.0)
        for k, value in enumerate(reached):
            axes.text(k, value + 3, f"{value:.0f}", ha="center", color=INK, fontsize=9 if len(exits) > 8 else 11)
        axes.set_ylim(0, 114)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xticks(range(len(exits)), [str(k) for k in range(len(exits))])
        axes.grid(False, axis="x")
        axes.set_xlabel("segment")
        _title_axis(axes, "rows it runs for, %")

    return drawing("survivors", (HALF, 210), "Steps: share of the rows still there at each segment", draw)


def waterfall(found: Waterfall) -> str:
    """From full depth to the policy, one bar per saving or cost."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        level = 0.0
        top = max(step.ms for step in found.steps if step.kind == "level")
        digits = max(0, 2 - math.floor(math.log10(top)))
        for row, step in enumerate(found.steps):
            if step.kind == "level":
                axes.barh(row, step.ms, color=SOFT, height=0.62)
                level, end = step.ms, step.ms
            else:
                end = level + step.ms
                axes.barh(row, step.ms, left=level, color=ACCENT if step.ms <= 0 else WARN, height=0.62)
            if row + 1 < len(found.steps):
                axes.plot([end, end], [row - 0.31, row + 1.31], color=MUTED, lw=0.8)
            text = f"{step.ms:.{digits}f}" if step.kind == "level" else f"{step.ms:+.{digits}f}".replace("-", "−")
            text = "0" if round(step.ms, digits) == 0 else text
            right = max(level, end) + 0.012 * top
            axes.text(right, row, text, va="center", color=INK)
            level = end
        axes.set_yticks(range(len(found.steps)), [_short(step.name, 26) for step in found.steps])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, top * 1.14)
        axes.set_xlabel("ms per row, on average over all rows")

    return drawing(
        "waterfall", (WIDE, 54 + BAR * len(found.steps)), "Waterfall of time per row, from full depth down", draw
    )


def reliability(exit_index: int, found: Quality, title: str) -> str:
    """Accuracy over confidence at one exit; the area of a dot is its share of the rows."""
    total = sum(point.num_rows for point in found.reliability)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, dashes=(3, 3))
        for point in found.reliability:
            colour = WARN if _is_off(point) else ACCENT
            axes.plot([point.confidence] * 2, [point.confidence, point.accuracy], color=colour, lw=1.4, alpha=0.7)
            size = 3.0 + 13.0 * (point.num_rows / total) ** 0.5
            axes.plot([point.confidence], [point.accuracy], "o", ms=size, color=colour, mec=CARD, mew=0.7, alpha=0.9)
        axes.set_xlim(-0.03, 1.05)
        axes.set_ylim(-0.03, 1.08)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.set_xlabel("confidence")
        _title_axis(axes, "accuracy")

    name = f"reliability-{exit_index}"
    return drawing(name, (SMALL, SMALL), f"Reliability diagram of {title}: accuracy over confidence", draw)


def _is_off(point: ReliabilityBin) -> bool:
    """More than two standard errors away from its confidence."""
    error = (max(point.confidence * (1 - point.confidence), 1e-4) / point.num_rows) ** 0.5
    return bool(abs(point.accuracy - point.confidence) > 2 * error)


def risk_path(path: RiskPath, chosen: Alternative) -> str:
    """Losses and their upper bound along the sequence of a test, and the part that is certified."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        depth = [point.mean_depth for point in path.points]
        bound = [100 * point.upper_bound for point in path.points]
        seen = [100 * point.losses / max(path.num_rows, 1) for point in path.points]
        top = 1.15 * max(200 * path.max_risk, *(y for y in bound if y <= 400 * path.max_risk))
        certified = [point.mean_depth for point in path.points if point.certified]
        axes.axvspan(min(certified), max(certified), color=ACCENT, alpha=0.14, lw=0)
        axes.axvline(min(certified), color=ACCENT, lw=1.6)
        axes.axhline(100 * path.max_risk, color=WARN, lw=1.4, dashes=(4, 3))
        axes.plot(depth, bound, "-", color=INK, lw=1.8)
        axes.plot(depth, seen, "o", color=INFO, ms=3.4)
        entries = [("upper bound", INK, "-"), ("seen", INFO, "o"), ("certified", ACCENT, "s")]
        entries.append((f"allowed: {share(path.max_risk)}", WARN, "-"))
        low, high = min(depth), max(depth)
        if path.risk == "consistency" and chosen.mean_depth and chosen.agreement is not None:
            changed = 100 * (1 - chosen.agreement)
            marker = "o" if changed <= top else "^"  # an arrow: it lies above
            axes.plot(
                [chosen.mean_depth], [min(changed, top)], marker, color=ACCENT, mec=CARD, ms=10, clip_on=False, zorder=5
            )
            entries.append(("this policy, on all rows", ACCENT, marker))
            low, high = min(low, chosen.mean_depth), max(high, chosen.mean_depth)
        axes.set_ylim(min(0.0, *seen), top)
        pad = 0.05 * (high - low) or 0.5
        axes.set_xlim(high + pad, low - pad)  # deeper on the left: the test walks to the right
        axes.set_xlabel("mean depth, segments (the test walks to the right)")
        _title_axis(axes, RISK_AXES[path.risk])
        _key(axes, entries)

    return drawing("risk-path", (WIDE, 280), "Risk and its upper bound along the path of thresholds", draw)


def agreement(matrix: tuple[tuple[float, ...], ...]) -> str:
    """Share of the rows to which two exits say the same."""
    names = [str(k) for k in range(len(matrix))]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        cells = [[100 * value for value in row] for row in matrix]
        low = min(min(row) for row in cells)
        texts = [[f"{value:.0f}" for value in row] for row in cells]
        _heat(axes, [[(value - low) / (100 - low or 1) for value in row] for row in cells], texts, names)
        axes.set_xlabel("exit")
        axes.set_ylabel("exit")

    return drawing("agreement", (340, 310), "Matrix: share of the rows to which two exits give the same answer", draw)


def confusion(found: Confusion) -> str | None:
    """Answers against labels; None where there are too many classes to read."""
    if len(found.names) > _MOST_CLASSES:
        return None
    names = [_short(name, _LONGEST_NAME if len(found.names) <= 6 else 6) for name in found.names]
    if len(set(names)) < len(names):
        names = [str(c) for c in range(len(names))]  # cut short they look the same

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        totals = [max(sum(row), 1) for row in found.counts]
        shares = [[value / total for value in row] for row, total in zip(found.counts, totals, strict=True)]
        _heat(axes, shares, [[str(value) if value else "" for value in row] for row in found.counts], names)
        if len(names) > 6:
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_xlabel("the policy's answer")
        axes.set_ylabel("label" if found.reference == "label" else "full depth's answer")

    return drawing("confusion", (340, 310), f"Matrix: the policy's answers against the {found.reference}", draw)


def overthinking(exits: tuple[ExitFinding, ...]) -> str:
    """Rows that going on from an exit wins and loses."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        early = exits[:-1]
        won = [found.won_later or 0 for found in early]
        lost = [-(found.lost_later or 0) for found in early]
        axes.barh(range(len(early)), won, color=ACCENT, height=0.62)
        axes.barh(range(len(early)), lost, color=WARN, height=0.62)
        reach = max([*won, *(-value for value in lost), 1])
        for k, (gain, loss) in enumerate(zip(won, lost, strict=True)):
            axes.text(gain + 0.02 * reach, k, str(gain), va="center", color=INK)
            axes.text(loss - 0.02 * reach, k, str(-loss), va="center", ha="right", color=INK)
        axes.axvline(0, color=MUTED, lw=1)
        _exit_rows(axes, [f"exit {found.exit_index}" for found in early])
        axes.set_xlim(min(lost, default=0) - 0.16 * reach, max(won, default=0) + 0.16 * reach)
        axes.set_xticks([])
        axes.set_xlabel("rows spoiled by going on  |  rows won by going on")

    return drawing(
        "overthinking",
        (HALF, 48 + BAR * max(len(exits) - 1, 3)),
        "Bars: rows won and spoiled by going on to the end",
        draw,
    )


def retention(bins: tuple[RetentionBin, ...]) -> str:
    """Tokens kept over the length of a row: median and the middle 90 %."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        centres = list(range(len(bins)))
        for x, found in zip(centres, bins, strict=True):
            axes.plot([x, x], [100 * found.p5, 100 * found.p95], color=ACCENT, lw=7, alpha=0.3)
        axes.plot(centres, [100 * found.p50 for found in bins], "o-", color=ACCENT, ms=5.5, mec=CARD, lw=1.6)
        axes.set_xticks(centres, [_span(found) for found in bins])
        axes.set_ylim(0, 106)
        axes.set_xlim(-0.6, len(bins) - 0.4)
        axes.grid(False, axis="x")
        axes.set_xlabel("tokens of the row")
        _title_axis(axes, "tokens kept where it left, %")

    return drawing(
        "retention", (HALF, 230), "Token retention over the length of a row: median and 5th to 95th percentile", draw
    )


def _span(found: RetentionBin) -> str:
    return str(found.shortest) if found.shortest == found.longest else f"{found.shortest}–{found.longest}"


def _heat(axes: Axes, values: list[list[float]], texts: list[list[str]], names: list[str]) -> None:
    """A matrix of cells with a text in each; `values` in [0, 1]. Never so dark that the text cannot be read."""
    from matplotlib.patches import Rectangle

    size = len(names)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, color=ACCENT, alpha=0.04 + 0.5 * value, lw=0))
            if texts[i][j]:
                axes.text(
                    j,
                    i,
                    texts[i][j],
                    ha="center",
                    va="center",
                    color=INK,
                    fontsize=11 if size < 7 else 8 if size < 13 else 6,
                )
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_xticks(range(size), names)
    axes.set_yticks(range(size), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _exit_rows(axes: Axes, names: list[str]) -> None:
    """Exits from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _title_axis(axes: Axes, text: str) -> None:
    """The name of the upright axis, level and above it: nobody has to turn their head."""
    axes.set_title(text, loc="left", fontsize=10, color=MUTED, pad=8)


def _key(axes: Axes, entries: list[tuple[str, str, str]]) -> None:
    """A small legend without a box."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=colour, ls="-" if mark == "-" else "", marker="" if mark == "-" else mark, ms=5, label=text
        )
        for text, colour, mark in entries
    ]
    axes.legend(handles=handles, loc="best", frameon=False, labelcolor=INK, fontsize=9.5, handlelength=1.2)


def _short(text: str, most: int) -> str:
    text = printable(text).replace("\n", " ")
    return text if len(text) <= most else text[: most - 1] + "…"
