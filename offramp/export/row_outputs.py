"""What an exit may put out beside its logits, one number per row: in words, for whoever makes the model.

`bundle.ROW_OUTPUTS` has the names; a model returns them as fields beside `logits`, a segment puts them out in FP32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from offramp.bundle import LEARNED, RETENTION

RowOutputs = Mapping[str, Mapping[str, str]]  # exit -> name in bundle.ROW_OUTPUTS -> output of the whole graph


class RowOutputWords(NamedTuple):
    """How people call one of them, and what they are told when its values are out of range."""

    called: str
    expected: str


WORDS = {
    LEARNED: RowOutputWords(
        "learned confidence", "a probability in [0, 1]: return the sigmoid of what the model computes"
    ),
    RETENTION: RowOutputWords("token retention", "a share in (0, 1]: tokens kept ÷ tokens of the row"),
}


def row_outputs_from_names(exits: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """From outputs per kind, in the order of the exits, "-" or nothing for an exit without: {"learned": ["conf_1"]}."""
    found: dict[str, dict[str, str]] = {}
    for kind, listed in names.items():
        for exit_name, output in zip(exits, listed, strict=False):
            if output != "-":
                found.setdefault(exit_name, {})[kind] = output
    return found
