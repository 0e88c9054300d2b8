"""Text to inputs, with tokenizers made in code."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from offramp.bundle import DimensionSpec, TextSpec, file_record
from offramp.errors import BackendError, BundleError, InputError
from offramp.runtime import Runner
from offramp.runtime.text import TextEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "warm", "and", "funny", "film"]


def tokenizer_bytes(special: bool = True, padding: str = "[PAD]") -> bytes:
    """A word-level tokenizer; with `special`, every text becomes [CLS] … [SEP]."""
    words = [padding, *WORDS[1:]]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return tokenizer.to_str().encode()


def encoder(content: bytes, max_length: int = 6, min_length: int = 1, **text: Any) -> TextEncoder:
    spec = TextSpec(file_record("tokenizer.json", content), max_length, "ids", "mask")
    base = tiny_manifest()
    dimensions = {**base.dimensions, "sequence": DimensionSpec(min_length, 12)}
    return TextEncoder(content, replace(spec, **text), replace(base, dimensions=dimensions))


def tiny_manifest() -> Any:
    from offramp.runtime.fake import fake_manifest

    return fake_manifest(1, 2, tiny.INPUTS)


def test_texts_are_padded_to_the_longest() -> None:
    inputs = encoder(tokenizer_bytes()).encode(["a film", "funny"])
    assert inputs["ids"].tolist() == [[2, 4, 8, 3], [2, 7, 3, 0]]
    assert inputs["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert [array.dtype for array in inputs.values()] == [np.int64, np.int64]


def test_long_texts_keep_their_special_tokens() -> None:
    inputs = encoder(tokenizer_bytes(), max_length=5).encode(["a warm and funny film"])
    assert inputs["ids"].tolist() == [[2, 4, 5, 6, 3]]


def test_short_texts_are_padded_to_the_shortest_the_bundle_takes() -> None:
    inputs = encoder(tokenizer_bytes(), min_length=5).encode(["film"])
    assert inputs["ids"].tolist() == [[2, 8, 3, 0, 0]]
    assert inputs["mask"].tolist() == [[1, 1, 1, 0, 0]]


def test_a_text_alone_has_the_ids_it_has_in_a_batch() -> None:
    both = encoder(tokenizer_bytes()).encode(["funny", "a warm film"])
    alone = encoder(tokenizer_bytes()).encode(["funny"])
    np.testing.assert_array_equal(both["ids"][:1, :3], alone["ids"])


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
def test_a_blank_text_is_its_special_tokens(blank: str) -> None:
    assert encoder(tokenizer_bytes()).encode([blank])["ids"].tolist() == [[2, 3]]
    with pytest.raises(InputError, match=r"text 1 .* has no tokens .* leave out blank texts"):
        encoder(tokenizer_bytes(special=False)).encode(["film", blank])


def test_no_texts_are_no_rows() -> None:
    inputs = encoder(tokenizer_bytes(), min_length=2).encode([])
    assert [array.shape for array in inputs.values()] == [(0, 2), (0, 2)]


def test_a_tokenizer_s_own_padding_does_not_interfere() -> None:
    own = Tokenizer.from_buffer(tokenizer_bytes())
    own.enable_padding(length=11, direction="left")
    own.enable_truncation(3)
    inputs = encoder(own.to_str().encode()).encode(["a warm film"])
    assert inputs["ids"].tolist() == [[2, 4, 5, 8, 3]]


def test_padding_ids_of_other_tokenizers() -> None:
    content = tokenizer_bytes(special=False, padding="<pad>").replace(b'"<pad>":0', b'"<pad>":9')
    assert encoder(content).encode(["film", "a film"])["ids"].tolist() == [[8, 9], [4, 8]]
    unknown = tokenizer_bytes(special=False, padding="nothing")
    assert encoder(unknown).encode(["film", "a film"])["ids"].tolist() == [[8, 0], [4, 8]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a film", r"one str.*pass `\[text\]`"),
        (["a", b"film"], "text 1: got bytes"),
        ([None], "NoneType"),
    ],
)
def test_anything_but_texts_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoder(tokenizer_bytes()).encode(texts)


def test_a_bad_tokenizer_file_is_refused() -> None:
    with pytest.raises(BundleError, match=r"parsing tokenizer.json: .* export the bundle again"):
        encoder(b'{"version": "1.0"}').encode(["film"])


def test_a_tokenizer_for_no_input_is_refused() -> None:
    with pytest.raises(BundleError, match="fills 'tokens', which is no input"):
        encoder(tokenizer_bytes(), ids="tokens")


def test_a_machine_without_tokenizers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BackendError, match=r"pip install 'offramp\[text\]'"):
        encoder(tokenizer_bytes()).encode(["film"])


def test_a_runner_encodes_and_answers(tmp_path: Path, shared_runner: Runner) -> None:
    tiny.make_bundle(tmp_path, tokenizer=tokenizer_bytes())
    with Runner.open(tmp_path) as runner:
        result = runner.run(runner.encode(["a warm film", "funny"]))
        assert result.exit_index.tolist() == [2, 2]
        expected = tiny.reference_logits(tiny.request([[2, 4, 5, 8, 3], [2, 7, 3]]), 2)
        np.testing.assert_array_equal(result.outputs["logits"], expected)
    with pytest.raises(BundleError, match="no tokenizer; pass arrays to `run`: ids, mask"):
        shared_runner.encode(["film"])
