"""The page as a list of sections: each with its reading, its figures, its caption and the numbers behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from offramp.report import figures, words
from offramp.report.findings import Example, Findings, Missing
from offramp.report.words import count, ms, number, share


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure; the first column names the rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One card of the page. With `missing`, it says only that."""

    key: str
    topic: str
    reading: str = ""
    drawings: tuple[str, ...] = ()  # SVG
    captions: tuple[str, ...] = ()  # one under each drawing, where there are several
    caption: str = ""
    brief: Table | None = None  # shown openly
    table: Table | None = None
    missing: Missing | None = None
    is_wide: bool = False


def sections(found: Findings) -> tuple[Section, ...]:
    """Every section in order; those whose data are missing say what adds them."""
    makers: tuple[Callable[[Findings], Section | None], ...] = (
        _frontier,
        _leaving,
        _survivors,
        _waterfall,
        _risk_path,
        _reliability,
        _agreement,
        _confusion,
        _overthinking,
        _retention,
    )
    return _paired([section for section in (make(found) for make in makers) if section])


def _paired(made: list[Section]) -> tuple[Section, ...]:
    """Two narrow sections share a line; one that would stand alone becomes wide."""
    result: list[Section] = []
    num_narrow = 0
    for section, following in zip(made, [*made[1:], None], strict=True):
        num_narrow = 0 if section.is_wide else num_narrow + 1
        alone = num_narrow % 2 == 1 and (following is None or following.is_wide)
        result.append(replace(section, is_wide=True) if alone else section)
    return tuple(result)


def _frontier(found: Findings) -> Section:
    where = f"{found.subject.backend} {found.subject.precision}"
    rows = tuple(
        (
            point.name,
            f"{point.ms:.3f}",
            words.times(found.baseline.ms, point.ms),
            share(point.accuracy, 2),
            share(point.agreement, 2),
            number(point.mean_depth, 2),
            point.known or "–",
        )
        for point in found.alternatives
    )
    brief = tuple(
        (point.name, ms(point.ms), share(point.accuracy if found.chosen.accuracy is not None else point.agreement))
        for point in sorted(found.alternatives, key=lambda point: point.ms)
        if point.kind != "sweep"
    )
    kinds = "Line: one threshold for all exits, from strict to loose. Squares: everybody leaves at that exit."
    clock = "not a measurement end to end: for that, run offramp bench."
    if found.alternative("measured"):
        clock = (
            "not a measurement end to end. Rings: what offramp bench timed end to end, and scored, on rows of its own."
        )
    return Section(
        "frontier",
        "Accuracy against time",
        words.frontier_reading(found),
        (figures.frontier(found),),
        caption=f"{kinds} {count(found.subject.num_rows)} rows replayed; a row's time is the sum of the median "
        "times of its "
        f"segments for one row ({where}), {clock}",
        brief=Table(("", "per row", "accuracy" if found.chosen.accuracy is not None else "same answer"), brief),
        table=Table(
            (
                "alternative",
                "ms per row",
                "speed",
                "accuracy",
                "same answer",
                "mean depth",
                "known about other rows",
            ),
            rows,
        ),
        is_wide=True,
    )


def _leaving(found: Findings) -> Section:
    rows = tuple(
        (
            _exit(found, k),
            "–" if point.threshold is None else f"{point.threshold:.4f}",
            f"{point.temperature:.2f}",
            share(point.share),
            share(point.accuracy),
            share(point.accuracy_leaving),
            share(point.changed),
        )
        for k, point in enumerate(found.exits)
    )
    columns = ("exit", "threshold", "temperature", "leave", "accuracy on all", "on its leavers", "leavers changed")
    return Section(
        "leaving",
        "Where rows leave",
        words.leaving_reading(found.exits),
        (figures.leaving(found.exits),),
        caption=f"Share of {count(found.subject.num_rows)} rows that leave at each exit, in %. A leaver is "
        "changed when full "
        "depth would have answered otherwise.",
        table=Table(columns, rows),
    )


def _survivors(found: Findings) -> Section:
    rows = tuple((str(k), share(point.reached), f"{point.segment_ms:.3f}") for k, point in enumerate(found.exits))
    return Section(
        "survivors",
        "Survivors along depth",
        words.survivors_reading(found.exits),
        (figures.survivors(found.exits),),
        caption=f"Share of {count(found.subject.num_rows)} rows for which each segment runs, in %; the area is "
        "the mean depth.",
        table=Table(("segment", "rows it runs for", "ms for one row"), rows),
    )


