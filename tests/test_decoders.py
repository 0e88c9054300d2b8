"""The texts on which an exported decoder is verified."""

from __future__ import annotations

import pytest

from offramp.bundle import ROWS, DimensionSpec
from offramp.commands.decoders import tokens_to_verify
from offramp.errors import DataError
from offramp.export.sizes import probing_sizes


def test_texts_are_cut_to_a_common_length() -> None:
    assert tokens_to_verify([range(45), range(100, 145)]) == [list(range(45)), list(range(100, 145))]
    assert [len(tokens) for tokens in tokens_to_verify([range(90), range(44), range(60)])] == [44] * 3
    assert [len(tokens) for tokens in tokens_to_verify([range(90), range(60)])] == [48] * 2


@pytest.mark.parametrize("lengths", [(), (100,), (100, 15)])
def test_too_little_text_is_refused_with_what_was_got(lengths: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=f"got {len(lengths)}, the shortest of {min((48, *lengths)) if lengths else 0}"):
        tokens_to_verify([range(length) for length in lengths])


def test_long_ranges_are_not_probed_to_their_end() -> None:
    """All tensors are kept at every size: SmolLM2 with 8,192 past positions ran out of memory."""
    dimensions = {"chunk": DimensionSpec(1, 64), "past": DimensionSpec(1, 8192)}
    found = probing_sizes({"chunk": 8, "past": 16, ROWS: 3}, dimensions)
    assert max(size["past"] for size in found) == 256
    assert max(size["chunk"] for size in found) == 64
    alone = probing_sizes({"sequence": 24, ROWS: 3}, {"sequence": DimensionSpec(1, 512)})
    assert {1, 512} <= {size["sequence"] for size in alone}
