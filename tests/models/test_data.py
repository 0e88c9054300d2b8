"""Reading, sharing out and batching texts."""

import hashlib
from pathlib import Path

import pytest
from tiny_encoder import tiny_tokenizer

from offramp.errors import DataError, OptionError
from offramp.models.data import (
    NUM_IMDB_SENTENCES,
    LabelledTexts,
    TextExample,
    default_encoder_path,
    installed_file,
    load_imdb_sentences,
    load_rotten_tomatoes,
    load_texts,
    load_tokenizer,
    load_unlabelled,
    normalised,
    split_texts,
    texts_of,
    token_ids,
    words_of,
)

TEST_SPLIT_DIGEST = "4738e0e11eda9356"


def test_rotten_tomatoes_is_shared_out_evenly_and_disjointly() -> None:
    splits = load_rotten_tomatoes()
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [6530, 1000, 1000]
    for part in parts:
        assert 0.47 < sum(example.label for example in part) / len(part) < 0.53
    texts = [{normalised(example.text) for example in part} for part in parts]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    # Fixed, so that a result on one machine can be compared with a result on another.
    joined = "\n".join(texts_of(splits.test)).encode()
    assert hashlib.sha256(joined).hexdigest()[:16] == TEST_SPLIT_DIGEST


def test_imdb_sentences_look_like_rotten_tomatoes_and_hold_none_of_it() -> None:
    splits = load_rotten_tomatoes()
    known = {words_of(example.text) for part in (splits.train, splits.validation, splits.test) for example in part}
    sentences = load_imdb_sentences()
    assert len(set(sentences)) == NUM_IMDB_SENTENCES
    assert not known & {words_of(sentence) for sentence in sentences}
    assert all(sentence == normalised(sentence) and "<br" not in sentence for sentence in sentences)
    assert load_imdb_sentences(3) == sentences[:3]


def test_unlabelled_texts_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,label\nfine,\nbad,1\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n\n{"text": "bad", "label": 3}\n')
    for name in ("texts.csv", "texts.jsonl"):
        assert load_unlabelled(tmp_path / name) == ("fine", "bad")
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n{"text": " "}\n')
    with pytest.raises(DataError, match="record 2: got text ' '"):
        load_unlabelled(tmp_path / "texts.jsonl")


def test_the_default_encoder_is_found() -> None:
    assert (default_encoder_path() / "tokenizer.json").is_file()


@pytest.mark.parametrize(("package", "inside"), [("no_such_package", "data.csv"), ("offramp", "no_such_file")])
def test_a_missing_package_names_the_command(package: str, inside: str) -> None:
    with pytest.raises(DataError, match=r"run `pip install --no-deps some-package==1\.0`"):
        installed_file(package, inside, "some-package==1.0")


def make_texts(count: int) -> LabelledTexts:
    """Make texts that come twice each, in another case and spacing."""
    return LabelledTexts(
        tuple(
            TextExample(("Text  {}" if number % 2 else "text {} ").format(number // 2), number % 2)
            for number in range(count)
        ),
        ("even", "odd"),
    )


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_stay_together(seed: int) -> None:
    splits = split_texts(make_texts(200), 30, 40, seed)
    parts = [[normalised(example.text) for example in part] for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [130, 30, 40]
    assert sum(len(set(part)) for part in parts) == len(set().union(*parts)) == 100


def test_splits_depend_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    texts = make_texts(60)
    turned = LabelledTexts(texts.examples[::-1], texts.label_names)
    assert set(split_texts(texts, 10, 10, 1).test) == set(split_texts(turned, 10, 10, 1).test)
    assert set(split_texts(texts, 10, 10, 1).test) != set(split_texts(texts, 10, 10, 2).test)


@pytest.mark.parametrize(("num_validation", "num_test"), [(0, 1), (1, 0), (5, 5)])
def test_splits_that_leave_nothing_are_refused(num_validation: int, num_test: int) -> None:
    with pytest.raises(OptionError, match="splitting 10 texts"):
        split_texts(make_texts(10), num_validation, num_test)


def test_too_few_distinct_texts_are_refused() -> None:
    texts = LabelledTexts((TextExample("same", 0),) * 9, ("a", "b"))
    with pytest.raises(DataError, match="1 are distinct"):
        split_texts(texts, 1, 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"so, good",10\nbad,9\n'),
        ("a.CSV", '\ufefflabel,text,extra\n10,"so, good",x\n9,bad,y\n'),
        ("a.jsonl", '{"text": "so, good", "label": 10}\n\n{"text": "bad", "label": "9"}\n'),
    ],
)
def test_files_of_the_user(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    texts = load_texts(path)
    assert texts.label_names == ("9", "10")
    assert texts.examples == (TextExample("so, good", 1), TextExample("bad", 0))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.tsv", b"", r"expected \.csv, \.jsonl or \.txt"),
        ("absent.csv", None, "No such file"),
        ("absent.jsonl", None, "No such file"),
        ("a.csv", b"sentence,label\nx,1\n", r"record 1: got \['label', 'sentence'\]"),
        ("a.csv", b"text,label\nx,1\ny\n", "record 2: .* label None"),
        ("a.csv", b"text,label\n  ,1\n", "expected a non-empty text"),
        ("a.csv", b"text,label\nx,1\ny,1\n", "2 texts of 1 classes"),
        ("a.csv", b"text,label\n\xff,1\n", "UTF-8"),
        ("a.csv", b"text,label\n" + b"x" * 200_000 + b",1\n", "field larger than"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n{"text"\n', "line 2: .*one JSON object per line"),
        ("a.jsonl", b"[1, 2]\n", "line 1: got list"),
        ("a.jsonl", b'{"text": 5, "label": 1}\n', "record 1"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load_texts(path)


def test_tokenizer_truncates_and_never_pads(encoder_path: Path, tmp_path: Path) -> None:
    rows = token_ids(load_tokenizer(encoder_path / "tokenizer.json", 5), ["good film", "the film was very very bad"])
    assert rows == [[2, 4, 6, 3], [2, 8, 6, 11, 3]]
    padding = tiny_tokenizer()
    padding.enable_padding(length=9)
    padding.save(str(tmp_path / "tokenizer.json"))
    assert token_ids(load_tokenizer(tmp_path / "tokenizer.json", 5), ["good film"]) == [[2, 4, 6, 3]]


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"expected a tokenizer\.json"):
        load_tokenizer(path, 5)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"expected a tokenizer\.json"):
        load_tokenizer(path, 5)
