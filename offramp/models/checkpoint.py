"""A checkpoint: one directory with everything that a trained classifier needs, and nothing from elsewhere.

`config.json` (exits, encoder dimensions, class names), `model.safetensors`, `tokenizer.json`, and while
training goes on `training.pt` (what resuming needs). It is staged beside and swapped into place.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from offramp.errors import DataError, OptionError, StorageError
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.models.pruning import Pruning
from offramp.storage import staged_directory

FORMAT = "offramp-checkpoint"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TRAINING_FILE = "training.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A classifier and what belongs to it; `label_names[c]` is the name of class c.

    Texts are cut to `max_length` tokens, special tokens included. Raises OptionError if the number of names
    and of classes differ, or the model has fewer positions than `max_length`.
    """

    model: EarlyExitEncoder
    tokenizer_path: Path
    label_names: tuple[str, ...]
    max_length: int = 128

    def __post_init__(self) -> None:
        num_classes = self.model.config.num_classes
        if len(self.label_names) != num_classes:
            raise OptionError(f"label_names: got {self.label_names} for a model of {num_classes} classes")
        num_positions = self.model.bert_config.max_position_embeddings
        if not 2 < self.max_length <= num_positions:
            raise OptionError(
                f"max_length: got {self.max_length}, expected 3 to {num_positions}, the model's positions"
            )

    @property
    def config(self) -> EncoderConfig:
        """Return the exits, classes and pooling of the model."""
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
    tokenizer_path = path / TOKENIZER_FILE
    if not tokenizer_path.is_file():
        raise DataError(
            f"loading an encoder from {path}: no {TOKENIZER_FILE}; save one there with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
        )
    return Checkpoint(encoder_from_pretrained(path, config, seed), tokenizer_path, label_names, max_length)


def save_checkpoint(path: Path, checkpoint: Checkpoint, training_state: dict[str, Any] | None = None) -> None:
    """Write the checkpoint to the directory `path`, replacing an older checkpoint there as a whole.

    `training_state` is what a resumed run needs; without it the checkpoint is a finished one. Raises
    StorageError if the disk refuses, OptionError if `path` holds something that is not a checkpoint.
    """
    check_replaceable(path)
    try:
        with staged_directory(path) as staging:
            write_files(staging, checkpoint, training_state)
    except (SafetensorError, RuntimeError) as exc:  # so do safetensors and torch.save report a full disk
        raise StorageError(f"saving the checkpoint {path}: {exc}; free some space or name another place") from exc


def write_files(folder: Path, checkpoint: Checkpoint, training_state: dict[str, Any] | None) -> None:
    """Write the files of a checkpoint into an existing directory."""
    model = checkpoint.model
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "encoder": asdict(model.config),
        "label_names": list(checkpoint.label_names),
        "max_length": checkpoint.max_length,
        "bert": model.bert_config.to_dict(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable by its owner only
    shutil.copyfile(checkpoint.tokenizer_path, folder / TOKENIZER_FILE)
    if training_state is not None:
        torch.save(training_state, folder / TRAINING_FILE)


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
    tokenizer_path = path / TOKENIZER_FILE
    if not tokenizer_path.is_file():
        raise damaged(path, f"{TOKENIZER_FILE} is missing")
    try:
        weights = load_file(path / WEIGHTS_FILE)
        model = empty_encoder(BertConfig.from_dict(config["bert"]), encoder_config_from_json(config["encoder"]))
        model.load_state_dict(weights, assign=True)
        return Checkpoint(model.eval(), tokenizer_path, tuple(config["label_names"]), config["max_length"])
    except (OSError, SafetensorError) as exc:
        raise damaged(path, f"{WEIGHTS_FILE}: {exc}") from exc
    except Exception as exc:  # torch, and transformers with checks of its own, raise nearly anything here
        raise damaged(path, f"{CONFIG_FILE} and {WEIGHTS_FILE} do not fit: {exc}") from exc


def encoder_config_from_json(written: dict[str, Any]) -> EncoderConfig:
    """Rebuild what `asdict` made of an EncoderConfig; older ones had one pooling for all exits, and no pruning."""
    values = {"early_pooling": written.get("pooling"), **written, "exits": tuple(written["exits"])}
    if pruning := values.get("pruning"):
        values["pruning"] = Pruning(**{**pruning, "layers": tuple(pruning["layers"])})
    return EncoderConfig(**values)


def empty_encoder(bert_config: BertConfig, config: EncoderConfig) -> EarlyExitEncoder:
    """Build an encoder whose weights are still to be loaded, without touching the random state."""
    with torch.random.fork_rng(devices=[]):
        return EarlyExitEncoder(BertModel(bert_config, add_pooling_layer=False), config)


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


def load_training_state(path: Path) -> dict[str, Any]:
    """Read what a resumed run needs from an unfinished checkpoint; DataError if missing or damaged."""
    file = path / TRAINING_FILE
    if not file.is_file():
        raise DataError(f"resuming {path}: no {TRAINING_FILE}, so training there is finished or was never begun")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch.load raises UnpicklingError, RuntimeError, EOFError, OSError and more
        raise DataError(f"resuming {path}: {TRAINING_FILE}: {exc}; train again without resuming") from exc
    if not isinstance(state, dict):
        raise DataError(f"resuming {path}: {TRAINING_FILE} holds {type(state).__name__}; train again without resuming")
    return state
