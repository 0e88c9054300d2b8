"""What is counted of requests, source by source: counters only, so that figures of several processes add up.

Nothing here grows with the number of rows, and nothing with the number of sources beyond a limit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import log10

OTHER = "(other)"  # sources and reasons beyond those that are counted by name
_LONGEST_NAME = 128
_MOST_REASONS = 64  # of one source; policies have a handful

# Scores crowd at 0 and 1, and so do thresholds; bins are equal in log10 of the odds, ends included: sixteenths of a
# decade from 1e-6 to 1 - 1e-6, at most 0.036 wide.
_PER_DECADE = 16
_DECADES = 6
NUM_BINS = 2 * _DECADES * _PER_DECADE + 2  # with everything below, and above


def bin_of(score: float) -> int:
    """The bin of a score in [0, 1]; not for NaN."""
    if score <= 1e-6 or score >= 1 - 1e-6:
        return 0 if score < 0.5 else NUM_BINS - 1
    return 1 + int((log10(score / (1 - score)) + _DECADES) * _PER_DECADE)


def bin_edges(bin_index: int) -> tuple[float, float]:
    """Where a bin begins and ends."""
    low, high = (_edge(bin_index - 1 + step) for step in (0, 1))
    return (0.0 if bin_index == 0 else low, 1.0 if bin_index == NUM_BINS - 1 else high)


def _edge(index: int) -> float:
    odds: float = 10.0 ** (index / _PER_DECADE - _DECADES)
    return odds / (1 + odds)


def quantile(bins: Mapping[int, int], share: float) -> float:
    """The value below which `share` of what was counted lies, to within its bin; NaN when nothing was."""
    total = sum(bins.values())
    wanted, seen = share * total, 0
    for index in sorted(bins):
        count = bins[index]
        if count and seen + count >= wanted:
            low, high = bin_edges(index)
            return low + (high - low) * min(max((wanted - seen) / count, 0.0), 1.0)
        seen += count
    return float("nan")


@dataclass
class Figures:
    """Counters of one source. Lists have one entry per exit."""

    num_exits: int
    rows: int = 0
    depths: list[int] = field(default_factory=list)  # rows answered by each exit: what was executed
    exits: list[int] = field(default_factory=list)  # rows that the policy lets leave at each exit: the exit mix
    reasons: dict[str, int] = field(default_factory=dict)
    scores: list[dict[int, int]] = field(default_factory=list)  # of the answers given, per exit: bin -> rows
    retention: dict[int, int] = field(default_factory=dict)  # share of tokens kept: bin -> rows
    nan_scores: int = 0  # rows whose score was not a number
    vetoes: int = 0  # decisions where the score sufficed and another condition kept the row in
    failed: int = 0  # requests that had no answer

    def __post_init__(self) -> None:
        self.depths = self.depths or [0] * self.num_exits
        self.exits = self.exits or [0] * self.num_exits
        self.scores = self.scores or [{} for _ in range(self.num_exits)]

    def add(
        self,
        exit_indices: Sequence[int],
        policy_exits: Sequence[int],
        scores: Sequence[float],
        reasons: Sequence[str],
        unscored: Collection[int] = (),
    ) -> None:
        """Rows as answered, and where the policy let them leave; exits `unscored` have no score to begin with."""
        self.rows += len(reasons)
        counted = self.reasons
        for exit_index, policy_exit, score, reason in zip(exit_indices, policy_exits, scores, reasons, strict=True):
            self.depths[exit_index] += 1
            self.exits[policy_exit] += 1
            if score == score:
                bins, index = self.scores[exit_index], bin_of(score)
                bins[index] = bins.get(index, 0) + 1
            elif exit_index not in unscored:
                self.nan_scores += 1
            if reason not in counted and len(counted) >= _MOST_REASONS:
                reason = OTHER
            counted[reason] = counted.get(reason, 0) + 1

    def add_retention(self, kept: Sequence[float]) -> None:
        """Shares of tokens kept, of some rows."""
        for share in kept:
            if share == share:
                index = bin_of(share)
                self.retention[index] = self.retention.get(index, 0) + 1


class FiguresBySource:
    """Figures of at most so many sources by name; what comes later is counted together."""

    def __init__(self, num_exits: int, max_sources: int) -> None:
        self.num_exits = num_exits
        self.max_sources = max_sources
        self.by_source: dict[str, Figures] = {}

    def of(self, source: str) -> Figures:
        """The figures that rows of `source` are counted in."""
        figures = self.by_source.get(source)
        if figures is None:
            if source and (len(self.by_source) > self.max_sources or len(source) > _LONGEST_NAME):
                source = OTHER
            figures = self.by_source.get(source)
        if figures is None:
            figures = self.by_source[source] = Figures(self.num_exits)
        return figures
