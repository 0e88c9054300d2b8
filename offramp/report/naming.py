"""Where the names of points go: a small figure with a dozen points, and no name over another or over a point.

Greedy: the policy's name first, each at the place around its point where it and the line to it cover least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from offramp.report.findings import Alternative
from offramp.report.svg import ACCENT, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IN_SHORT = {
    "fixed threshold 0.9": "0.9 everywhere",
    "conformal risk control, one threshold": "conformal",
    "certified, one threshold": "one threshold",
}
_NAMING = ("chosen", "full depth", "uncut", "fixed 0.9", "tuned", "measured", "exit alone", "sweep")
_Box = tuple[float, float, float, float]  # left, bottom, right, top in points


def name_points(axes: Axes, alternatives: Sequence[Alternative], height: Callable[[Alternative], float | None]) -> None:
    """Write each name where it covers neither a point nor another name, the policy's first."""
    named = [(p, y) for p in alternatives if (y := height(p)) is not None]
    taken = [_box(axes, p.ms, y, (0, 0), 1) for p, y in named if p.kind not in ("sweep", "chosen")]
    taken += [_box(axes, p.ms, y, (0, -4), 2) for p, y in named if p.kind == "chosen"]
    swept = [(p.ms, y) for p, y in named if p.kind == "sweep"]
    for (x, y), (u, v) in pairwise(swept):
        taken += [_box(axes, x + part * (u - x), y + part * (v - y), (0, 0), 0) for part in (0, 0.25, 0.5, 0.75)]
    for point, y in sorted(named, key=lambda item: _NAMING.index(item[0].kind)):
        if point.kind == "sweep":
            continue
        text = _IN_SHORT.get(point.name, point.name.partition(",")[0].removesuffix(" alone"))
        beside = 7 + 3.1 * len(text)
        near = [(0.0, 12.0), (0.0, -20.0), (beside, -4.0), (-beside, -4.0), (beside, 12.0), (beside, -20.0)]
        far = [(x, y) for y in (-36.0, -52.0, -68.0, 28.0) for x in (0.0, beside, -beside, 2 * beside)]
        spots = near + far
        boxes = [_box(axes, point.ms, y, spot, len(text)) for spot in spots]
        lines = [_line(axes, point.ms, y, spot) if spot in far else [] for spot in spots]
        costs = [
            3 * _hidden(axes, box) + sum(_overlap(part, other) for part in (box, *line) for other in taken)
            for box, line in zip(boxes, lines, strict=True)
        ]
        best = costs.index(min(costs))
        taken += [boxes[best], *lines[best]]
        is_chosen = point.kind == "chosen"
        axes.annotate(
            text,
            (point.ms, y),
            spots[best],
            textcoords="offset points",
            ha="center",
            color=ACCENT if is_chosen else MUTED if point.kind == "exit alone" else INK,
            weight="bold" if is_chosen else "normal",
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkB": 4} if best >= len(near) else None,
            zorder=5,
        )


def _box(axes: Axes, x: float, y: float, offset: tuple[float, float], num_characters: int) -> _Box:
    """Where a text, or a dot of one or no character, lies on the figure."""
    left, bottom = axes.transData.transform((x, y))
    centre, base = float(left) + offset[0], float(bottom) + offset[1]
    if num_characters <= 1:
        reach = 3.0 + 3 * num_characters
        return centre - reach, base - reach, centre + reach, base + reach
    return centre - 3.1 * num_characters, base - 2, centre + 3.1 * num_characters, base + 10


def _line(axes: Axes, x: float, y: float, offset: tuple[float, float]) -> list[_Box]:
    """What the line from a point to its name runs over, as dots; the first are left out, for they lie on the point."""
    return [_box(axes, x, y, (part * offset[0], part * offset[1]), 0) for part in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]


def _overlap(one: _Box, other: _Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _hidden(axes: Axes, box: _Box) -> float:
    """How much of a text would lie outside the axes, in points squared."""
    frame = axes.get_window_extent()
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return (box[2] - box[0]) * (box[3] - box[1]) - inside
