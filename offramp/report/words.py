"""Numbers as people read them, and the one sentence that says what to see in each figure."""

from __future__ import annotations

from offramp.binomial import rows_needed
from offramp.policy import Policy
from offramp.report.findings import Confusion, ExitFinding, Findings, RetentionBin, RiskPath


def share(value: float | None, decimals: int = 1) -> str:
    """A share as a percentage; a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.{decimals}f}%"


def ms(value: float | None) -> str:
    """A time with three digits."""
    if value is None:
        return "–"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def count(value: int | None) -> str:
    """A whole number with thousands apart."""
    return "–" if value is None else f"{value:,}"


def number(value: float | None, decimals: int = 3) -> str:
    """A plain number; a dash where it is not known."""
    return "–" if value is None else f"{value:.{decimals}f}"


def times(slow_ms: float, fast_ms: float) -> str:
    """How many times as fast."""
    return f"{slow_ms / fast_ms:.2f}×" if fast_ms > 0 else "–"


def policy_text(policy: Policy) -> str:
    """The rule as a sentence."""
    if not any(limit is not None for limit in policy.limits) and not policy.patience:
        return "Every row goes to full depth."
    open_exits = [str(k) for k, limit in enumerate(policy.limits) if limit is not None]
    clauses = []
    if policy.limits:
        side = "at most" if policy.score == "entropy" else "at least"
        name = "learned confidence" if policy.score == "learned" else policy.score
        clauses.append(f"its {name} is {side} the exit's threshold (exits {', '.join(open_exits)})")
    if policy.patience:
        clauses.append(f"the last {policy.patience} exits agree")
    if policy.minimum_depth > 1:
        clauses.append(f"{policy.minimum_depth} segments have run")
    if policy.veto.margin:
        clauses.append(f"the margin is at least {policy.veto.margin:g}")
    if policy.veto.previous:
        clauses.append("the exit before said the same")
    if policy.veto.mean:
        clauses.append("the mean over the exits so far says the same")
    sources = f" {len(policy.sources)} sources have rules of their own." if policy.sources else ""
    return f"A row leaves an exit when {' and '.join(clauses)}.{sources}"


def headline(found: Findings) -> str:
    """The page in one sentence."""
    chosen, full = found.chosen, found.full_depth
    if chosen.mean_depth == full.mean_depth:
        return "Every row goes to full depth: nothing is saved, and no answer is changed."
    quality = f"{share(chosen.agreement)} of the answers are those of the whole model"
    if chosen.accuracy is not None and full.accuracy is not None:
        quality += f", and accuracy is {share(chosen.accuracy)} instead of {share(full.accuracy)}"
    return (
        f"An answer takes {ms(chosen.ms)} on average instead of the {ms(found.baseline.ms)} "
        f"{_of_what(found)}; {quality}."
    )


def _of_what(found: Findings) -> str:
    return "of the uncut model" if found.baseline.kind == "uncut" else "of full depth"


def frontier_reading(found: Findings) -> str:
    chosen, full = found.chosen, found.full_depth
    against = f"{times(found.baseline.ms, chosen.ms)} the speed {_of_what(found)}"
    if chosen.accuracy is None or full.accuracy is None:
        return f"The policy has {against} and gives the answer of full depth to {share(chosen.agreement)} of the rows."
    lost = full.accuracy - chosen.accuracy
    change = "costs no accuracy" if lost <= 0 else f"costs {100 * lost:.1f} points of accuracy"
    return f"The policy has {against} and {change} on these rows."


def leaving_reading(exits: tuple[ExitFinding, ...]) -> str:
    busiest = max(exits, key=lambda found: found.share)
    early = 1 - exits[-1].share
    return f"{share(early)} of the rows leave early; {exit_name(busiest, exits)} answers most, {share(busiest.share)}."


def survivors_reading(exits: tuple[ExitFinding, ...]) -> str:
    half = next((found for found in exits if found.reached <= 0.5), None)
    depth = sum(found.reached for found in exits)
    if half is None:
        return (
            f"More than half of the rows go all the way; a row needs {depth:.2f} of {len(exits)} segments on average."
        )
    return (
        f"Fewer than half are left from segment {half.exit_index} on; a row needs {depth:.2f} of {len(exits)} segments."
    )


def waterfall_reading(found: Findings) -> str:
    savings = [step for step in found.waterfall.steps if step.kind == "saving" and step.ms < 0]
    if not savings:
        return "No exit saves anything under this policy."
    best = min(savings, key=lambda step: step.ms)
    if found.waterfall.source == "placement":
        costs = sum(step.ms for step in found.waterfall.steps if step.kind == "cost")
        saved = -sum(step.ms for step in savings)
        return f"The exits kept save {ms(saved)} per row and cost {ms(costs)}; {best.name} most, {ms(-best.ms)}."
    part = best.ms / sum(step.ms for step in savings)
    return f"{best.name.capitalize()} saves the most: {ms(-best.ms)} per row, {share(part, 0)} of all that is saved."


def reliability_reading(exits: tuple[ExitFinding, ...]) -> str:
    errors = {found.exit_index: found.quality.ece for found in exits if found.quality}
    worst = max(errors, key=lambda k: errors[k])
    return (
        "Dots on the diagonal mean a confidence that can be believed; furthest off is "
        f"{exit_name(exits[worst], exits)}, "
        f"by {100 * errors[worst]:.1f} points on average."
    )


def risk_reading(path: RiskPath) -> str:
    needed = rows_needed(path.max_risk, 1 - path.confidence)
    if path.num_rows < needed:
        return (
            f"Nothing can be shown yet: {count(path.num_rows)} rows are fewer than the {count(needed)} needed at least."
        )
    last = [point for point in path.points if point.certified][-1]
    if last.mean_depth == path.points[0].mean_depth:
        return f"Not even the first step away from full depth stays within {share(path.max_risk)} for sure."
    verb = "was" if path.is_of_certificate else "would be"
    return (
        f"Leaving early {verb} certified down to {last.mean_depth:.2f} of {path.points[0].mean_depth:.0f} "
        "segments per row; "
        f"beyond, the bound crosses the {share(path.max_risk)} that are allowed."
    )


RISK_AXES = {
    "consistency": "rows answered differently from full depth, %",
    "accuracy_gap": "rows wrong where full depth is right, %",
    "accuracy_gap_signed": "accuracy lost, points",
    "missed_detection": "rows of the class that are missed, %",
    "hellinger": "mean Hellinger distance × 100",
    "brier": "mean Brier score lost × 100",
}


def agreement_reading(exits: tuple[ExitFinding, ...]) -> str:
    if len(exits) == 1:
        return "There is only one exit."
    first, last = exits[0], exits[-2]
    return (
        f"Exit {first.exit_index} says what the final exit says for {share(first.agreement)} of the rows, exit "
        f"{last.exit_index} for {share(last.agreement)}."
    )


def confusion_reading(confusion: Confusion) -> str:
    total = sum(map(sum, confusion.counts))
    right = sum(confusion.counts[i][i] for i in range(len(confusion.counts)))
    pairs = [(n, i, j) for i, row in enumerate(confusion.counts) for j, n in enumerate(row) if i != j and n]
    against = "labels" if confusion.reference == "label" else "full depth's answers"
    if not pairs:
        return f"All {count(total)} answers are those of the {against}."
    n, i, j = max(pairs)
    names = confusion.names
    return (
        f"{share(right / total)} lie on the diagonal, against {against}; most often “{names[i]}” is answered as "
        f"“{names[j]}” ({count(n)} rows)."
    )


def overthinking_reading(found: Findings) -> str:
    over = found.overthinking
    assert over is not None
    needed = (found.full_depth.accuracy or 0) - over.wasteful
    return (
        f"Going on spoils {share(over.destructive)} of the rows (an earlier exit was right, the end is not) "
        f"and saves {share(max(needed, 0))} that only the final exit gets right."
    )


def retention_reading(bins: tuple[RetentionBin, ...]) -> str:
    first, last = bins[0], bins[-1]
    return (
        f"Rows of {first.shortest} to {first.longest} tokens keep {share(first.p50, 0)} of them in the median, rows of "
        f"{last.shortest} to {last.longest} keep {share(last.p50, 0)}."
    )


def exit_name(found: ExitFinding, exits: tuple[ExitFinding, ...]) -> str:
    return "the final exit" if found.exit_index == len(exits) - 1 else f"exit {found.exit_index}"
