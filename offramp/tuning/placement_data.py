"""What a placement is made from, and what it says: costs, options, and the choice with its figures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offramp.binomial import allowed_losses, rows_needed
from offramp.errors import DataError, OptionError
from offramp.policy import POLICY_SCORES, Policy
from offramp.tuning.certify import LEARNING_SHARE

Risk = Literal["consistency", "accuracy_gap"]


@dataclass(frozen=True)
class Costs:
    """What one row pays, all measured side by side. Raises DataError for numbers that make no sense."""

    segments_ms: tuple[float, ...]  # E: for a row that goes on, the decision included
    exits_ms: tuple[float, ...]  # E - 1: saved per row that passes when the exit is dropped
    uncut_ms: float  # the uncut model with the same settings

    def __post_init__(self) -> None:
        numbers = (*self.segments_ms, *self.exits_ms, self.uncut_ms)
        fits = len(self.exits_ms) == len(self.segments_ms) - 1 and all(map(math.isfinite, numbers))
        if not (fits and min(self.segments_ms) > 0 and min(self.exits_ms, default=0) >= 0 and self.uncut_ms > 0):
            raise DataError(
                f"placement: got segments of {self.segments_ms} ms, exits of {self.exits_ms} ms and {self.uncut_ms} ms "
                f"uncut; expected a time per segment, one per exit before the final one, and the uncut model's"
            )

    def path_ms(self, kept: Iterable[int]) -> NDArray[np.float64]:
        """What a row pays that leaves at exit k, (E,), with the early exits `kept`."""
        saved = np.array([0.0, *(0.0 if k in set(kept) else cost for k, cost in enumerate(self.exits_ms))])
        return np.cumsum(np.asarray(self.segments_ms) - saved)

    def worst_case(self, kept: Iterable[int]) -> float:
        """Full depth with the early exits `kept` ÷ the uncut model."""
        return float(self.path_ms(kept)[-1]) / self.uncut_ms


@dataclass(frozen=True)
class PlacementOptions:
    """What to optimise under. Raises OptionError for values that make no sense."""

    score: str = "max_prob"
    risk: Risk = "consistency"
    max_risk: float = 0.01
    confidence: float = 0.95
    max_worst_case: float = 1.05  # full depth ÷ uncut; math.inf for no bound
    is_chosen: bool = True  # by the search; else the exits are those in `keep`
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.score not in POLICY_SCORES:
            raise OptionError(f"place: got score {self.score!r}, expected one of {', '.join(POLICY_SCORES)}")
        if self.risk not in get_args(Risk):
            raise OptionError(f"place: got risk {self.risk!r}, expected one of {', '.join(get_args(Risk))}")
        if not (0 < self.max_risk < 1 and 0 < self.confidence < 1):
            raise OptionError(
                f"place: got a risk of {self.max_risk} with confidence {self.confidence}, expected numbers between 0 "
                f"and 1, such as 0.01 and 0.95"
            )
        if not self.max_worst_case > 0:
            raise OptionError(f"place: got a worst case of {self.max_worst_case}, expected a factor such as 1.05")

    def max_lost(self, num_rows: int) -> int:
        """Of `num_rows` rows that count, those that may be lost: the share that a certificate on them could have.

        The certificate tests those that it does not learn from, so that is where the share comes from. Raises DataError
        when not even a policy without a loss could be certified.
        """
        tested_share = 1 - LEARNING_SHARE
        num_tested = int(num_rows * tested_share)
        allowed = allowed_losses(num_tested, self.max_risk, 1 - self.confidence)
        if allowed < 0:
            least = math.ceil(rows_needed(self.max_risk, 1 - self.confidence) / tested_share)
            raise DataError(
                f"place: got {num_rows} rows that count, and a risk of {self.max_risk} at confidence {self.confidence} "
                f"takes {least}: not even a policy without a loss could be certified; pass more data, or another risk"
            )
        return allowed * num_rows // num_tested


@dataclass(frozen=True)
class PlacedExit:
    """One early exit of the old bundle: what it does for a row on average, and what that costs.

    A kept exit is seen as added to those before it, so that the end of the uncut chain, less all `saves_ms`, plus all
    `costs_ms`, is what the placement expects. A dropped one is seen as added to the placement, thresholds chosen anew.
    """

    exit_index: int
    is_kept: bool
    threshold: float | None
    reached: float  # share of the rows that get here
    share: float  # of the rows, that leave here
    exit_ms: float  # what passing it costs a row
    saves_ms: float
    costs_ms: float
    toggled_ms: float | None  # expected when this exit alone is dropped, or added; None: no such choice was found


@dataclass(frozen=True)
class Alternative:
    """The best choice with so many early exits."""

    num_kept: int
    kept: tuple[int, ...]
    thresholds: tuple[float | None, ...]  # of the kept ones
    expected_ms: float
    worst_case: float  # full depth ÷ uncut
    lost: int
    is_allowed: bool  # within the bound on the worst case


@dataclass(frozen=True)
class Placement:
    """A choice of exits and thresholds, and how it came about. `policy` is for the bundle with the kept exits only."""

    kept: tuple[int, ...]  # of the old bundle, the final exit included
    policy: Policy
    options: PlacementOptions
    costs: Costs
    num_rows: int
    max_lost: int
    lost: int
    expected_ms: float
    no_exits_ms: float  # of one segment with the final exit only
    all_exits_ms: (
        float  # expected with all exits that may be kept, their thresholds chosen as well; whatever its worst case
    )
    worst_case: float
    held_out_ms: float  # of a half of the rows under what the other half chose, mean of both ways
    held_out_risk: float  # and the share of them that was lost
    is_complete: bool  # optimal over all thresholds of all subsets; else over the products described in the search
    combinations: int
    exits: tuple[PlacedExit, ...]
    alternatives: tuple[Alternative, ...]

    def document(self) -> dict[str, Any]:
        """Everything as one object that `json.dumps` takes; no bound is null."""
        bound = self.options.max_worst_case
        options = dataclasses.asdict(self.options) | {"max_worst_case": bound if math.isfinite(bound) else None}
        return {**dataclasses.asdict(self), "options": options, "policy": json.loads(self.policy.to_json())}
