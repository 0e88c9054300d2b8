"""Evidence against a certificate, gathered while requests run: the exit mix, and audits against full depth.

Two e-processes and a test that brings a policy back. They know rows and losses; when to act on them is the business of
monitor_states.py. Numpy only; nothing grows with the number of rows.

Both e-processes multiply bets e_t >= 0 with E[e_t | past] <= 1 while the certificate holds. Their product M is a test
martingale: P(M ever reaches 1 / alpha) <= alpha (Ville). Shiryaev-Roberts sums, R <- (1 + R) e, look for a change at
any time: R_t - t is a supermartingale, so an alarm at R >= c comes after c rows or more in the mean (Shin, Ramdas and
Rinaldo, "E-detectors", arXiv 2203.03532); the mean over several bets keeps both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from offramp.binomial import allowed_losses, interval, rows_needed

MIX_BETS = (0.02, 0.05, 0.1, 0.2, 0.4)  # shares of what may be bet: small shifts to large ones
RISK_BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)  # shares of 1 / risk; 0.9 would be the most
INTERVAL_LEVEL = 0.01  # probability that an interval of the baseline misses, over all exits together
MIN_TOLERANCE = 1e-4  # of a share; keeps bets below 4,001
_ROWS_AT_ONCE = 32  # between looks at the evidence: 4,001 ** 32 is 1e115
_MOST = 1e100  # evidence beyond this is not counted further
_MOST_DOUBLED = 4  # blocks grow to 16 times the rows of a test without losses, which forgives a risk of 0.7 max_risk
_MAX_LOG = 230.0  # exp of it is about _MOST


@lru_cache(maxsize=256)  # tests begin anew under locks, nearly always with the baseline they had
def share_intervals(exit_counts: tuple[int, ...], tolerance: float) -> list[tuple[float, float]]:
    """Where the share of every exit may lie: Clopper-Pearson at INTERVAL_LEVEL / E, widened by `tolerance`.

    The intervals absorb what the baseline does not know, which would be an alarm in the end without them.
    """
    total, level = sum(exit_counts), INTERVAL_LEVEL / len(exit_counts)
    bounds = [interval(count, total, level) for count in exit_counts]
    return [(max(low - tolerance, 0.0), min(high + tolerance, 1.0)) for low, high in bounds]


class ExitMix:
    """Has the share of any exit left its interval? A Shiryaev-Roberts sum over bets on every exit, up and down.

    For x = 1 where a row leaves exit k, bets g: up 1 + (g / high)(x - high), down 1 + (g / (1 - low))(low - x). Rows
    must come in an order that does not depend on where they leave; in the order of completion shallow rows come first,
    and a batch of them looks like a shift.
    """

    def __init__(self, exit_counts: Sequence[int], tolerance: float) -> None:
        """`exit_counts` (E,), not all 0; `tolerance` >= MIN_TOLERANCE."""
        bets = []
        for exit_index, (low, high) in enumerate(share_intervals(tuple(exit_counts), tolerance)):
            is_here = np.arange(len(exit_counts)) == exit_index  # (E,)
            bets += [1 + bet / high * (is_here - high) for bet in MIX_BETS if high < 1]  # beyond 0 and 1 nothing can be
            bets += [1 + bet / (1 - low) * (low - is_here) for bet in MIX_BETS if low > 0]
        table = np.array(bets).reshape(-1, len(exit_counts)).T  # (E, B) > 0: what a row at an exit multiplies
        self._table = list(np.ascontiguousarray(table))
        self._mean = np.full(len(bets), 1 / max(len(bets), 1))  # (B,)
        self._sums = np.zeros(len(bets))  # (B,) >= 0
        self.value = 0.0  # the evidence now

    def update(self, exits: Sequence[int]) -> float:
        """Rows that left at `exits`, in their order; returns the evidence after them."""
        sums, table = self._sums, self._table
        for start in range(0, len(exits), _ROWS_AT_ONCE):
            for exit_index in exits[start : start + _ROWS_AT_ONCE]:
                sums += 1.0
                sums *= table[exit_index]
            self.value = float(sums.dot(self._mean))
            if self.value > _MOST:
                np.minimum(sums, _MOST, out=sums)
        return self.value


class RiskTest:
    """Is the risk above `max_risk`? Bets on the losses of audited rows, e = 1 + b (loss - max_risk).

    **Which rows.** A row is audited with a probability that is fixed before the row is seen, and by a coin that knows
    nothing of it. So E[loss | past, audited] = E[loss | past]: the losses of audited rows alone are a fair sample of
    all rows, and the test counts those rows and no others. Among them are rows that the policy sends to full depth
    anyway; their loss is 0 and they must be counted, or the test would be about the rows that leave early, whose risk
    is larger than what was certified. The rows that go to full depth *without* being audited have the loss 0 as well,
    known for nothing, and must not be added: early rows are seen with the probability of an audit and these always, so
    at an audit rate a and a share q of early rows the mean loss seen would be a risk / (a q + 1 - q), far below the
    risk; no false alarm, but no alarm either. The audit rate may change with the past (more while suspect), never with
    the row itself.

    `wealth` follows from two counts, whatever their order: it is exact over processes whose counts are added.
    """

    def __init__(self, max_risk: float) -> None:
        """`max_risk` between 0 and 1."""
        self.max_risk = max_risk
        bets = [min(share, 0.9) / max_risk for share in RISK_BETS]
        self._on_loss = [1 + bet * (1 - max_risk) for bet in bets]
        self._on_none = [1 - bet * max_risk for bet in bets]
        self._sums = [0.0] * len(bets)
        self.audits = 0
        self.losses = 0
        self.value = 0.0  # the Shiryaev-Roberts evidence now

    @property
    def wealth(self) -> float:
        """The evidence over the whole life of this test; 1 at the start."""
        return wealth(self.audits, self.losses, self.max_risk)

    def update(self, is_loss: bool) -> float:
        """One audited row; returns the Shiryaev-Roberts evidence."""
        multiplied = self._on_loss if is_loss else self._on_none
        self._sums = [min((1 + total) * factor, _MOST) for total, factor in zip(self._sums, multiplied, strict=True)]
        self.audits += 1
        self.losses += is_loss
        self.value = sum(self._sums) / len(self._sums)
        return self.value


def wealth(audits: int, losses: int, max_risk: float) -> float:
    """The product of all bets after `losses` in `audits` rows, mean over RISK_BETS; 1 for none, at most 1e100."""
    logs = [
        losses * math.log1p(share / max_risk * (1 - max_risk)) + (audits - losses) * math.log1p(-share)
        for share in RISK_BETS
    ]
    return sum(math.exp(min(log, _MAX_LOG)) for log in logs) / len(logs)


class Recertification:
    """Shows on fresh rows, all labelled by full depth, that the risk of the same policy is at most `max_risk`.

    Exact binomial tests on blocks of rows of their own: block i takes n_i rows, fixed before it begins, and passes when
    p_value(losses, n_i, max_risk) <= delta_i = delta / (i (i + 1)). These sum to delta, so a policy whose risk is above
    `max_risk` is ever brought back with probability at most delta, however often it trips and tries. The first block is
    as short as a test without losses can be; every failure doubles the next, which then forgives more. A block that can
    no longer pass ends early, which makes no test pass that would not.
    """

    def __init__(self, max_risk: float, delta: float) -> None:
        self.max_risk = max_risk
        self.delta = delta
        self.attempts = 0  # blocks begun, over all trips
        self.begin_block()

    def begin_block(self) -> None:
        """Forget the rows of the last block and take the next."""
        self.attempts += 1
        self.level = self.delta / (self.attempts * (self.attempts + 1))
        doubled: int = 2 ** min(self.attempts - 1, _MOST_DOUBLED)
        self.num_rows: int = rows_needed(self.max_risk, self.level) * doubled
        self.allowed: int = allowed_losses(self.num_rows, self.max_risk, self.level)  # >= 0
        self.rows = 0
        self.losses = 0

    def update(self, is_loss: bool) -> bool:
        """One fresh row that counts for the risk; whether the block has passed with it. A failed block begins anew."""
        self.rows += 1
        self.losses += is_loss
        if self.losses > self.allowed:
            self.begin_block()
            return False
        return self.rows >= self.num_rows
