"""Exits on any encoder of `transformers`: BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, MPNet and their like.

The encoder runs as its own code has it, with eager attention, and the exits read the hidden states that it reports. So
nothing here knows its layers; `encoder.py`, which does know BERT's, can also prune tokens and narrow attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from offramp.errors import DataError, ModelError
from offramp.models.encoder import quiet_transformers, set_dropout
from offramp.models.heads import Pooling, Tokens, check_head_options, exit_head, mean_weights
from offramp.models.window_attention import additive

MODEL_TYPE = "model_type"  # what AutoConfig knows a configuration by


@dataclass(frozen=True)
class AttachedConfig:
    """Where the exits are and how they read the hidden state: as EncoderConfig, for any encoder. Raises OptionError."""

    exits: tuple[int, ...] = (0, 2, 4, 6)
    num_classes: int = 2
    pooling: Pooling = "mean"
    early_pooling: Pooling = "window"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_head_options(self.exits, self.num_classes, (self.early_pooling, self.pooling), self.dropout)


class AttachedExits(nn.Module):
    """An encoder whose forward returns the logits (N, C) of every exit in order, the final exit last.

    Layers behind the final exit stay with the encoder; the exported graph is without them. Raises ModelError if
    `encoder` has too few layers or is a decoder.
    """

    def __init__(self, encoder: Any, config: AttachedConfig) -> None:
        super().__init__()
        check_encoder(encoder, config)
        encoder.set_attn_implementation("eager")  # the others scale queries and keys separately, or do not export
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # what classified before
        self.config = config
        self.encoder = encoder
        poolings = [config.early_pooling] * (len(config.exits) - 1) + [config.pooling]
        width = encoder.config.hidden_size
        self.heads = nn.ModuleList(exit_head(width, config.num_classes, how, config.dropout) for how in poolings)
        set_dropout(self, config.dropout)

    @property
    def layers(self) -> nn.ModuleList:
        """Return the layers of the encoder."""
        return layers_of(self.encoder)

    @property
    def num_positions(self) -> int:
        """Return the tokens that a text may have; RoBERTa and its like begin to count behind the padding's number."""
        first = getattr(self.encoder.embeddings, "padding_idx", None)
        return int(self.encoder.config.max_position_embeddings) - (0 if first is None else int(first) + 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Classify N texts: input_ids and attention_mask (1 = token, 0 = padding) are (N, T) int64."""
        kept = attention_mask[:, None, :].to(self.encoder.dtype)  # (N, 1, T) in {0, 1}
        tokens = Tokens(kept, mean_weights(kept))
        # A mask of four axes is taken as it is; theirs is the least number of FP32, which FP16 has not.
        said = self.encoder(input_ids=input_ids, attention_mask=additive(kept)[:, None], output_hidden_states=True)
        states = [said.hidden_states[depth] for depth in self.config.exits]  # (N, T, d) each
        return tuple(head(hidden, tokens) for head, hidden in zip(self.heads, states, strict=True))


def attach_exits(encoder: nn.Module, exits: Sequence[int], num_classes: int, seed: int = 0) -> AttachedExits:
    """Put fresh exit heads, drawn from `seed`, on an encoder of `transformers`; after 0 layers is on its embeddings.

    The encoder is taken over, not copied. Raises OptionError, and ModelError as AttachedExits does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttachedExits(encoder, AttachedConfig(tuple(exits), num_classes)).eval()


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """Return the list of layers of an encoder: the one as long as its configuration says. Raises ModelError."""
    count = encoder.config.num_hidden_layers  # type: ignore[union-attr]
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ModelError(f"attaching exits: {type(encoder).__name__} keeps no list of its {count} layers")
    return lists[0]


def check_encoder(encoder: Any, config: AttachedConfig) -> None:
    """Raise ModelError unless `encoder` is one of texts with a layer for every exit."""
    name, theirs = type(encoder).__name__, getattr(encoder, "config", None)
    if theirs is None or getattr(theirs, "is_decoder", False) or getattr(theirs, "is_encoder_decoder", False):
        raise ModelError(
            f"attaching exits: got {name}, expected an encoder of transformers, as AutoModel.from_pretrained gives "
            "for BERT, RoBERTa, ELECTRA or DistilBERT"
        )
    if theirs.num_hidden_layers < config.exits[-1]:
        raise ModelError(
            f"attaching exits {config.exits}: {name} has {theirs.num_hidden_layers} layers; name exits up to that"
        )


def attached_from_pretrained(path: Path, config: AttachedConfig, seed: int = 0) -> AttachedExits:
    """Load the encoder in a directory of `transformers` and attach exits, drawn from `seed`. Nothing is downloaded.

    Raises DataError if the directory holds none, ModelError as AttachedExits does.
    """
    try:
        with quiet_transformers():
            encoder = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except Exception as exc:  # transformers raises OSError, ValueError, RuntimeError, safetensors' own and more
        raise DataError(
            f"loading an encoder from {path}: got {type(exc).__name__}: {exc}; expected a directory that "
            "save_pretrained wrote"
        ) from exc
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttachedExits(encoder, config).eval()


def encoder_from_dict(config: Mapping[str, Any]) -> nn.Module:
    """Build an encoder, its weights to be loaded, from what its configuration's `to_dict` gave."""
    theirs = {name: value for name, value in config.items() if name != MODEL_TYPE}
    made: Any = AutoModel  # whose methods have no types
    encoder: nn.Module = made.from_config(AutoConfig.for_model(config[MODEL_TYPE], **theirs))
    return encoder
