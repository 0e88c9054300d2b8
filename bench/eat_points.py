"""The operating points of an adaptive encoder, and what each is worth on test rows: no clock here.

Thresholds are chosen on the validation trace alone; accuracy, depth, retention and FLOPs are read off the test trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import OptionError
from offramp.models.encoder import EarlyExitEncoder
from offramp.policy import Policy
from offramp.trace import Trace
from offramp.tuning.calibrate import CalibrateOptions, calibrate, scaled_temperatures
from offramp.tuning.certify import CertifyOptions, certify
from offramp.tuning.replay import accuracy, exit_shares, replay
from offramp.tuning.temperature import ECE_LIMIT
from offramp.tuning.thresholds import fastest_thresholds

TAUS = (0.80, 0.85, 0.90, 0.95)  # arXiv 2510.12856, section 3.3
DROPS = (0.0, 0.005, 0.01)  # of accuracy on validation
RISKS = (0.02, 0.05)  # certified beside the bundle's, each a statement of its own
DENSE, STATIC, EAT = "dense", "static", "eat"
FULL_DEPTH, CERTIFIED, PATIENCE, FASTEST, AS_STATIC = (
    "eat, full depth",
    "eat, certified",
    "eat, patience",
    "eat, fastest",
    "eat, as fast as static",
)

Flops = Mapping[int, NDArray[np.float64]]  # tokens of a row -> (E,): FLOPs up to each exit


@dataclass(frozen=True)
class Point:
    """One policy: the model's name in the table, and what the column tau says of it."""

    model: str
    tau: str
    policy: Policy

    @property
    def in_batches(self) -> bool:
        """Tell whether its throughput is measured too: of the paper's points, the bundle's and the fastest."""
        return self.model not in (PATIENCE, AS_STATIC) and self.tau not in [f"risk {risk:g}" for risk in RISKS]

    @property
    def key(self) -> str:
        """Return the name of the point among all."""
        return f"{self.model} {self.tau}".strip()


def points_of(validation: Trace, certified: Policy, options: CertifyOptions, target_speedup: float) -> list[Point]:
    """Return all points of one model with E exits; `certified` is its bundle's policy, `options` are how it came about,
    `target_speedup` is that of a static model over its full depth.

    Exits whose calibration error is above 2 % are scaled before tau is swept (arXiv 2510.12856, section 7.2). A point
    as fast as the static model is left out where thresholds cannot reach it.
    """
    early = validation.num_exits - 1
    temperatures = scaled_temperatures(validation, ECE_LIMIT)
    points = [Point(FULL_DEPTH, "", Policy.full_depth())]
    points += [Point(EAT, f"{tau:.2f}", Policy.thresholds("max_prob", [tau] * early, temperatures)) for tau in TAUS]
    points.append(Point(CERTIFIED, f"risk {options.max_risk:g}", certified))
    for risk in RISKS:
        found = certify(validation, Policy("max_prob"), replace(options, max_risk=risk))
        points.append(Point(CERTIFIED, f"risk {risk:g}", found.policy))
    points += [
        Point(PATIENCE, "agree", Policy("max_prob", patience=2)),
        Point(PATIENCE, "agree, 0.90", Policy("max_prob", (0.90,) * early, temperatures, patience=2)),
    ]
    for drop in DROPS:
        policy = fastest_thresholds(validation, "max_prob", drop, temperatures)
        points.append(Point(FASTEST, f"drop {drop:g}", policy))
    try:
        chosen = calibrate(validation, CalibrateOptions(target_speedup=max(target_speedup, 1.01)))
        points.append(Point(AS_STATIC, "", chosen.policy))
    except OptionError:
        pass
    return points


def flops_of(model: EarlyExitEncoder, lengths: NDArray[np.int64]) -> Flops:
    """Count what one row of each length costs up to each exit: matrix products of layers and heads, as they run.

    PyTorch's FlopCounterMode counts 2 for a multiplication and its addition, and no softmax, norm or sorting.
    """
    found = {}
    for length in np.unique(lengths).tolist():
        ids = torch.ones((1, length), dtype=torch.int64)
        totals = []
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            for head, (hidden, tokens) in zip(model.heads, model.states(ids, torch.ones_like(ids)), strict=True):
                head(hidden, tokens)
                totals.append(float(counter.get_total_flops()))
        found[length] = np.array(totals)
    return found


def worth_of(point: Point, test: Trace, exits: tuple[int, ...], flops: Flops, dense_flops: float) -> dict[str, Any]:
    """Return what a policy does on the test rows of a model with exits after the layers `exits`.

    `avg_depth` is in layers. `avg_retention` is the share of tokens that the final exit would see, as in the paper, and
    `retention_at_exit` that where rows leave; 1 for a model that drops none. `flops` is a share of `dense_flops`.
    """
    decided = replay(point.policy, test)
    at = decided.exit_index
    rows = np.arange(len(at))
    left = test.retention if test.retention.shape[1] else np.ones((len(at), len(exits)), np.float32)
    spent = np.array([flops[length][k] for length, k in zip(test.lengths.tolist(), at.tolist(), strict=True)])
    return {
        "accuracy": accuracy(decided.prediction, test.labels),
        "avg_depth": float(np.array(exits)[at].mean()),
        "avg_retention": float(left[:, -1].mean()),
        "retention_at_exit": float(left[rows, at].mean()),
        "flops": float(spent.mean()) / dense_flops,
        "shares": exit_shares(at, len(exits)).round(4).tolist(),
        "agreement": float((decided.prediction == test.predictions[:, -1]).mean()),
    }
