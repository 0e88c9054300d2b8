"""Exit policies: from the scores of an exit to the rows that leave. Numpy only.

The same code decides on live scores in the runtime and on recorded ones in tuning. The final exit is not
the policy's business: there everybody leaves, which is the runner's rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.errors import OptionError

SCHEMA = 1
FINAL = "final"  # reason of a row that nothing released earlier


@dataclass(frozen=True)
class Policy:
    """Which exits are open, on which score they fire, and the temperature of every exit.

    A row leaves exit k when its `score` is at least `limits[k]`; for "entropy", where small is sure, when it
    is at most `limits[k]`. Scores and limits lie in [0, 1]. `None` closes an exit; `limits` is empty for
    full depth. `temperatures` has one positive value per exit, the final one included, or is empty for 1.
    Raises OptionError when made with anything else.
    """

    score: str = "max_prob"
    limits: tuple[float | None, ...] = ()
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise OptionError(f"policy: got score {self.score!r}, expected one of {', '.join(SCORES)}")
        for limit in self.limits:
            if limit is not None and not (_is_number(limit) and 0 <= limit <= 1):
                raise OptionError(
                    f"policy: got threshold {limit!r}, expected a number in [0, 1], or None to close the exit"
                )
        for temperature in self.temperatures:
            if not (_is_number(temperature) and math.isfinite(temperature) and temperature > 0):
                raise OptionError(f"policy: got temperature {temperature!r}, expected a positive number")

    @classmethod
    def full_depth(cls) -> Policy:
        """The policy under which every row goes to the final exit."""
        return cls()

    @classmethod
    def thresholds(cls, score: str, limits: Sequence[float | None], temperatures: Sequence[float] = ()) -> Policy:
        """The policy with one threshold per exit before the final one; `None` closes an exit."""
        return cls(score, tuple(limits), tuple(temperatures))

    def decide(self, exit_index: int, scores: NDArray[np.float32]) -> tuple[NDArray[np.bool_], str]:
        """Which rows leave at `exit_index`, and why: `scores` (S, 3) -> leaves (S,), reason."""
        limit = self.limits[exit_index] if self.limits else None
        if limit is None:
            return np.zeros(len(scores), np.bool_), ""
        column = scores[:, SCORES.index(self.score)]
        leaves: NDArray[np.bool_] = column <= limit if self.score == "entropy" else column >= limit
        return leaves, self.score

    def inverse_temperatures(self, num_exits: int) -> NDArray[np.float32]:
        """1 / temperature of every exit, (E,) float32."""
        if not self.temperatures:
            return np.ones(num_exits, np.float32)
        return np.reciprocal(np.asarray(self.temperatures, np.float64)).astype(np.float32)

    def check_exits(self, num_exits: int) -> None:
        """Raise OptionError unless the policy is one for a model with `num_exits` exits."""
        if self.limits and len(self.limits) != num_exits - 1:
            raise OptionError(
                f"policy has {len(self.limits)} thresholds, the model has {num_exits} exits; expected "
                f"{num_exits - 1}, one per exit before the final one"
            )
        if self.temperatures and len(self.temperatures) != num_exits:
            raise OptionError(
                f"policy has {len(self.temperatures)} temperatures, the model has {num_exits} exits; "
                f"expected one per exit"
            )

    def to_json(self) -> str:
        """The policy as JSON; `from_json` gives back exactly this policy."""
        document = {
            "schema": SCHEMA,
            "score": self.score,
            "thresholds": list(self.limits),
            "temperatures": list(self.temperatures),
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Policy:
        """The policy written by `to_json`. Raises OptionError when it is anything else."""
        try:
            document: Any = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
            raise OptionError(f"policy is not JSON: {exc}") from exc
        expected = {"schema", "score", "thresholds", "temperatures"}
        if not isinstance(document, dict) or document.keys() != expected:
            raise OptionError(f"policy: expected a JSON object with {', '.join(sorted(expected))}")
        if document["schema"] != SCHEMA:
            raise OptionError(f"policy has schema {document['schema']!r}, this offramp reads {SCHEMA}")
        lists = document["thresholds"], document["temperatures"]
        if not all(isinstance(values, list) for values in lists):
            raise OptionError("policy: expected `thresholds` and `temperatures` to be lists")
        return cls(document["score"], tuple(lists[0]), tuple(lists[1]))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
