"""What each exit is worth: leaving, right and wrong answers, how far its confidence can be believed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import SCORES, Manifest
from offramp.policy import Policy
from offramp.report.findings import Bin, Confusion, ExitFinding, Overthinking, RetentionBin
from offramp.report.frontier import saved_ms
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.replay import Replay, exit_shares, scores_from_logits
from offramp.tuning.temperature import NUM_BINS, expected_calibration_error

NUM_LENGTH_BINS = 8


def exit_findings(trace: Trace, policy: Policy, decided: Replay, manifest: Manifest) -> tuple[ExitFinding, ...]:
    """One finding per exit, in order of depth."""
    shares = exit_shares(decided.exit_index, trace.num_exits)
    saved = saved_ms(trace, decided.exit_index)
    temperatures = policy.temperatures or (1.0,) * trace.num_exits
    known = trace.labels != UNKNOWN
    right = trace.predictions[known] == trace.labels[known, None]  # (L, E)
    found = []
    for k in range(trace.num_exits):
        leavers = decided.exit_index == k
        changed = trace.predictions[leavers, k] != trace.predictions[leavers, -1]
        confidence = [_confidence(trace, k, known, 1 / t) for t in (1.0, temperatures[k])] if known.any() else []
        found.append(
            ExitFinding(
                exit_index=k,
                name=manifest.exits[k].name,
                threshold=policy.limits[k] if k < len(policy.limits) else None,
                temperature=float(temperatures[k]),
                segment_ms=float(trace.costs_ms[k]),
                share=float(shares[k]),
                reached=float(shares[k:].sum()),
                changed=float(changed.mean()) if len(changed) else None,
                saved_ms=float(saved[k]),
                agreement=float((trace.predictions[:, k] == trace.predictions[:, -1]).mean()),
                accuracy=_mean(right[:, k]),
                accuracy_leaving=_mean(right[leavers[known], k]),
                ece_unscaled=expected_calibration_error(confidence[0], right[:, k]) if confidence else None,
                ece=expected_calibration_error(confidence[1], right[:, k]) if confidence else None,
                auroc=failure_auroc(confidence[1], right[:, k]) if confidence else None,
                lost_later=int((right[:, k] & ~right[:, -1]).sum()) if confidence else None,
                won_later=int((~right[:, k] & right[:, -1]).sum()) if confidence else None,
                reliability=reliability_bins(confidence[1], right[:, k]) if confidence else (),
            )
        )
    return tuple(found)


def reliability_bins(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """The bins of `expected_calibration_error` that have rows: equal widths, closed above."""
    bins = (np.ceil(np.asarray(confidence, np.float64) * NUM_BINS).astype(np.int64) - 1).clip(0, NUM_BINS - 1)
    found = []
    for position in np.unique(bins):
        inside = bins == position
        found.append(Bin(float(confidence[inside].mean()), float(correct[inside].mean()), int(inside.sum())))
    return tuple(found)


def failure_auroc(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> float | None:
    """How often a right answer is surer than a wrong one, ties counting half; None when there is only one kind."""
    num_right, num_wrong = int(correct.sum()), int((~correct).sum())
    if not num_right or not num_wrong:
        return None
    _, position, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank of equal values
    above = ranks[position][correct].sum() - num_right * (num_right + 1) / 2
    return float(above / (num_right * num_wrong))


def exit_agreement(trace: Trace) -> tuple[tuple[float, ...], ...]:
    """(E, E) the share of rows to which two exits say the same."""
    said = trace.predictions
    return tuple(
        tuple(float((said[:, i] == said[:, j]).mean()) for j in range(trace.num_exits)) for i in range(trace.num_exits)
    )


def class_confusion(trace: Trace, decided: Replay, names: tuple[str, ...]) -> Confusion:
    """The policy's answers against the labels, or against full depth's answers where there are no labels."""
    known = trace.labels != UNKNOWN
    num_classes = trace.logits.shape[2]
    if known.any():
        expected, said = trace.labels[known], decided.prediction[known]
    else:
        expected, said = trace.predictions[:, -1], decided.prediction
    counts = np.bincount(expected * num_classes + said, minlength=num_classes**2).reshape(num_classes, num_classes)
    return Confusion("label" if known.any() else "full depth", names, tuple(map(tuple, counts.tolist())))


def overthinking(trace: Trace) -> Overthinking | None:
    """How often going on spoils a right answer (Kaya et al. 2019, arXiv 1810.07052, section 4); None without labels."""
    known = trace.labels != UNKNOWN
    if not known.any():
        return None
    right = trace.predictions[known] == trace.labels[known, None]  # (L, E)
    earlier, final = right[:, :-1].any(axis=1), right[:, -1]
    return Overthinking(
        num_rows=len(right),
        destroyed=int((earlier & ~final).sum()),
        needed=int((~earlier & final).sum()),
        wasted=int((right[:, 0] & final).sum()) if trace.num_exits > 1 else 0,
    )


def retention_bins(trace: Trace, decided: Replay) -> tuple[RetentionBin, ...]:
    """Token retention at the exit where each row left, in bins of as many rows each; empty without retention."""
    if not trace.retention.size:
        return ()
    kept = trace.retention[np.arange(len(trace.retention)), decided.exit_index]
    counted = np.isfinite(kept) & (trace.lengths != UNKNOWN)
    kept, lengths = kept[counted], trace.lengths[counted]
    if not len(kept):
        return ()
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_LENGTH_BINS + 1), method="lower"))
    bins = np.searchsorted(edges[1:-1], lengths, side="right")
    found = []
    for position in np.unique(bins):
        inside = bins == position
        p5, p50, p95 = np.percentile(kept[inside], (5, 50, 95)).tolist()
        shortest, longest = int(lengths[inside].min()), int(lengths[inside].max())
        found.append(RetentionBin(shortest, longest, int(inside.sum()), p5, p50, p95))
    return tuple(found)


def _confidence(trace: Trace, exit_index: int, known: NDArray[np.bool_], inverse: float) -> NDArray[np.float32]:
    """The max probability of the labelled rows at one exit, (L,)."""
    return scores_from_logits(trace.logits[known, exit_index], inverse)[:, SCORES.index("max_prob")]


def _mean(right: NDArray[np.bool_]) -> float | None:
    return float(right.mean()) if len(right) else None
