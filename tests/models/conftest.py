"""The tiny encoder on disk, a classifier made of it, and texts that it can learn."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_encoder import tiny_bert, tiny_tokenizer

from offramp.models.checkpoint import Checkpoint, checkpoint_from_encoder
from offramp.models.data import TextExample, TextSplits, load_tokenizer, text_rows
from offramp.models.encoder import EncoderConfig, quiet_transformers
from offramp.models.rows import TextRows, TrainingRows, without_labels

LABEL_NAMES = ("negative", "positive")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: on these sizes more only wait for each other, longest on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BertModel directory with a tokenizer.json."""
    path = tmp_path_factory.mktemp("encoder")
    with quiet_transformers():
        tiny_bert().save_pretrained(path)
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def checkpoint(encoder_path: Path) -> Checkpoint:
    """Return an untrained classifier with exits after layers 1 and 3, made anew for every test."""
    config = EncoderConfig(exits=(1, 3), dropout=0.1)
    return checkpoint_from_encoder(encoder_path, config, LABEL_NAMES, max_length=16)


@pytest.fixture(scope="session")
def splits() -> TextSplits:
    """Return 48 + 16 + 16 texts whose class is the word good or bad."""
    endings = ("film", "plot", "the film", "a plot", "very", "was", "the plot was", "a film was")
    examples = []
    for number in range(80):
        label = number % 2
        word = LABEL_NAMES[label].replace("negative", "bad").replace("positive", "good")
        examples.append(TextExample(" ".join([word, endings[number // 2 % 8], *["the"] * (number % 5)]), label))
    return TextSplits(tuple(examples[:48]), tuple(examples[48:64]), tuple(examples[64:]), LABEL_NAMES)


@pytest.fixture
def rows(checkpoint: Checkpoint, splits: TextSplits) -> TrainingRows:
    """Return the texts as the model of `checkpoint` takes them."""
    assert checkpoint.tokenizer_path is not None
    return text_rows(load_tokenizer(checkpoint.tokenizer_path, checkpoint.max_length), splits)


@pytest.fixture
def rows_and_unlabelled(rows: TrainingRows) -> TrainingRows:
    """Return the same, and the validation texts without their labels."""
    assert isinstance(rows.validation, TextRows)
    return replace(rows, unlabelled=TextRows(rows.validation.ids, without_labels(len(rows.validation.ids))))
