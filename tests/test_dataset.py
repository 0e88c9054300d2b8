"""Data sets as a deployed model sees them: files of texts and arrays, rows with labels and sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.bundle import Manifest, load_manifest, save_manifest
from offramp.commands.dataset import Rows, load_dataset, open_rows
from offramp.errors import BundleError, DataError, OptionError
from offramp.models.data import NUM_IMDB_SENTENCES, load_rotten_tomatoes
from offramp.runtime import Runner
from offramp.trace import UNKNOWN
from tests.runtime import tiny
from tests.runtime.test_text import tokenizer_bytes

LABELS = ("bad", "fine", "so so")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    bundle = tmp_path_factory.mktemp("dataset") / "bundle"
    tiny.make_bundle(bundle, tokenizer=tokenizer_bytes())
    save_manifest(bundle, replace(load_manifest(bundle), labels=LABELS))
    with Runner.open(bundle, threads=1) as opened:
        yield opened


def gathered(batches: list[Rows]) -> list[tuple[list[int], int, str]]:
    """Tokens, label and source of every row."""
    return [
        (ids[mask == 1].tolist(), int(label), str(source))
        for batch in batches
        for ids, mask, label, source in zip(
            batch.inputs["ids"], batch.inputs["mask"], batch.labels, batch.sources, strict=True
        )
    ]


FILES = {
    "a.csv": "text,label,source\na film,fine,mail\nfunny,,\nwarm,bad,kiosk\n",
    "a.jsonl": '{"text": "a film", "label": "fine", "source": "mail"}\n{"text": "funny"}\n\n'
    '{"text": "warm", "label": "bad", "source": " kiosk"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_labels_and_sources_may_be_there(runner: Runner, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    stream = open_rows(runner, str(tmp_path / name), "validation", batch_size=2)
    assert (len(stream), stream.num_rows) == (2, 3)
    expected = [([2, 4, 8, 3], 1, "mail"), ([2, 7, 3], UNKNOWN, ""), ([2, 5, 3], 0, "kiosk")]
    assert gathered(list(stream)) == expected
    assert gathered(list(stream)) == expected, "a stream can be read again"
    dataset = load_dataset(runner, str(tmp_path / name), "validation", 2)
    assert dataset.labels.tolist() == [1, UNKNOWN, 0]
    assert [len(batch["ids"]) for batch in dataset.batches] == [2, 1]


def test_labels_of_a_regression_are_numbers(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "is_regression", True)
    (tmp_path / "a.csv").write_text("text,label\na film,-1.5\nfunny,\nwarm,3\n")
    labels = load_dataset(runner, str(tmp_path / "a.csv"), "").labels
    np.testing.assert_array_equal(labels, np.float32([-1.5, np.nan, 3]), strict=True)
    inputs = tiny.request([[2, 5, 3]] * 2)
    np.savez(tmp_path / "without.npz", **inputs)
    assert np.isnan(load_dataset(runner, str(tmp_path / "without.npz"), "").labels).all()
    np.savez(tmp_path / "with.npz", **inputs, labels=[0.25, np.nan])
    np.testing.assert_array_equal(load_dataset(runner, str(tmp_path / "with.npz"), "").labels, [0.25, np.nan])
    for label in ("fine", "inf"):
        (tmp_path / "bad.csv").write_text(f"text,label\na film,{label}\n")
        with pytest.raises(DataError, match=f"has labels {label}; the model is a regression, expected numbers"):
            open_rows(runner, str(tmp_path / "bad.csv"), "")
    with pytest.raises(DataError, match=r"rotten-tomatoes has labels .*expected numbers"):
        open_rows(runner, "rotten-tomatoes", "test")


def test_a_file_of_texts_has_no_labels(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a film\n\n  funny  \n")
    rows = gathered(list(open_rows(runner, str(tmp_path / "a.txt"), "validation")))
    assert rows == [([2, 4, 8, 3], UNKNOWN, ""), ([2, 7, 3], UNKNOWN, "")]


def test_a_limit_draws_rows_and_keeps_their_order(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "film", "source": "{row}"}}\n' for row in range(100)))
    data = str(tmp_path / "a.jsonl")
    stream = open_rows(runner, data, "validation", 8, limit=20)
    drawn = [int(source) for _, _, source in gathered(list(stream))]
    assert (len(drawn), len(set(drawn)), len(stream)) == (20, 20, 3)
    assert drawn == sorted(drawn)
    assert max(drawn) > 50, "the first rows of a sorted file would all be of one kind"
    assert [int(row[2]) for row in gathered(list(open_rows(runner, data, "validation", 5, limit=20)))] == drawn
    assert len(gathered(list(open_rows(runner, data, "validation", limit=100)))) == 100
    np.savez(tmp_path / "a.npz", **tiny.request(tiny.sentences(100)), sources=np.arange(100).astype(str))
    found = list(open_rows(runner, str(tmp_path / "a.npz"), "validation", 8, limit=20))
    assert [int(row[2]) for row in gathered(found)] == drawn
    with pytest.raises(OptionError, match="limit of -1"):
        open_rows(runner, data, "validation", limit=-1)


def test_arrays_may_have_labels_and_sources(runner: Runner, tmp_path: Path) -> None:
    path, inputs = tmp_path / "a.npz", tiny.request([[1, 2], [3]])
    np.savez(path, **inputs, labels=np.array([2, UNKNOWN]), sources=np.array(["mail", ""]))
    assert gathered(list(open_rows(runner, str(path), ""))) == [([1, 2], 2, "mail"), ([3], UNKNOWN, "")]
    np.savez(path, **inputs)
    assert gathered(list(open_rows(runner, str(path), ""))) == [([1, 2], UNKNOWN, ""), ([3], UNKNOWN, "")]
    np.savez(path, **inputs, sources=np.array(["mail"]))
    with pytest.raises(DataError, match=r"sources have shape \(1,\), expected \(2,\)"):
        open_rows(runner, str(path), "")
    np.savez(path, ids=inputs["ids"])
    with pytest.raises(DataError, match=r"holds ids with .* expected ids, mask"):
        open_rows(runner, str(path), "")


def test_what_is_wrong_is_said_before_anything_runs(runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nfilm,fine\nfilm,dull\nfilm,long\nfilm,loud\nfilm,\nfilm,bad\nfilm,odd\n")
    with pytest.raises(DataError, match=r"has labels dull, .*the model knows bad, fine, so so"):
        open_rows(runner, str(path), "")
    path.write_text("text,label\nfilm,fine\n  ,fine\n")
    with pytest.raises(DataError, match="record 2: got text"):
        open_rows(runner, str(path), "")
    with pytest.raises(OptionError, match=r"expected rotten-tomatoes, imdb, or a \.csv"):
        open_rows(runner, str(tmp_path / "none.csv"), "")


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path / "bundle", tokenizer=tokenizer_bytes())
    (tmp_path / "a.jsonl").write_text('{"text": "film", "label": 2}\n{"text": "film", "label": "0"}\n')
    with Runner.open(tmp_path / "bundle", threads=1) as runner:
        assert load_dataset(runner, str(tmp_path / "a.jsonl"), "").labels.tolist() == [2, 0]
        (tmp_path / "a.jsonl").write_text('{"text": "film", "label": 3}\n')
        with pytest.raises(DataError, match="has labels 3, the model knows 0, 1, 2"):
            open_rows(runner, str(tmp_path / "a.jsonl"), "")


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    tiny.make_bundle(tmp_path / "bundle")
    with (
        Runner.open(tmp_path / "bundle", threads=1) as runner,
        pytest.raises(BundleError, match="no tokenizer, so imdb cannot be read"),
    ):
        open_rows(runner, "imdb", "")


def test_packaged_texts(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences of IMDB are those that training did not see."""
    monkeypatch.setattr(
        "offramp.models.data.load_imdb_sentences", lambda count: tuple(f"{k}" for k in range(NUM_IMDB_SENTENCES + 3))
    )
    stream = open_rows(runner, "imdb", "validation", limit=2)
    assert [label for _, label, _ in gathered(list(stream))] == [UNKNOWN] * 2
    assert open_rows(runner, "imdb", "").num_rows == 3
    with pytest.raises(DataError, match="has labels negative, positive, the model knows bad"):
        open_rows(runner, "rotten-tomatoes", "test")
    tiny.make_bundle(tmp_path / "bundle", tokenizer=tokenizer_bytes())
    save_manifest(tmp_path / "bundle", replace(load_manifest(tmp_path / "bundle"), labels=("positive", "negative")))
    with Runner.open(tmp_path / "bundle", threads=1) as other:
        labels = load_dataset(other, "rotten-tomatoes", "test").labels
    assert labels.tolist() == [1 - example.label for example in load_rotten_tomatoes().test]
