"""What inputs and outputs of a whole graph are for, beyond the logits of its exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offramp.export.row_outputs import RowOutputs


@dataclass(frozen=True)
class Roles:
    """Names of tensors of the whole graph.

    A *late* input is given to every segment that reads it and never carried: past keys and values, the positions that
    are still active. What is computed from late inputs alone is computed again where it is needed, so that one
    segment may be given other values, and other lengths, than the next. A *state* leaves with the segment that makes
    it. Where an exit has a separate *head*, the segment puts out what the head reads.
    """

    row_outputs: RowOutputs = field(default_factory=dict)  # of the exits that have some
    late: tuple[str, ...] = ()  # inputs
    states: Mapping[str, str] = field(default_factory=dict)  # output -> the late input that it will be a part of
    heads: Mapping[str, str] = field(default_factory=dict)  # exit -> output that its separate head reads


NO_ROLES = Roles()
