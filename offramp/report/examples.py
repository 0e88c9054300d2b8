"""Rows to read: the easiest, the hardest, and those whose answer leaving early changed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import SCORES
from offramp.errors import DataError
from offramp.report.findings import Example, Examples
from offramp.trace import UNKNOWN, Trace
from offramp.tuning.replay import Replay

NUM_EXAMPLES = 5
_MOST_CHARACTERS = 280


def examples(trace: Trace, decided: Replay, texts: tuple[str, ...], names: tuple[str, ...]) -> Examples | None:
    """The most telling rows; None without texts. Raises DataError unless there is one text per row."""
    if not texts:
        return None
    if len(texts) != len(trace.labels):
        raise DataError(
            f"report: got {len(texts)} texts for a trace of {len(trace.labels)} rows; expected the data that "
            "the trace was "
            f"recorded from, in its order"
        )
    rows = np.arange(len(texts))
    sureness = trace.scores[rows, decided.exit_index, SCORES.index("max_prob")]  # (N,)
    changed = np.flatnonzero(decided.prediction != trace.predictions[:, -1])

    def chosen(order: NDArray[np.intp]) -> tuple[Example, ...]:
        return tuple(_example(trace, decided, texts, names, int(row)) for row in order[:NUM_EXAMPLES])

    return Examples(
        easiest=chosen(np.lexsort((-sureness, decided.exit_index))),
        hardest=chosen(np.lexsort((sureness, -decided.exit_index))),
        changed=chosen(changed[np.argsort(-sureness[changed], kind="stable")]),
    )


def _example(trace: Trace, decided: Replay, texts: tuple[str, ...], names: tuple[str, ...], row: int) -> Example:
    text, label, left = texts[row], int(trace.labels[row]), int(decided.exit_index[row])
    return Example(
        row=row,
        text=text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…",
        exit_index=left,
        score=float(trace.scores[row, left, SCORES.index("max_prob")]),
        answer=names[decided.prediction[row]],
        full_depth=names[trace.predictions[row, -1]],
        label="" if label == UNKNOWN else names[label],
    )