def _waterfall(found: Findings) -> Section:
    waterfall = found.waterfall
    rows = [(step.name, f"{step.ms:.4f}" if step.kind == "level" else f"{step.ms:+.4f}") for step in waterfall.steps]
    rows += [
        (f"exit {dropped.exit_index} dropped; with it", number(dropped.with_it_ms, 4)) for dropped in waterfall.dropped
    ]
    caption = f"Time per row in ms, averaged over {count(found.subject.num_rows)} rows. "
    if waterfall.source == "trace":
        caption += "From the segment times of the trace; what heads and hand-overs cost is inside the segments."
    else:
        names = ", ".join(str(dropped.exit_index) for dropped in waterfall.dropped) or "none"
        caption = (
            "Time per row in ms, on average over the rows that the placement was chosen on. Exits are counted "
            "as before it; "
            f"dropped: {names}. Full depth takes {number(waterfall.worst_case, 3)} of the uncut model's time."
        )
    return Section(
        "waterfall",
        "What each exit saves and costs",
        words.waterfall_reading(found),
        (figures.waterfall(waterfall),),
        caption=caption,
        table=Table(("step", "ms per row"), tuple(rows)),
        is_wide=True,
    )


def _risk_path(found: Findings) -> Section:
    path = found.risk_path
    rows = tuple(
        (
            f"{point.mean_depth:.3f}",
            f"{point.ms:.3f}",
            f"{point.losses:g}",
            share(point.upper_bound, 2),
            "yes" if point.certified else "no",
        )
        for point in path.points
    )
    learned = (
        (f"thresholds per exit, learned on {count(path.num_learned)} other rows") if path.num_learned else "thresholds"
    )
    origin = (
        "This is the test behind the certificate."
        if path.is_of_certificate
        else "Made for this page, to show what these rows can support; not the bundle's certificate."
    )
    return Section(
        "risk-path",
        "How far leaving early may go",
        words.risk_reading(path),
        (figures.risk_path(path, found.chosen),),
        caption=f"On {count(path.num_rows)} rows: the risk seen (dots), and its upper bound at "
        f"{share(path.confidence, 0)} "
        f"confidence (line), along a sequence of {learned}. It is walked from full depth on until a test "
        "fails; shaded: "
        f"passed. {origin}",
        table=Table(("mean depth", "ms per row", "losses", "upper bound", "certified"), rows),
        is_wide=True,
    )


def _reliability(found: Findings) -> Section:
    known = [(k, point, point.quality) for k, point in enumerate(found.exits) if point.quality]
    if not known:
        return _needs_labels(found, "reliability", "Can the confidence be believed?", "reliability diagrams")
    rows = tuple(
        (
            _exit(found, k),
            f"{point.temperature:.2f}",
            number(point.ece_unscaled),
            number(quality.ece),
            number(quality.adaptive_ece),
            number(quality.brier),
            number(quality.nll),
            number(quality.failure_auroc),
        )
        for k, point, quality in known
    )
    columns = ("exit", "temperature", "ECE unscaled", "ECE", "adaptive ECE", "Brier", "NLL", "AUROC of failure")
    return Section(
        "reliability",
        "Can the confidence be believed?",
        words.reliability_reading(found.exits),
        tuple(figures.reliability(k, quality, _exit(found, k)) for k, _, quality in known),
        tuple(f"{_exit(found, k).capitalize()} · off by {100 * quality.ece:.1f} points" for k, _, quality in known),
        caption=f"{count(found.subject.num_labelled)} labelled rows in 15 bins of confidence, at the policy's "
        "temperatures; a dot's area is its share of the rows. Orange: further from the diagonal than two standard "
        "errors. A diagnostic, not a promise.",
        table=Table(columns, rows),
        is_wide=True,
    )


