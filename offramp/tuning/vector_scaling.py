"""Vector scaling: a factor and an offset per class instead of one temperature, and whether that is worth having.

softmax(w * z + b) (Guo et al. 2017, arXiv 1706.04599, section 4.2). The runtime takes a scalar temperature only, so
this is a diagnostic: it says how much likelihood the scalar leaves lying. Judged on rows that did not fit it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.trace import UNKNOWN
from offramp.tuning.temperature import fit_temperature, softmax

# Of the loss per row: far below what any number of rows can tell apart.
_RIDGE = 1e-6  # towards w = 1, b = 0; without it separable rows have no optimum, and b is free up to a constant
_TOLERANCE = 1e-9
_MAX_STEPS = 50
_STANDARD_ERRORS = 2.0  # by which the gain has to be above 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VectorScaling:
    """A fit on all labelled rows, and what two-fold cross-fitting says of it.

    The likelihoods are means of -ln p(label) over rows that the fit has not seen; `gain` is temperature less vector,
    with the standard error of the mean of the rows' differences.
    """

    weights: tuple[float, ...]  # C
    offsets: tuple[float, ...]  # C, sum 0
    nll_unscaled: float
    nll_temperature: float
    nll_vector: float
    gain: float
    gain_standard_error: float
    is_worth_it: bool  # the gain is above 0 by two standard errors
    changed: float  # share of the rows whose prediction it changes


def vector_scaling(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> VectorScaling:
    """Fit `logits` (N, C) to `labels` (N,), and judge the fit; rows without a label are left out.

    Raises DataError when fewer than two rows have one.
    """
    known = labels != UNKNOWN
    if known.sum() < 2:
        raise DataError(f"vector scaling: got {known.sum()} labelled rows, expected at least 2; record more of them")
    rows, classes = logits[known].astype(np.float64), labels[known]  # not shifted: the weights differ by class
    folds = np.arange(len(classes)) % 2  # neighbours may be alike: both folds get some of them
    losses = np.empty((3, len(classes)))  # unscaled, temperature, vector
    losses[0] = _row_losses(rows, classes)
    for fold in (0, 1):
        seen, unseen = folds != fold, folds == fold
        temperature = fit_temperature(rows[seen], classes[seen])
        losses[1, unseen] = _row_losses(rows[unseen] / temperature, classes[unseen])
        weights, offsets = fit_vector(rows[seen], classes[seen])
        losses[2, unseen] = _row_losses(rows[unseen] * weights + offsets, classes[unseen])
    weights, offsets = fit_vector(rows, classes)
    gains = losses[1] - losses[2]
    gain, standard_error = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))
    unscaled, temperature, vector = losses.mean(axis=1).tolist()
    return VectorScaling(
        weights=tuple(weights.tolist()),
        offsets=tuple(offsets.tolist()),
        nll_unscaled=unscaled,
        nll_temperature=temperature,
        nll_vector=vector,
        gain=gain,
        gain_standard_error=standard_error,
        is_worth_it=gain > _STANDARD_ERRORS * standard_error,
        changed=float(((rows * weights + offsets).argmax(axis=1) != rows.argmax(axis=1)).mean()),
    )


def fit_vector(rows: Floats, classes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Weights and offsets (C,) that minimise the mean loss of `classes` (N,) under `rows` (N, C), by Newton's method.

    The loss is convex in both; steps are halved until they improve it (Boyd & Vandenberghe 2004, section 9.5).
    """
    num_classes = rows.shape[1]
    start = np.concatenate([np.ones(num_classes), np.zeros(num_classes)])
    parameters, loss = start, _loss(start, start, rows, classes)
    for _ in range(_MAX_STEPS):
        gradient, hessian = _derivatives(parameters, start, rows, classes)
        step = np.linalg.solve(hessian, gradient)
        decrement = float(gradient @ step)
        if decrement < _TOLERANCE:
            break
        size = 1.0
        while _loss(parameters - size * step, start, rows, classes) > loss - 0.25 * size * decrement and size > 1e-6:
            size /= 2
        parameters = parameters - size * step
        loss = _loss(parameters, start, rows, classes)
    weights, offsets = parameters[:num_classes], parameters[num_classes:]
    return weights, offsets - offsets.mean()


def _row_losses(scaled: Floats, classes: NDArray[np.int64]) -> Floats:
    """-ln p(class) of every row, (N,)."""
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    losses: Floats = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(classes)), classes]
    return losses


def _loss(parameters: Floats, start: Floats, rows: Floats, classes: NDArray[np.int64]) -> float:
    weights, offsets = np.split(parameters, 2)
    ridge = _RIDGE / 2 * float(((parameters - start) ** 2).sum())
    return float(_row_losses(rows * weights + offsets, classes).mean()) + ridge


def _derivatives(parameters: Floats, start: Floats, rows: Floats, classes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Gradient (2C,) and Hessian (2C, 2C) of `_loss`; with p = softmax(s): d/ds = p - y, d2/ds2 = diag(p) - p p'."""
    weights, offsets = np.split(parameters, 2)
    p = softmax(rows * weights + offsets)  # (N, C)
    residual = p.copy()
    residual[np.arange(len(classes)), classes] -= 1
    count = len(classes)
    gradient = np.concatenate([(residual * rows).mean(axis=0), residual.mean(axis=0)]) + _RIDGE * (parameters - start)
    zp = rows * p
    blocks = [
        [np.diag((zp * rows).sum(axis=0)) - zp.T @ zp, np.diag(zp.sum(axis=0)) - zp.T @ p],
        [np.diag(zp.sum(axis=0)) - p.T @ zp, np.diag(p.sum(axis=0)) - p.T @ p],
    ]
    hessian = np.block(blocks) / count + _RIDGE * np.eye(len(parameters))
    return gradient, hessian
