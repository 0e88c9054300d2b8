"""A checkpoint: one directory with everything that a trained model needs, and nothing from elsewhere.

`config.json` (kind of model, its configuration, class names), `model.safetensors`, `tokenizer.json` for a model of
texts, and while training goes on `training.pt` (what resuming needs). It is staged beside and swapped into place.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from offramp.errors import DataError, OptionError, StorageError
from offramp.models.encoder import EncoderConfig, encoder_from_pretrained
from offramp.models.kinds import BERT, KINDS
from offramp.models.options import nearest
from offramp.models.snapshot import TRAINING_FILE
from offramp.storage import staged_directory

FORMAT = "offramp-checkpoint"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model and what belongs to it; `label_names[c]` is the name of class c, () for values and for tokens.

    `kind` says how its configuration is read (`kinds.py`). Texts are cut to `max_length` tokens, special tokens
    included; a model of images has no tokenizer and no length. Raises OptionError if the number of names and of classes
    differ, or the model has fewer positions than `max_length`.
    """

    model: nn.Module
    tokenizer_path: Path | None
    label_names: tuple[str, ...]
    max_length: int = 128
    kind: str = BERT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"kind: got {self.kind!r}, {nearest(self.kind, KINDS)}")
        has_names = self.num_classes > 1 and not KINDS[self.kind].is_language_model
        if len(self.label_names) != (self.num_classes if has_names else 0):
            raise OptionError(f"label_names: got {self.label_names} for a model of {self.num_classes} classes")
        num_positions = KINDS[self.kind].num_positions(self.model)
        if num_positions and not 2 < self.max_length <= num_positions:
            raise OptionError(
                f"max_length: got {self.max_length}, expected 3 to {num_positions}, the model's positions"
            )

    @property
    def num_classes(self) -> int:
        """Return the numbers that every exit answers with: classes, or 1 for a regression."""
        return int(self.config.num_classes)

    @property
    def config(self) -> Any:
        """Return the configuration of the model: exits, classes and what its kind has besides."""
        return self.model.config


def checkpoint_from_encoder(
    path: Path,
    config: EncoderConfig,
    label_names: tuple[str, ...],
    max_length: int = 128,
    seed: int = 0,
) -> Checkpoint:
    """Put fresh exit heads, drawn from `seed`, on the encoder in the BertModel directory `path`.

    Raises DataError if the directory is not a BertModel with a tokenizer.json, ModelError if it has too few
    layers.
    """
    tokenizer_path = tokenizer_in(path)
    return Checkpoint(encoder_from_pretrained(path, config, seed), tokenizer_path, label_names, max_length)


def tokenizer_in(path: Path) -> Path:
    """Return the tokenizer.json of a directory with an encoder; DataError if there is none."""
    if not (path / TOKENIZER_FILE).is_file():
        raise DataError(
            f"loading an encoder from {path}: no {TOKENIZER_FILE}; save one there with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
        )
    return path / TOKENIZER_FILE


def save_checkpoint(path: Path, checkpoint: Checkpoint, training_state: bytes | None = None) -> None:
    """Write the checkpoint to the directory `path`, replacing an older checkpoint there as a whole.

    `training_state` is the snapshot of a run that is not finished. Raises StorageError if the disk refuses, OptionError
    if `path` holds something that is not a checkpoint.
    """
    check_replaceable(path)
    try:
        with staged_directory(path) as staging:
            write_files(staging, checkpoint, training_state)
    except (SafetensorError, RuntimeError) as exc:  # so does safetensors report a full disk
        raise StorageError(f"saving the checkpoint {path}: {exc}; free some space or name another place") from exc


def write_files(folder: Path, checkpoint: Checkpoint, training_state: bytes | None) -> None:
    """Write the files of a checkpoint into an existing directory."""
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": checkpoint.kind,
        "label_names": list(checkpoint.label_names),
        "max_length": checkpoint.max_length,
        **KINDS[checkpoint.kind].to_dict(checkpoint.model),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner only
    if checkpoint.tokenizer_path is not None:
        shutil.copyfile(checkpoint.tokenizer_path, folder / TOKENIZER_FILE)
    if training_state is not None:
        (folder / TRAINING_FILE).write_bytes(training_state)


def check_replaceable(path: Path) -> None:
    """Raise OptionError if something at `path` would be lost that is not a checkpoint."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not is_checkpoint(path):
        raise OptionError(f"saving a checkpoint to {path}: something else is there; name another directory")


def is_checkpoint(path: Path) -> bool:
    """Tell whether the directory claims to be a checkpoint; its files may still be damaged."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint directory, the model in eval mode on the CPU.

    Raises DataError if a file is missing, truncated or of another format.
    """
    config = load_config(path)
    kind = KINDS.get(config.get("kind", BERT))  # those written before there were others are BERT encoders
    if kind is None:
        raise damaged(path, f"{CONFIG_FILE}: got kind {config['kind']!r}, expected one of {', '.join(KINDS)}")
    tokenizer_path = path / TOKENIZER_FILE
    if kind.is_text and not tokenizer_path.is_file():
        raise damaged(path, f"{TOKENIZER_FILE} is missing")
    try:
        # copied, because a product rounds by where in memory a row begins, and in the file that is anywhere
        weights = {name: tensor.clone() for name, tensor in load_file(path / WEIGHTS_FILE).items()}
        with torch.random.fork_rng(devices=[]):
            model = kind.from_dict(config)
        model.load_state_dict(weights, assign=True)
        names = tuple(config["label_names"])
        found = tokenizer_path if kind.is_text else None
        return Checkpoint(model.eval(), found, names, config["max_length"], config.get("kind", BERT))
    except (OSError, SafetensorError) as exc:
        raise damaged(path, f"{WEIGHTS_FILE}: {exc}") from exc
    except Exception as exc:  # torch, and transformers with checks of its own, raise nearly anything here
        raise damaged(path, f"{CONFIG_FILE} and {WEIGHTS_FILE} do not fit: {exc}") from exc


def load_config(path: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint; DataError if it is missing or foreign."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise damaged(path, f"{CONFIG_FILE}: {exc}") from exc
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise damaged(path, f"{CONFIG_FILE} is not of the format {FORMAT}")
    if config.get("version") != FORMAT_VERSION:
        raise DataError(
            f"loading the checkpoint {path}: got format version {config.get('version')}, this offramp reads "
            f"{FORMAT_VERSION}; install the offramp that wrote it or train again"
        )
    return config


def damaged(path: Path, problem: str) -> DataError:
    """Return the error for a directory that is not a whole checkpoint."""
    return DataError(f"loading the checkpoint {path}: {problem}; train it again with `offramp train` or copy it again")
