"""What the evidence leads to: normal, suspect, full depth, recovery. One stream of requests, without locks or clocks.

    normal  -> suspect      some evidence: more audits, which is all that it costs
    suspect -> normal       it went away
    any     -> full depth   an alarm; in force for every request that begins later
    full depth -> recovery  the cool-down is over: fresh rows are counted towards a new certificate
    recovery -> normal      the same policy was certified again on them, or somebody brought another certificate

Nothing else leads back. In full depth and in recovery every row runs to the end and is answered from there, and what
the policy would have done with it is still worked out, so that every row is an audit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

from offramp.certificate import Certificate
from offramp.errors import OptionError
from offramp.runtime.monitor_evidence import MIN_TOLERANCE, ExitMix, Recertification, RiskTest

NORMAL, SUSPECT, FULL_DEPTH, RECOVERY = "normal", "suspect", "full depth", "recovery"
STATES = (NORMAL, SUSPECT, RECOVERY, FULL_DEPTH)  # the worse, the later
AUDITED_RISKS = ("consistency", "missed_detection")  # those that full depth alone can tell, without labels

# Evidence at which to look more closely, as shares of what an alarm takes; below half of it, enough was seen.
# In-control streams of bench/monitor.py are suspect for 0.03 % of their rows.
_SUSPECT_MIX = 0.01
_SUSPECT_RISK = 0.05
_SUSPECT_WEALTH = 5.0
_CALM = 0.5
_MOST_DOUBLED = 6  # times that a cool-down doubles
_NEVER = 2**62


@dataclass(frozen=True)
class Baseline:
    """What a certificate says of one stream of requests. Raises OptionError when it makes no sense.

    `exit_counts` says where the tested rows left, all 0 where that is not known: then there is no test of the exit mix.
    Of `risk`, those in AUDITED_RISKS are tested on audits; of a "missed_detection" rows count that full depth assigns
    to `class_index`.
    """

    exit_counts: tuple[int, ...]  # E
    max_risk: float
    confidence: float = 0.95
    risk: str = "consistency"
    class_index: int = -1
    policy_sha256: str = ""  # "": of the policy that the runner has when it is given the monitor

    def __post_init__(self) -> None:
        if not self.exit_counts or not all(type(count) is int and count >= 0 for count in self.exit_counts):
            raise OptionError(f"monitor: got exit counts {self.exit_counts!r}, expected a whole number per exit")
        for name in ("max_risk", "confidence"):
            number = getattr(self, name)
            if not (isinstance(number, float) and 0 < number < 1):
                raise OptionError(f"monitor: got {name} {number!r}, expected a number between 0 and 1")
        if self.risk == "missed_detection" and self.class_index < 0:
            raise OptionError("monitor: a missed detection is of a class; expected its class_index")

    @property
    def is_audited(self) -> bool:
        """Whether audits can tell its losses."""
        return self.risk in AUDITED_RISKS


def baselines_from_certificate(
    certificate: Certificate, labels: Sequence[str] = ()
) -> tuple[Baseline, dict[str, Baseline]]:
    """What `certificate` says of all requests but those of the sources it speaks of by name, and of each of those.

    Where the tested rows of the others left is the difference; there is no test of their exit mix where that is nothing
    (or less, should the rows of the sources be others). Raises OptionError.
    """
    class_index = -1
    if certificate.risk == "missed_detection":
        if certificate.class_name not in labels:
            raise OptionError(
                f"monitor: the certificate is about class {certificate.class_name!r}, expected it among the labels, "
                f"got {list(labels)}; pass labels=runner.manifest.labels"
            )
        class_index = list(labels).index(certificate.class_name)
    whole = Baseline(
        certificate.exit_counts,
        certificate.max_risk,
        certificate.confidence,
        certificate.risk,
        class_index,
        certificate.policy_sha256,
    )
    spoken_of = {name: found for name, found in certificate.sources.items() if not found.rows_missing}
    others = [
        total - sum(found.exit_counts[k] for found in spoken_of.values())
        for k, total in enumerate(certificate.exit_counts)
    ]
    if min(others) < 0:
        others = [0] * len(others)
    sources = {name: replace(whole, exit_counts=found.exit_counts) for name, found in spoken_of.items()}
    return replace(whole, exit_counts=tuple(others)), sources


@dataclass(frozen=True)
class MonitorOptions:
    """How closely to watch. Raises OptionError when it makes no sense.

    `rows_between_alarms` and `audits_between_alarms` are what a false alarm takes in the mean, at least, while the
    certificate holds; `false_alarm` the probability that the lifetime test of the risk ever gives one. Where sources
    have certificates of their own, all three are shared between them.
    """

    audit_rate: float = 0.02
    suspect_audit_rate: float = 0.2
    tolerance: float = 0.01  # of a share of the exit mix: smaller shifts are of no interest
    rows_between_alarms: float = 1e6
    audits_between_alarms: float = 1e4
    false_alarm: float = 0.001
    cool_down: int = 200  # rows in full depth before recovery begins; doubles with every trip
    max_sources: int = 64  # that are counted by name

    def __post_init__(self) -> None:
        for name in ("audit_rate", "suspect_audit_rate", "false_alarm"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"monitor: got {name} {getattr(self, name)!r}, expected a number in (0, 1]")
        if not MIN_TOLERANCE <= self.tolerance < 1:
            raise OptionError(f"monitor: got tolerance {self.tolerance!r}, expected {MIN_TOLERANCE} to 1")
        for name in ("rows_between_alarms", "audits_between_alarms"):
            if not 1 < getattr(self, name) < math.inf:
                raise OptionError(f"monitor: got {name} {getattr(self, name)!r}, expected more than 1")
        for name in ("cool_down", "max_sources"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise OptionError(f"monitor: got {name} {getattr(self, name)!r}, expected a whole number, 0 or more")


class Change(NamedTuple):
    """A stream went from one state into another."""

    source: str  # "": all requests whose source has no certificate of its own
    before: str
    after: str
    cause: str
    trips: int  # so far


class Stream:
    """The requests that one baseline is about: evidence, state, and which of their rows are audited."""

    def __init__(
        self,
        name: str,
        baseline: Baseline,
        options: MonitorOptions,
        num_streams: int,
        rng: Random,
        on_change: Callable[[Change], None],
    ) -> None:
        self.name = name
        self.options = options
        self._num_streams = num_streams
        self.mix_alarm = options.rows_between_alarms * num_streams
        self.risk_alarm = options.audits_between_alarms * num_streams
        self.lifetime_alarm = num_streams / options.false_alarm
        self._mix_suspect = _SUSPECT_MIX * self.mix_alarm
        self._risk_suspect = _SUSPECT_RISK * self.risk_alarm
        self._rng = rng
        self._on_change = on_change
        self.state = NORMAL
        self.cause = ""
        self.trips = 0
        self.epoch = 0  # rows of requests that began in another are no evidence
        self.audits = [0] * len(baseline.exit_counts)  # rows compared with full depth, by where the policy let them go
        self.losses = [0] * len(baseline.exit_counts)
        self._policy_sha256 = baseline.policy_sha256  # of the policy that runs
        self._cooling = 0
        self._block = (0, [0] * len(baseline.exit_counts))  # of the recertification: attempt, and where its rows left
        self.baseline = baseline
        self._rate = options.audit_rate
        self._gap = 0
        self._take(baseline)

    @property
    def is_certified(self) -> bool:
        """Whether the policy that runs is the one that the baseline is about."""
        return self._policy_sha256 == self.baseline.policy_sha256

    @property
    def forces_full_depth(self) -> bool:
        return self.state in (FULL_DEPTH, RECOVERY)

    def renew(self, baseline: Baseline) -> None:
        """Another certificate, from outside: watch it from its beginning."""
        if not baseline.policy_sha256:
            baseline = replace(baseline, policy_sha256=self._policy_sha256)
        self._take(baseline)
        self._enter(NORMAL, "another certificate")

    def policy_changed(self, policy_sha256: str) -> None:
        """Another policy runs: the evidence was about the one before. It does not lead out of full depth."""
        if not self.baseline.policy_sha256:
            self.baseline = replace(self.baseline, policy_sha256=policy_sha256)
        self._policy_sha256 = policy_sha256
        self.epoch += 1
        self._forget()
        if self.state == RECOVERY:
            self._begin_recovery()
        elif self.state == SUSPECT:
            self._enter(NORMAL, "another policy")

    def chosen(self, num_rows: int) -> Sequence[int]:
        """Which of the next `num_rows` rows are audited; a coin for each, thrown as the gap to the next."""
        if self.forces_full_depth:
            return range(num_rows)
        gap = self._gap
        positions = []
        while gap < num_rows:
            positions.append(gap)
            gap += 1 + self._drawn_gap()
        self._gap = gap - num_rows
        return positions

    def update(self, exits: Sequence[int], audits: Sequence[tuple[int, bool]]) -> None:
        """Rows in the order they came: where the policy lets each go, and exit and loss of the audited that count."""
        for exit_index, is_loss in audits:
            self.audits[exit_index] += 1
            self.losses[exit_index] += is_loss
        if self.state == RECOVERY:
            self._recertify(exits, audits)
        elif self.state == FULL_DEPTH:
            self._cooling -= len(exits)
            if self._cooling <= 0 and self.baseline.is_audited:
                self._begin_recovery()
        else:
            self._test(exits, audits)

    def _take(self, baseline: Baseline) -> None:
        self.baseline = baseline
        delta = (1 - baseline.confidence) / self._num_streams
        self.recertification = Recertification(baseline.max_risk, delta)
        self.epoch += 1
        self._forget()
        self._gap = self._drawn_gap()

    def _forget(self) -> None:
        """Begin the tests anew."""
        counts = self.baseline.exit_counts
        self.mix = ExitMix(counts, self.options.tolerance) if any(counts) and self.is_certified else None
        self.risk = RiskTest(self.baseline.max_risk)

    def _drawn_gap(self) -> int:
        """Rows until the next that is audited: geometric, which is a coin for each."""
        if not self.baseline.is_audited:
            return _NEVER
        rate = self._rate
        return 0 if rate >= 1 else int(math.log(1 - self._rng.random()) / math.log1p(-rate))

    def _enter(self, state: str, cause: str) -> None:
        before, self.state, self.cause = self.state, state, cause
        if state != before:
            rate = self.options.suspect_audit_rate if state == SUSPECT else self.options.audit_rate
            if rate != self._rate:
                self._rate = rate
                self._gap = self._drawn_gap()  # it has no memory, so to draw again changes the rate and nothing else
            self._on_change(Change(self.name, before, state, cause, self.trips))

    def _test(self, exits: Sequence[int], audits: Sequence[tuple[int, bool]]) -> None:
        """Evidence from rows of a policy in force."""
        mix = self.mix.update(exits) if self.mix else 0.0
        if not audits and mix < self._mix_suspect and self.state == NORMAL:
            return
        risk = wealth = 0.0
        for _, is_loss in audits:
            risk = max(risk, self.risk.update(is_loss))
            wealth = max(wealth, self.risk.wealth)
        if mix >= self.mix_alarm:
            self._trip("the exit mix has shifted")
        elif risk >= self.risk_alarm:
            self._trip("audits: the risk has risen")
        elif wealth >= self.lifetime_alarm:
            self._trip("audits: the risk is too high")
        elif self.state == NORMAL:
            if mix >= self._mix_suspect or risk >= self._risk_suspect or wealth >= _SUSPECT_WEALTH:
                self._enter(SUSPECT, "the exit mix" if mix >= self._mix_suspect else "audits")
        elif mix < self._mix_suspect * _CALM and self._is_risk_calm():
            self._enter(NORMAL, "the evidence went away")

    def _is_risk_calm(self) -> bool:
        is_calm = self.risk.value < self._risk_suspect * _CALM
        return is_calm and self.risk.wealth < _SUSPECT_WEALTH * _CALM

    def _trip(self, cause: str) -> None:
        self._cooling = self.options.cool_down * 2 ** min(self.trips, _MOST_DOUBLED)
        self.trips += 1
        self.epoch += 1
        self._enter(FULL_DEPTH, cause)

    def _begin_recovery(self) -> None:
        """Count fresh rows: of requests that begin from now on."""
        self.epoch += 1
        self._forget()
        if self.recertification.rows:
            self.recertification.begin_block()
        self._block = (self.recertification.attempts, [0] * len(self.baseline.exit_counts))
        self._enter(RECOVERY, "the cool-down is over")

    def _recertify(self, exits: Sequence[int], audits: Sequence[tuple[int, bool]]) -> None:
        attempt, counts = self._block
        if attempt != self.recertification.attempts:
            attempt, counts = self._block = (self.recertification.attempts, [0] * len(counts))
        for exit_index in exits:
            counts[exit_index] += 1
        mix = self.mix.update(exits) if self.mix else math.inf
        for _, is_loss in audits:
            if self.recertification.update(is_loss):
                self._recover(tuple(counts), has_shifted=mix >= self._mix_suspect)
                return

    def _recover(self, counts: tuple[int, ...], has_shifted: bool) -> None:
        """The policy was certified again, on rows that left at `counts`: the baseline if the old one fits no more."""
        if has_shifted:
            self.baseline = replace(self.baseline, exit_counts=counts)
        self.baseline = replace(self.baseline, policy_sha256=self._policy_sha256)
        self.epoch += 1
        self.recertification.begin_block()
        self._forget()
        self._enter(NORMAL, "certified again")
