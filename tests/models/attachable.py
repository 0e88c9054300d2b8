"""Tiny encoders of `transformers` with fixed weights, for exits to be attached to."""

from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)

from offramp.models.attached import AttachedExits, attach_exits

VOCABULARY = 20
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 2}
_DISTILBERT |= {"vocab_size": VOCABULARY, "max_position_embeddings": 24}
ENCODERS: dict[str, Any] = {
    "DistilBERT": (DistilBertModel, DistilBertConfig, _DISTILBERT),
    "ELECTRA": (ElectraModel, ElectraConfig, {**_SIZES, "embedding_size": 16}),
    "RoBERTa": (RobertaModel, RobertaConfig, {**_SIZES, "pad_token_id": 1}),
    "ALBERT": (AlbertModel, AlbertConfig, {**_SIZES, "embedding_size": 16}),
}


def tiny_attached(name: str) -> AttachedExits:
    """Exits after the embeddings and after layers 1 and 3 of a fresh encoder."""
    model, config, options = ENCODERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        # An initial range of 0.02 makes so small an encoder answer nearly the same to every text.
        encoder = model(config(**options, initializer_range=0.2))
    return attach_exits(encoder, (0, 1, 3), 2)
