"""The texts on which an exported decoder is verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from offramp.bundle import ROWS, DimensionSpec
from offramp.commands.decoders import export_llama, model_name, tokens_to_verify
from offramp.errors import DataError, OptionError
from offramp.export.export_bundle import ExportOptions
from offramp.export.sizes import probing_sizes


def test_texts_are_cut_to_a_common_length() -> None:
    assert tokens_to_verify([range(45), range(100, 145)]) == [list(range(45)), list(range(100, 145))]
    assert [len(tokens) for tokens in tokens_to_verify([range(90), range(44), range(60)])] == [44] * 3
    assert [len(tokens) for tokens in tokens_to_verify([range(90), range(60)])] == [48] * 2


@pytest.mark.parametrize("lengths", [(), (100,), (100, 15)])
def test_too_little_text_is_refused_with_what_was_got(lengths: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=f"got {len(lengths)}, the shortest of {min((48, *lengths)) if lengths else 0}"):
        tokens_to_verify([range(length) for length in lengths])


def test_long_ranges_are_probed_to_their_end_one_at_a_time() -> None:
    """SmolLM2 with chunks and pasts at the end of their ranges at once ran out of memory."""
    dimensions = {"chunk": DimensionSpec(1, 512), "past": DimensionSpec(1, 8192)}
    found = probing_sizes({"chunk": 8, "past": 16, ROWS: 3}, dimensions)
    assert (max(size["chunk"] for size in found), max(size["past"] for size in found)) == (512, 8192)
    assert max(size["chunk"] * size["past"] * size[ROWS] for size in found) == 8 * 8192 * 2
    alone = probing_sizes({"sequence": 24, ROWS: 3}, {"sequence": DimensionSpec(1, 512)})
    assert {1, 512} <= {size["sequence"] for size in alone}


def test_a_dot_in_the_name_of_a_directory_is_part_of_it() -> None:
    assert [model_name(Path(name)) for name in ("a/smol.q8.gguf", "a/SmolLM2-1.7B")] == ["smol.q8", "SmolLM2-1.7B"]


def test_a_precision_that_decoders_have_not_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="got int8 for a decoder"):
        export_llama(tmp_path / "none.gguf", tmp_path / "bundle", (), ExportOptions("fp16,int8"), print)
