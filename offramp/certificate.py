"""The certificate: that a risk of the policy is at most so much, how sure that is, and for which files it holds.

It says what tuning found on a trace; the runtime compares it with what it has opened, the monitor watches whether it
still holds. This module knows what it says and where it holds, not how it is tested. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offramp.errors import CertificateError

SCHEMA = 1


class CertificateWarning(UserWarning):
    """The bundle has a certificate, and it does not hold for what was opened."""


RISKS = {  # name -> what is counted, over the rows of `num_rows`
    "consistency": "answers that differ from full depth's",
    "accuracy_gap": "answers that are wrong where full depth's is right",
    "accuracy_gap_signed": "accuracy lost against full depth (rows that only the early answer gets right count back)",
    "missed_detection": "rows that full depth assigns to the class {class_name!r} and the early answer does not",
    "hellinger": "Hellinger distance between the probabilities given and full depth's",
    "brier": "Brier score lost against full depth, halved so that it is at most 1",
    "deviation": "distance from full depth's value, {value_range:g} at most, as a share of {value_range:g}",
    "error_gap": "absolute error lost against full depth (rows that the early value is nearer to count back), "
    "{value_range:g} at most, as a share of {value_range:g}",
}
VALUED = ("deviation", "error_gap")  # the risks of a regression; all others are about classes


@dataclass(frozen=True)
class ExitRisk:
    """One exit on the tested rows: a table beside the certificate, each line a statement of its own.

    `upper_bound` holds for the risk among the rows that leave here, for all exits together with the certificate's
    confidence (each at its share of it); 1 where none left. None where the loss has no exact bound.
    """

    num_rows: int  # that left here and count for the risk
    losses: float  # among them, a count or a sum
    upper_bound: float | None


@dataclass(frozen=True)
class SourceStatement:
    """What holds for requests from one source, under the policy's own policy for it.

    `rows_missing` > 0: too few rows to show anything; the source goes to full depth, and so many rows more, if none of
    them has a loss, would do.
    """

    confidence: float  # of this statement: the certificate's, or higher, so that all hold at once
    num_rows: int
    losses: float
    p_value: float
    upper_bound: float
    exit_counts: tuple[int, ...]  # E
    mean_depth: float
    rows_missing: int = 0


@dataclass(frozen=True)
class Certificate:
    """The risk of the policy is at most `max_risk` with probability `confidence` over the draw of the tested rows.

    It holds for requests like those rows, answered by the engines whose files, backend and precision are named, under
    the policy whose SHA-256 is named. `num_rows` rows count for the risk, with `losses` in all; all tested rows are in
    `exit_counts`. `upper_bound` holds for this policy had it been the only one tested; the choice along a sequence
    is in `max_risk`. Raises CertificateError when made with values that make no sense.
    """

    risk: str  # one of RISKS
    max_risk: float
    confidence: float  # 1 - delta
    method: str  # the test, and how the policy was chosen
    num_rows: int
    losses: float  # a whole number for risks that count rows
    p_value: float
    upper_bound: float
    exit_counts: tuple[int, ...]  # E: where the tested rows left
    mean_depth: float  # in segments, of the tested rows
    backend: str
    precision: str
    files: tuple[str, ...]  # E: SHA-256 of the graph or plan of each segment; none: engines that are no files
    policy_sha256: str  # Policy.sha256
    trace_sha256: str  # Trace.sha256
    seed: int = 0  # of the split and of the order of the rows
    class_name: str = ""  # of a missed detection
    value_range: float = 1.0  # of a regression: what larger distances count as, and the risk is a share of
    rows_missing: int = 0  # > 0: full depth, because so many more tested rows, at least, are needed to show anything
    exits: tuple[ExitRisk, ...] = ()  # E, or none
    sources: Mapping[str, SourceStatement] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check names, ranges and lengths."""
        if self.risk not in RISKS:
            raise CertificateError(f"certificate: got risk {self.risk!r}, expected one of {', '.join(RISKS)}")
        for name in ("max_risk", "confidence"):
            if not (_is_number(getattr(self, name)) and 0 < getattr(self, name) < 1):
                raise CertificateError(f"certificate: got {name} {getattr(self, name)!r}, expected between 0 and 1")
        _check_statement(self, self.num_exits)
        if not (_is_number(self.value_range) and self.value_range > 0):
            raise CertificateError(f"certificate: got value_range {self.value_range!r}, expected a positive number")
        for statement in self.sources.values():
            _check_statement(statement, self.num_exits)
        for name in ("files", "exits"):
            if (got := len(getattr(self, name))) not in (0, self.num_exits):
                raise CertificateError(f"certificate: got {got} {name}, expected {self.num_exits}, one per exit")

    @property
    def delta(self) -> float:
        """The probability that the statement is wrong."""
        return 1 - self.confidence

    @property
    def num_exits(self) -> int:
        return len(self.exit_counts)

    def obstacle(self, files: Sequence[str], backend: str, precision: str, policy_sha256: str) -> str:
        """Why the certificate does not hold for these engines and this policy, or ""."""
        if (backend, precision) != (self.backend, self.precision):
            return f"it is for {self.backend} in {self.precision}, running is {backend} in {precision}"
        if len(files) != len(self.files):
            return f"it is for {len(self.files)} segments from files, running are {len(files)}"
        if changed := [
            str(k) for k, (running, made) in enumerate(zip(files, self.files, strict=True)) if running != made
        ]:
            return f"the files of segment {', '.join(changed)} are not those it was made with"
        if policy_sha256 != self.policy_sha256:
            return f"it is for policy {self.policy_sha256[:12]}…, running is {policy_sha256[:12]}…"
        return ""

    def to_json(self) -> str:
        """The certificate as JSON; `from_json` gives back exactly this certificate."""
        document = dataclasses.asdict(self)
        return json.dumps({"schema": SCHEMA, **document}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """The certificate written by `to_json`. Raises CertificateError when it is anything else."""
        try:
            document: Any = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
            raise CertificateError(f"certificate is not JSON: {exc}; run `offramp calibrate BUNDLE` again") from exc
        if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
            raise CertificateError(
                f"certificate: expected a JSON object with schema {SCHEMA}; run `offramp calibrate BUNDLE` again"
            )
        try:
            exits = tuple(ExitRisk(**found) for found in document.pop("exits", ()))
            sources = {name: SourceStatement(**_tuples(found)) for name, found in document.pop("sources", {}).items()}
            return cls(**_tuples(document), exits=exits, sources=sources)
        except (TypeError, AttributeError) as exc:
            raise CertificateError(f"certificate: {exc}; run `offramp calibrate BUNDLE` again") from exc

    def words(self) -> list[str]:
        """The certificate in plain words, one statement per line."""
        counted = RISKS[self.risk].format(class_name=self.class_name, value_range=self.value_range)
        seen = f"{self.losses:g} in {self.num_rows} tested rows"
        each = (
            "for every source below, each with its confidence"
            if self.sources
            else f"with {self.confidence:.1%} confidence"
        )
        lines = [
            f"{self.risk}: {counted}: at most {self.max_risk:.2%}, {each}",
            f"seen: {seen}; p-value {self.p_value:.2g}, bound for this policy alone {self.upper_bound:.3%}",
            f"how: {self.method}",
            f"mean depth {self.mean_depth:.2f} of {self.num_exits} segments; left at each exit: "
            + ", ".join(str(count) for count in self.exit_counts),
            f"holds for {self.backend} in {self.precision} with the files and the policy it was made with, and for "
            f"requests like the tested rows; the confidence is over the draw of those rows",
        ]
        if self.rows_missing:
            lines.insert(
                0, f"full depth: {self.rows_missing} more tested rows are needed, at least, to let any row leave"
            )
        return lines + [_source_words(name, found, self.max_risk) for name, found in self.sources.items()]


def _source_words(name: str, found: SourceStatement, max_risk: float) -> str:
    if found.rows_missing:
        return f"source {name!r}: full depth; {found.rows_missing} more tested rows are needed at least"
    return (
        f"source {name!r}: at most {max_risk:.2%} with {found.confidence:.2%} confidence: {found.losses:g} in "
        f"{found.num_rows} rows, p-value {found.p_value:.2g}, mean depth {found.mean_depth:.2f}"
    )


def _tuples(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with tuples for the lists of JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_statement(statement: Certificate | SourceStatement, num_exits: int) -> None:
    """Raise CertificateError unless the numbers are numbers, in range, for `num_exits` exits."""
    numbers = [getattr(statement, name) for name in ("losses", "p_value", "upper_bound", "mean_depth", "num_rows")]
    counts = statement.exit_counts
    if not all(map(_is_number, numbers)) or not (0 <= statement.p_value <= 1 and statement.num_rows >= 0):
        raise CertificateError(f"certificate: got {numbers} for losses, p-value, bound, depth and rows")
    if len(counts) != num_exits or not all(type(count) is int and count >= 0 for count in counts):
        raise CertificateError(f"certificate: got exit_counts {list(counts)}, expected {num_exits} whole numbers")
