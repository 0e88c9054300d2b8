"""What each exit is worth: leaving, right and wrong answers, how far its confidence can be believed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import Manifest
from offramp.policy import Policy
from offramp.report.findings import Confusion, ExitFinding, RetentionBin
from offramp.report.frontier import saved_ms
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.diagnostics import Overthinking, overthinking, quality
from offramp.tuning.replay import Replay, exit_shares

NUM_LENGTH_BINS = 8


def exit_findings(trace: Trace, policy: Policy, decided: Replay, manifest: Manifest) -> tuple[ExitFinding, ...]:
    """One finding per exit, in order of depth."""
    shares = exit_shares(decided.exit_index, trace.num_exits)
    saved = saved_ms(trace, decided.exit_index)
    temperatures = policy.temperatures or (1.0,) * trace.num_exits
    known = trace.labels != UNKNOWN
    labels, is_labelled = trace.labels[known], bool(known.any())
    right = trace.predictions[known] == labels[:, None]  # (L, E)
    found = []
    for k in range(trace.num_exits):
        leavers = decided.exit_index == k
        changed = trace.predictions[leavers, k] != trace.predictions[leavers, -1]
        logits = trace.logits[known, k]
        scaled = quality(logits, labels, temperatures[k]) if is_labelled else None
        found.append(
            ExitFinding(
                exit_index=k,
                name=manifest.exits[k].name,
                threshold=policy.limits[k] if k < len(policy.limits) else None,
                temperature=float(temperatures[k]),
                segment_ms=float(trace.costs_ms[k]),
                share=float(shares[k]),
                reached=float(shares[k:].sum()),
                changed=_mean(changed),
                saved_ms=float(saved[k]),
                agreement=float((trace.predictions[:, k] == trace.predictions[:, -1]).mean()),
                accuracy=_mean(right[:, k]),
                accuracy_leaving=_mean(right[leavers[known], k]),
                ece_unscaled=quality(logits, labels, 1.0).ece if is_labelled else None,
                quality=scaled,
                lost_later=int((right[:, k] & ~right[:, -1]).sum()) if is_labelled else None,
                won_later=int((~right[:, k] & right[:, -1]).sum()) if is_labelled else None,
            )
        )
    return tuple(found)


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


def overthinking_shares(trace: Trace, policy: Policy) -> Overthinking | None:
    """How often going on spoils a right answer; None without labels."""
    known = trace.labels != UNKNOWN
    if not known.any():
        return None
    return overthinking(trace.rows(known), np.array(policy.temperatures or (1.0,) * trace.num_exits))


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


def _mean(flags: NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if len(flags) else None