def _agreement(found: Findings) -> Section:
    names = tuple(str(k) for k in range(len(found.exits)))
    rows = tuple(
        (name, *(share(value) for value in row)) for name, row in zip(names, found.exit_agreement, strict=True)
    )
    return Section(
        "agreement",
        "Do exits agree?",
        words.agreement_reading(found.exits),
        (figures.agreement(found.exit_agreement),),
        caption=f"Share of {count(found.subject.num_rows)} rows to which two exits give the same answer, in %.",
        table=Table(("exit", *names), rows),
    )


def _confusion(found: Findings) -> Section:
    confusion = found.confusion
    drawn = figures.confusion(confusion)
    rows = tuple((name, *map(count, row)) for name, row in zip(confusion.names, confusion.counts, strict=True))
    against = (
        "Rows: the label" if confusion.reference == "label" else "No labels in this trace. Rows: full depth's answer"
    )
    return Section(
        "confusion",
        "Which answers are mixed up?",
        words.confusion_reading(confusion),
        (drawn,) if drawn else (),
        caption=f"{against}; columns: the policy's answer; {count(sum(map(sum, confusion.counts)))} rows, as "
        "counts. Shade: share "
        "of its row.",
        table=Table((confusion.reference, *confusion.names), rows),
    )


def _overthinking(found: Findings) -> Section:
    if found.overthinking is None:
        return _needs_labels(found, "overthinking", "Overthinking", "what going on wins and spoils")
    rows = tuple(
        (_exit(found, k), count(point.won_later), count(point.lost_later)) for k, point in enumerate(found.exits[:-1])
    )
    over = found.overthinking
    return Section(
        "overthinking",
        "Overthinking",
        words.overthinking_reading(found),
        (figures.overthinking(found.exits),) if len(found.exits) > 1 else (),
        caption=f"Of {count(found.subject.num_labelled)} labelled rows, those that an exit gets wrong and the "
        "final exit "
        "right (teal), and those the other way round (orange). Stopping every row at its first right exit, "
        "which nobody "
        f"can, would get {share(over.oracle_accuracy)} right with {over.oracle_depth:.2f} segments per row.",
        table=Table(("going on from", "won", "spoiled"), rows),
    )


def _retention(found: Findings) -> Section | None:
    if not found.retention:
        return None
    rows = tuple(
        (f"{b.shortest} to {b.longest}", count(b.num_rows), share(b.p5), share(b.p50), share(b.p95))
        for b in found.retention
    )
    return Section(
        "retention",
        "Token retention",
        words.retention_reading(found.retention),
        (figures.retention(found.retention),),
        caption="Share of a row's tokens still there at the exit where it left, in %: median (dots) and 5th "
        "to 95th percentile; "
        f"{count(sum(b.num_rows for b in found.retention))} rows in bins of about as many each.",
        table=Table(("tokens", "rows", "5%", "median", "95%"), rows),
    )


def example_lists(found: Findings) -> tuple[tuple[str, str, Sequence[Example]], ...]:
    """Title, explanation and rows of each list of examples."""
    if found.examples is None:
        return ()
    return (
        ("Changed", "Left early with another answer than full depth gives; the surest first.", found.examples.changed),
        ("Hardest", "Went furthest, and were least sure there.", found.examples.hardest),
        ("Easiest", "Left first, and were surest there.", found.examples.easiest),
    )


def tiles(found: Findings) -> tuple[tuple[str, str, str], ...]:
    """Value, name and a remark: the figures to remember."""
    chosen, full, base = found.chosen, found.full_depth, found.baseline
    against = "the uncut model" if base.kind == "uncut" else "full depth"
    result = [
        (words.times(base.ms, chosen.ms), f"as fast as {against}", f"{ms(chosen.ms)} for {ms(base.ms)} per row"),
        (number(chosen.mean_depth, 2), "mean depth", f"of {len(found.exits)} segments"),
        (share(chosen.agreement), "same answer", "as full depth gives"),
    ]
    if chosen.accuracy is not None:
        result.append((share(chosen.accuracy), "accuracy", f"full depth: {share(full.accuracy)}"))
    return tuple(result)


def _needs_labels(found: Findings, key: str, topic: str, what: str) -> Section:
    command = next((missing.command for missing in found.missing if missing.what.startswith("labels")), "")
    return Section(key, topic, missing=Missing(f"The trace has no labels, so there are no {what}.", command))


def _exit(found: Findings, k: int) -> str:
    return "final exit" if k == len(found.exits) - 1 else f"exit {k}"
