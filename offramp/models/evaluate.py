"""How good every exit is, measured in torch, in float32: accuracy of classes, error of values, perplexity of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models.devices import device_of
from offramp.models.losses import Answers, answers_from_exits
from offramp.models.rows import Batch, Rows, Targets

EVALUATION_BATCH = 64
THRESHOLDS = 101  # quantiles of what the exits say, tried as thresholds


@dataclass(frozen=True)
class Outcome:
    """What all exits said about N rows, in the order of the batches of seed 0.

    `logits` (N, E, C), `learned` (N, E) with NaN for an exit without a learned confidence, `targets` (N,).
    """

    logits: NDArray[np.float32]
    learned: NDArray[np.float32]
    targets: Targets


def answers_of(model: nn.Module, batch: Batch, teacher: nn.Module | None = None) -> Answers:
    """Run the model on a batch, and the teacher on the same inputs, which learns nothing."""
    device = device_of(model)
    inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.inputs.items()}
    told = None
    if teacher is not None:
        with torch.no_grad():
            told = answers_from_exits(teacher(**inputs)).logits[-1]
    return answers_from_exits(model(**inputs), told)


def outcome_of(model: nn.Module, rows: Rows) -> Outcome:
    """Run the model on all rows; leaves it in eval mode. Raises OptionError without rows."""
    if not len(rows.targets):
        raise OptionError("measuring a model: got no rows")
    model.eval()
    logits, learned, targets = [], [], []
    with torch.inference_mode():
        for batch in rows.batches(EVALUATION_BATCH, seed=0):
            answers = answers_of(model, batch)
            missing = answers.logits[0].new_full((len(batch.targets),), torch.nan, dtype=torch.float32)
            logits.append(torch.stack([said.float() for said in answers.logits], 1).cpu())
            sure = [missing if told is None else told.float().reshape(-1) for told in answers.learned]
            learned.append(torch.stack(sure, 1).cpu())
            targets.append(batch.targets)
    return Outcome(torch.cat(logits).numpy(), torch.cat(learned).numpy(), np.concatenate(targets))


def quality_per_exit(model: nn.Module, rows: Rows) -> tuple[float, ...]:
    """Return the accuracy of every exit, its mean absolute error where targets are values, or its perplexity."""
    if measure_of(rows) == "perplexity":
        return perplexity_per_exit(model, rows)
    outcome = outcome_of(model, rows)
    if np.issubdtype(outcome.targets.dtype, np.floating):
        errors = np.abs(outcome.logits[:, :, 0] - outcome.targets[:, None])  # (N, E)
        return tuple(float(error) for error in errors.mean(axis=0, dtype=np.float64))
    right = outcome.logits.argmax(axis=-1) == outcome.targets[:, None]  # (N, E)
    return tuple(float(num) / len(right) for num in right.sum(axis=0))


def measure_of(rows: Rows) -> str:
    """Return what `quality_per_exit` says of these rows: accuracy, error or, of windows of tokens, perplexity."""
    if rows.targets.ndim == 2:
        return "perplexity"
    return "error" if np.issubdtype(rows.targets.dtype, np.floating) else "accuracy"


def perplexity_per_exit(model: nn.Module, rows: Rows) -> tuple[float, ...]:
    """Return the exponential of every exit's mean loss of a token; leaves the model in eval mode."""
    model.eval()
    totals: list[NDArray[np.float64]] = []  # one (E,) per batch: a vocabulary of logits is not kept
    with torch.inference_mode():
        for batch in rows.batches(EVALUATION_BATCH, seed=0):
            said = answers_of(model, batch).logits
            targets = torch.from_numpy(batch.targets).to(said[0].device).flatten()
            losses = [functional.cross_entropy(logits.float(), targets) for logits in said]
            totals.append(len(targets) * torch.stack(losses).cpu().double().numpy())
    return tuple(float(value) for value in np.exp(np.sum(totals, axis=0) / rows.targets.size))


def frontier(quality: NDArray[Any], sureness: NDArray[Any], costs: Sequence[float]) -> NDArray[np.float64]:
    """Return mean cost and mean quality for one threshold after another, (K, 2), cheapest first.

    quality (N, E) of answering row n at exit e; sureness (N, E - 1) of the exits before the final one, larger is surer;
    costs (E,) of having come to an exit. A row leaves at the first exit that is at least as sure as the threshold,
    which is the same for all exits: the lowest lets all rows leave at the first one, the highest none.
    """
    num_rows = len(quality)
    thresholds = np.unique(np.quantile(sureness, np.linspace(0.0, 1.0, THRESHOLDS))) if sureness.size else np.empty(0)
    points = []
    for threshold in [*thresholds, np.inf]:
        leaves = np.concatenate([sureness >= threshold, np.ones((num_rows, 1), bool)], axis=1)
        at = leaves.argmax(axis=1)  # (N,) the first exit that is sure
        points.append((np.asarray(costs, np.float64)[at].mean(), quality[np.arange(num_rows), at].mean()))
    return np.array(sorted(points), np.float64)


def area_under(points: NDArray[np.float64]) -> float:
    """Return the mean over costs of the best quality to be had for it; points (K, 2) as `frontier` returns them.

    At a cost between two points one has the better of the cheaper ones: a staircase.
    """
    best = np.maximum.accumulate(points[:, 1])
    widths = np.diff(points[:, 0])  # (K - 1,) >= 0
    return float((widths * best[:-1]).sum() / widths.sum()) if widths.sum() > 0 else float(best[-1])
