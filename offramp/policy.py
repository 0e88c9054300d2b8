"""Exit policies: from what an exit said to the rows that leave. Numpy only.

The same code decides on live scores in the runtime and on recorded ones in tuning. The final exit is not
the policy's business: there everybody leaves, which is the runner's rule.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED, SCORES, Manifest
from offramp.errors import OptionError

SCHEMA = 2  # 1 had a score, thresholds and temperatures only, and is read as what it says
FINAL = "final"  # reason of a row that nothing released earlier
POLICY_SCORES = (*SCORES, LEARNED)

_COLUMNS = {score: column for column, score in enumerate(SCORES)}
_MARGIN = _COLUMNS["margin"]
_YES, _NO = np.ones(1, np.bool_), np.zeros(1, np.bool_)
_YES.flags.writeable = _NO.flags.writeable = False
_NAMES = {"limits": "thresholds"}  # field -> its name in the file, where they differ


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)


class ExitOutput(Protocol):
    """What one exit said about S rows: a SegmentOutput of the runtime, or rows of a trace."""

    @property
    def logits(self) -> NDArray[np.float32]: ...  # (S, C)
    @property
    def prediction(self) -> NDArray[np.int64]: ...  # (S,)
    @property
    def scores(self) -> NDArray[np.float32]: ...  # (S, 3)
    @property
    def learned(self) -> NDArray[np.float32] | None: ...  # (S,) in [0, 1], where the model has it


class PolicyState(NamedTuple):
    """What a policy remembers of the exits that S rows have passed."""

    prediction: NDArray[np.int64]  # (S,) of the exit before
    streak: NDArray[np.int64]  # (S,) >= 1: that many exits in a row, up to that one, predicted it
    total: NDArray[np.float32]  # (S, C): sum of the probabilities of all exits so far

    def rows(self, keep: NDArray[Any]) -> PolicyState:
        """The state of the rows `keep`, positions or a mask."""
        return PolicyState(self.prediction[keep], self.streak[keep], self.total[keep])


def joined(states: Sequence[PolicyState | None]) -> PolicyState | None:
    """The states of several groups of rows, one after another; None when the policy remembers nothing."""
    kept = [state for state in states if state is not None]
    if len(states) == 1 or not kept:
        return states[0]
    assert len(kept) == len(states), "one policy remembers in every group or in none"
    return PolicyState(*(np.concatenate(column) for column in zip(*kept, strict=True)))


class Decision(NamedTuple):
    """Which rows leave an exit, why, and what the policy wants to be given at the next one."""

    leaves: NDArray[np.bool_]  # (S,)
    reason: str  # the conditions that these rows met, joined by " & "
    state: PolicyState | None  # of all S rows; None when the policy remembers nothing


@dataclass(frozen=True)
class Veto:
    """What keeps a row in although everything else would let it go.

    A margin below `margin`; with `previous`, a prediction that is not that of the exit before; with `mean`,
    one that is not the class with the largest mean probability over all exits so far.
    """

    margin: float = 0.0
    previous: bool = False
    mean: bool = False

    def __post_init__(self) -> None:
        if not (_is_number(self.margin) and 0 <= self.margin <= 1):
            raise OptionError(f"policy: got a margin of {self.margin!r} for the veto, expected a number in [0, 1]")
        for name in ("previous", "mean"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"policy: got {getattr(self, name)!r} for the veto {name!r}, expected true or false")


@dataclass(frozen=True)
class Policy:
    """When rows leave, and the temperature of every exit. All conditions that are set must hold together.

    A row leaves exit k when its `score` is at least `limits[k]`; for "entropy", where small is sure, when it
    is at most `limits[k]`. Scores and limits lie in [0, 1]; `None` closes an exit. With `patience` t, the last t
    exits must agree on the prediction (PABEE, arXiv 2006.04152, section 3.2, counts their t - 1 agreements);
    without limits that alone decides. A `veto` keeps rows in, and nobody leaves before `minimum_depth` segments.
    Without limits and patience every row goes to full depth.

    `temperatures` has one positive value per exit, the final one included, or is empty for 1. `sources` holds
    policies for requests that name their source; they have the temperatures of this one, and no sources.
    Raises OptionError when made with anything else.
    """

    score: str = "max_prob"
    limits: tuple[float | None, ...] = ()
    temperatures: tuple[float, ...] = ()
    patience: int = 0
    veto: Veto = Veto()
    minimum_depth: int = 1
    sources: Mapping[str, Policy] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check everything; thresholds become plain floats, as JSON has them, so that they compare alike everywhere."""
        if self.score not in POLICY_SCORES:
            raise OptionError(f"policy: got score {self.score!r}, expected one of {', '.join(POLICY_SCORES)}")
        for limit in self.limits:
            if limit is not None and not (_is_number(limit) and 0 <= limit <= 1):
                raise OptionError(
                    f"policy: got threshold {limit!r}, expected a number in [0, 1], or None to close the exit"
                )
        limits = tuple(None if limit is None else float(limit) for limit in self.limits)
        object.__setattr__(self, "limits", limits)
        for temperature in self.temperatures:
            if not (_is_number(temperature) and math.isfinite(temperature) and temperature > 0):
                raise OptionError(f"policy: got temperature {temperature!r}, expected a positive number")
        for name, least in (("patience", 0), ("minimum_depth", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise OptionError(f"policy: got {name} {number!r}, expected a whole number, {least} or more")
        for source, policy in self.sources.items():
            if not isinstance(source, str) or policy.sources or policy.temperatures:
                raise OptionError(
                    f"policy of source {source!r}: expected a name and a policy without sources and temperatures "
                    f"of its own; all sources share the temperatures"
                )

    @classmethod
    def full_depth(cls) -> Policy:
        """The policy under which every row goes to the final exit."""
        return cls()

    @classmethod
    def thresholds(cls, score: str, limits: Sequence[float | None], temperatures: Sequence[float] = ()) -> Policy:
        """The policy with one threshold per exit before the final one; `None` closes an exit."""
        return cls(score, tuple(limits), tuple(temperatures))

    def for_source(self, source: str) -> Policy:
        """The policy for requests from `source`: its own, or this one without the sources."""
        return replace(self.sources.get(source, self), temperatures=self.temperatures, sources={})

    def decide(self, exit_index: int, out: ExitOutput, state: PolicyState | None = None) -> Decision:
        """Which of the S rows of `out` leave at `exit_index`, and why.

        `state` is what the decision at the exit before gave, with only the rows that went on.
        """
        rule = self._rules.get(exit_index) or self._rule(exit_index)
        if self._remembers:
            state = self._seen(exit_index, out, state)
        if not rule.reason:
            return Decision(np.zeros(len(out.prediction), np.bool_), "", state)
        if rule.limit is None:
            leaves = np.ones(len(out.prediction), np.bool_)
        elif len(out.prediction) == 1 and self.score != LEARNED:
            # One row, the usual request of a gateway: numpy's comparison would cost 15 us with cold caches, this 3.
            value = out.scores.item(_COLUMNS[self.score])
            leaves = _YES if (value <= rule.limit if rule.small_is_sure else value >= rule.limit) else _NO
        else:
            values = score_values(self.score, out)
            leaves = values <= rule.limit if rule.small_is_sure else values >= rule.limit
        if state is not None:
            leaves = leaves & self._agreeing(exit_index, out, state)
        if self.veto.margin:
            leaves = leaves & (out.scores[:, _MARGIN] >= self.veto.margin)
        return Decision(leaves, rule.reason, state)

    def asks(self, exit_index: int) -> str:
        """What `decide` reads at an exit: "nothing" at a closed one, "learned" alone, or "answers", logits and all.

        Where an exit's head is dear, and a graph of its own, it need not run before the decision unless asked.
        """
        rule = self._rules.get(exit_index) or self._rule(exit_index)
        if self._remembers or self.veto.margin or (rule.reason and self.score != LEARNED):
            return "answers"
        return LEARNED if rule.reason else "nothing"

    @property
    def scores_read(self) -> tuple[str, ...]:
        """Which scores `decide` reads: who computes them outside of a graph need not compute the others."""
        return tuple(name for name in SCORES if name == self.score or (name == "margin" and self.veto.margin > 0))

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
        for name in ("patience", "minimum_depth"):
            if getattr(self, name) > num_exits:
                raise OptionError(
                    f"policy has {name} {getattr(self, name)}, the model has {num_exits} exits; expected at most that"
                )
        for policy in self.sources.values():
            policy.check_exits(num_exits)

    def check_values(self) -> None:
        """Raise OptionError if it asks for classes: a regression has only its learned confidences to decide by."""
        is_open = any(limit is not None for limit in self.limits)
        if (is_open and self.score != LEARNED) or self.patience > 1 or self.veto != Veto():
            raise OptionError(
                f"policy: got score {self.score!r}, patience {self.patience} and {self.veto} for a regression, which "
                f"has no classes; expected thresholds on {LEARNED!r} alone"
            )
        for policy in self.sources.values():
            policy.check_values()

    def check_learned(self, has_learned: Sequence[bool]) -> None:
        """Raise OptionError unless every exit that is open on the learned score has one; `has_learned` per exit."""
        is_open = [limit is not None and k + 1 >= self.minimum_depth for k, limit in enumerate(self.limits)]
        lacking = [str(k) for k, opened in enumerate(is_open) if opened and not has_learned[k]]
        if self.score == LEARNED and lacking:
            having = [str(k) for k, has in enumerate(has_learned) if has]
            raise OptionError(
                f"policy decides by the score {LEARNED!r} at exits {', '.join(lacking)}; the model has a learned "
                f"confidence at exits {', '.join(having) or '(none)'}; use another score (`offramp calibrate --score "
                f"max_prob`), or export a model that returns one"
            )
        for policy in self.sources.values():
            policy.check_learned(has_learned)

    def check_model(self, manifest: Manifest) -> None:
        """Raise OptionError unless this is a policy for the model of `manifest`."""
        self.check_exits(len(manifest.exits))
        self.check_learned([bool(spec.learned) for spec in manifest.exits])
        if manifest.is_regression:
            self.check_values()

    def to_json(self) -> str:
        """The policy as JSON; `from_json` gives back exactly this policy."""
        return json.dumps({"schema": SCHEMA, **self._document()}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Policy:
        """The policy written by `to_json`. Raises OptionError when it is anything else."""
        try:
            document: Any = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
            raise OptionError(f"policy is not JSON: {exc}") from exc
        if not isinstance(document, dict) or "schema" not in document:
            raise OptionError("policy: expected a JSON object with a `schema`")
        schema = document.pop("schema")
        if schema not in range(1, SCHEMA + 1) or isinstance(schema, bool):
            raise OptionError(f"policy has schema {schema!r}, this offramp reads 1 to {SCHEMA}")
        sources = document.pop("sources", {})
        if not isinstance(sources, dict):
            raise OptionError("policy: expected `sources` to be an object from source to policy")
        nested = {source: _policy_from_document(policy) for source, policy in sources.items()}
        return replace(_policy_from_document(document), sources=nested)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `to_json`: what a certificate is bound to."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def _remembers(self) -> bool:
        return self.patience > 1 or self.veto.previous or self.veto.mean

    @cached_property
    def _inverse(self) -> NDArray[np.float32]:
        return self.inverse_temperatures(len(self.temperatures))

    @cached_property
    def _rules(self) -> dict[int, _Rule]:
        return {}

    def _rule(self, exit_index: int) -> _Rule:
        """What is asked at an exit, worked out once: requests come by the thousand."""
        limit = self.limits[exit_index] if self.limits else None
        limit = None if limit is None else float(np.float32(limit))  # scores are float32, and so is the comparison
        rule = _Rule(" & ".join(self._conditions(exit_index)), limit, self.score == "entropy")
        self._rules[exit_index] = rule
        return rule

    def _conditions(self, exit_index: int) -> list[str]:
        """The conditions in force at an exit, none when it is closed."""
        is_closed = self.limits[exit_index] is None if self.limits else not self.patience
        if is_closed or exit_index + 1 < self.minimum_depth:
            return []
        named = {
            self.score: bool(self.limits),
            "patience": self.patience > 0,
            "minimum depth": self.minimum_depth > 1,
            "no veto by margin": self.veto.margin > 0,
            "no veto by the exit before": self.veto.previous,
            "no veto by the mean": self.veto.mean,
        }
        return [name for name, is_set in named.items() if is_set]

    def _agreeing(self, exit_index: int, out: ExitOutput, state: PolicyState) -> NDArray[np.bool_]:
        """Rows whose prediction fits those of the exits before, (S,)."""
        needed = max(self.patience, 2 if self.veto.previous and exit_index else 1)
        agreeing: NDArray[np.bool_] = state.streak >= needed
        if self.veto.mean:
            agreeing = agreeing & (state.total.argmax(axis=1) == out.prediction)
        return agreeing

    def _seen(self, exit_index: int, out: ExitOutput, before: PolicyState | None) -> PolicyState:
        """The state after an exit."""
        total = np.empty((len(out.prediction), 0), np.float32)
        if self.veto.mean:
            inverse = self._inverse[exit_index] if self.temperatures else np.float32(1)
            total = _probabilities(out.logits * inverse)
        if before is None:
            return PolicyState(out.prediction, np.ones(len(out.prediction), np.int64), total)
        streak = np.where(out.prediction == before.prediction, before.streak + 1, 1)
        return PolicyState(out.prediction, streak, before.total + total)

    def _document(self) -> dict[str, Any]:
        """The fields as plain JSON values, those of sources included."""
        document = {
            "score": self.score,
            "thresholds": list(self.limits),
            "temperatures": list(self.temperatures),
            "patience": self.patience,
            "veto": {"margin": self.veto.margin, "previous": self.veto.previous, "mean": self.veto.mean},
            "minimum_depth": self.minimum_depth,
        }
        if self.sources:
            document["sources"] = {source: policy._document() for source, policy in self.sources.items()}
        return document


class _Rule(NamedTuple):
    """What a policy asks at one exit."""

    reason: str  # the conditions in force, "" when the exit is closed
    limit: float | None  # None when patience alone decides
    small_is_sure: bool


def score_values(score: str, out: ExitOutput) -> NDArray[np.float32]:
    """One score of every row, (S,); NaN, which no threshold lets go, where the exit has no learned score."""
    if score != LEARNED:
        return out.scores[:, _COLUMNS[score]]
    return np.full(len(out.prediction), np.nan, np.float32) if out.learned is None else out.learned


def _policy_from_document(document: Any) -> Policy:
    """One policy without its sources. Raises OptionError for an unknown field too: no condition is lost in silence."""
    known = {_NAMES.get(key.name, key.name) for key in fields(Policy)} - {"sources"}
    if not isinstance(document, dict) or document.keys() - known or not {"score", "thresholds"} <= document.keys():
        got = ", ".join(map(str, document)) if isinstance(document, dict) else type(document).__name__
        raise OptionError(f"policy: got {got}; expected score, thresholds, and any of {', '.join(sorted(known))}")
    values = dict(document)
    limits, temperatures = values.pop("thresholds"), values.pop("temperatures", [])
    if not (isinstance(limits, list) and isinstance(temperatures, list)):
        raise OptionError("policy: expected `thresholds` and `temperatures` to be lists")
    veto = values.pop("veto", {})
    if not isinstance(veto, dict) or veto.keys() - {key.name for key in fields(Veto)}:
        raise OptionError("policy: expected `veto` to be an object with margin, previous and mean")
    return Policy(**values, limits=tuple(limits), temperatures=tuple(temperatures), veto=Veto(**veto))


def _probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the classes, (S, C) float32; every row by itself, so that its bits do not depend on others."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities
