"""Everything the report says, as plain numbers and words: what `offramp report --json` prints.

No formatting here, and no figure: the page is made from these and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offramp.tuning.diagnostics import Overthinking, Quality

Kind = Literal["chosen", "full depth", "uncut", "exit alone", "fixed 0.9", "tuned", "sweep", "measured"]


@dataclass(frozen=True)
class Missing:
    """What the report cannot say, and the command that adds it ("" where no command does)."""

    what: str
    command: str


@dataclass(frozen=True)
class Subject:
    """What the report is about."""

    name: str
    exits: tuple[str, ...]
    classes: tuple[str, ...]
    backend: str
    precision: str
    num_rows: int
    num_labelled: int
    fingerprint: str
    trace_sha256: str
    policy_sha256: str
    policy: str  # the rule in words


@dataclass(frozen=True)
class Alternative:
    """One point of the frontier. Times are per row; accuracy is None without labels."""

    name: str
    kind: Kind
    ms: float
    accuracy: float | None
    agreement: float | None  # share of the rows answered as full depth answers; None where only a clock was read
    mean_depth: float | None  # in segments; None for a model that has none
    known: str = ""  # of a way to choose thresholds: what it says about the risk on other rows


@dataclass(frozen=True)
class ExitFinding:
    """One exit on the trace. What needs labels, or rows that leave here, is None without them."""

    exit_index: int
    name: str
    threshold: float | None  # None: closed, or the final exit
    temperature: float
    segment_ms: float
    share: float  # of the rows, that leave here
    reached: float  # of the rows, that come this far
    changed: float | None  # of the rows leaving here, whose answer full depth would not give
    saved_ms: float  # per row of all rows, by those that leave here instead of going to the end
    agreement: float  # with the final exit, over all rows
    accuracy: float | None  # over all rows, had they all left here
    accuracy_leaving: float | None  # over the rows that do
    ece_unscaled: float | None  # calibration error at temperature 1
    quality: Quality | None  # at `temperature`
    lost_later: int | None  # rows right here that the final exit gets wrong
    won_later: int | None  # rows wrong here that the final exit gets right


@dataclass(frozen=True)
class Step:
    """One bar of the cost waterfall, in ms per row; `kind` says how to draw it."""

    name: str
    ms: float  # "level": the whole bar; "saving" and "cost": the change
    kind: Literal["level", "saving", "cost"]


@dataclass(frozen=True)
class DroppedExit:
    """An exit that a placement left out."""

    exit_index: int
    with_it_ms: float | None  # per row, had it been kept; None: no threshold was within the risk


@dataclass(frozen=True)
class Waterfall:
    """From full depth to the policy: what each exit saves and costs."""

    steps: tuple[Step, ...]
    source: Literal["trace", "placement"]  # a placement counts exits as the bundle before it did
    dropped: tuple[DroppedExit, ...] = ()
    worst_case: float | None = None  # full depth ÷ uncut model, of a placement


@dataclass(frozen=True)
class RiskPoint:
    """One policy of a path from full depth to ever earlier exits, on the rows that test it."""

    ms: float
    mean_depth: float
    losses: float  # a count, or a sum for risks that are not counted
    upper_bound: float  # of the risk, at the path's confidence, had this policy been the only one tested
    certified: bool  # it and every policy before it passed the test


@dataclass(frozen=True)
class RiskPath:
    """The sequence along which thresholds are certified; some of its points, with the last that passed."""

    risk: str
    max_risk: float
    confidence: float
    num_rows: int  # tested, those that count for the risk
    num_learned: int  # rows that the path was learned on, and that had no part in the test
    is_of_certificate: (
        bool  # the very test behind the bundle's certificate; else one made here to show what these rows can
    )
    points: tuple[RiskPoint, ...]  # from full depth on


@dataclass(frozen=True)
class SourceFinding:
    """What the certificate says of one source."""

    source: str
    statement: str


@dataclass(frozen=True)
class CertifiedExit:
    """One exit among the rows that tested a certificate."""

    exit_index: int
    num_rows: int  # that left here
    losses: float
    upper_bound: float | None  # of the risk among them, for all exits together; None where the risk has no exact one


@dataclass(frozen=True)
class CertificateFinding:
    """The certificate in plain words; `status` says whether it is about what this report is about."""

    status: Literal["in force", "none", "not for this"]
    statement: str
    evidence: str
    conditions: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()  # what it does not say
    command: str = ""  # what makes one, where there is none
    exits: tuple[CertifiedExit, ...] = ()
    sources: tuple[SourceFinding, ...] = ()


@dataclass(frozen=True)
class Confusion:
    """Counts of rows: `rows` are what should be said, columns what the policy says."""

    reference: Literal["label", "full depth"]
    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RetentionBin:
    """Token retention at the exit where rows left, over rows of similar length."""

    shortest: int  # tokens
    longest: int
    num_rows: int
    p5: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Example:
    """One row with its text."""

    row: int
    text: str
    exit_index: int
    score: float
    answer: str
    full_depth: str
    label: str  # "" where it is not known


@dataclass(frozen=True)
class Examples:
    """Rows to read, each list with the most telling first."""

    easiest: tuple[Example, ...]
    hardest: tuple[Example, ...]
    changed: tuple[Example, ...]


@dataclass(frozen=True)
class Findings:
    """Everything the page says."""

    subject: Subject
    alternatives: tuple[Alternative, ...]
    exits: tuple[ExitFinding, ...]
    waterfall: Waterfall
    exit_agreement: tuple[tuple[float, ...], ...]  # (E, E) share of the rows to which two exits say the same
    confusion: Confusion
    overthinking: Overthinking | None
    risk_path: RiskPath
    certificate: CertificateFinding
    retention: tuple[RetentionBin, ...]
    examples: Examples | None
    missing: tuple[Missing, ...]

    def alternative(self, kind: Kind) -> Alternative | None:
        """The first alternative of a kind, if there is one."""
        return next((found for found in self.alternatives if found.kind == kind), None)

    @property
    def chosen(self) -> Alternative:
        """The policy of the bundle."""
        return self._required("chosen")

    @property
    def full_depth(self) -> Alternative:
        """Every row to the end."""
        return self._required("full depth")

    @property
    def baseline(self) -> Alternative:
        """What the policy is compared with: the uncut model where it was timed, else full depth."""
        return self.alternative("uncut") or self.full_depth

    def _required(self, kind: Kind) -> Alternative:
        found = self.alternative(kind)
        assert found is not None, f"a report always has the alternative {kind!r}"
        return found
