"""The kinds of models: what each is configured by, how a fresh one is made, and how config.json brings it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BertConfig, BertModel

from offramp.models.attached import AttachedConfig, AttachedExits, attached_from_pretrained, encoder_from_dict
from offramp.models.branchynet import BranchyNet, BranchyNetConfig
from offramp.models.cascade import CascadeConfig, CascadeTransformer
from offramp.models.data import default_encoder_path
from offramp.models.decoder import DecoderConfig, EarlyExitDecoder
from offramp.models.efficientnet import (
    EfficientNet,
    EfficientNetConfig,
    default_efficientnet_path,
    efficientnet_from_pretrained,
)
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, encoder_from_pretrained
from offramp.models.language_model import LanguageModel, fresh_language_model
from offramp.models.options import options_from_dict
from offramp.models.regression import LearnedRegressor, RegressionConfig

BERT = "bert"
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Kind:
    """One kind of model, configured by a frozen dataclass `config`.

    `fresh` makes one from pretrained weights (a path, if it takes any), a configuration and a seed. `from_dict` makes
    what `to_dict` wrote down, with weights that are still to be loaded. Models of texts read input_ids and
    attention_mask and have `num_positions`; models of images read pixels, their config has an `image_shape`. Language
    models read windows of tokens and have no classes; their config has a `vocabulary`, that of their own tokenizer.
    """

    config: type
    fresh: Callable[[Path, Any, int], nn.Module]
    to_dict: Callable[[Any], dict[str, Any]]
    from_dict: Callable[[Mapping[str, Any]], nn.Module]
    num_positions: Callable[[Any], int] = lambda model: 0
    default_weights: Callable[[], Path] | None = None  # None: it takes no pretrained weights

    @property
    def is_text(self) -> bool:
        """Tell whether the model reads texts."""
        return not hasattr(self.config, "image_shape")

    @property
    def is_language_model(self) -> bool:
        """Tell whether the model says what comes next."""
        return "vocabulary" in {field.name for field in fields(self.config)}


def _bert_to_dict(model: EarlyExitEncoder) -> dict[str, Any]:
    return {"encoder": asdict(model.config), "bert": model.bert_config.to_dict()}


def _bert_from_dict(config: Mapping[str, Any]) -> EarlyExitEncoder:
    """Older ones had one pooling for all exits."""
    encoder = {"early_pooling": config["encoder"].get("pooling"), **config["encoder"]}
    bert = BertModel(BertConfig.from_dict(config["bert"]), add_pooling_layer=False)
    return EarlyExitEncoder(bert, options_from_dict(EncoderConfig, encoder, "encoder"))


def _regressor_from(encoder: EarlyExitEncoder, config: RegressionConfig) -> LearnedRegressor:
    encoder.heads = nn.ModuleList()  # its own classify
    return LearnedRegressor(encoder, encoder.bert_config.hidden_size, config)


def _fresh_regressor(weights: Path, config: RegressionConfig, seed: int) -> LearnedRegressor:
    encoder = encoder_from_pretrained(weights, EncoderConfig(config.exits, dropout=config.dropout), seed)
    return _seeded(lambda: _regressor_from(encoder, config), seed)


def _regressor_to_dict(model: LearnedRegressor) -> dict[str, Any]:
    return {"model": asdict(model.config), **_bert_to_dict(model.encoder)}  # type: ignore[arg-type]


def _regressor_from_dict(config: Mapping[str, Any]) -> LearnedRegressor:
    return _regressor_from(_bert_from_dict(config), options_from_dict(RegressionConfig, config["model"], "model"))


def _attached_to_dict(model: AttachedExits) -> dict[str, Any]:
    return {"model": asdict(model.config), "encoder": model.encoder.config.to_dict()}


def _attached_from_dict(config: Mapping[str, Any]) -> AttachedExits:
    encoder = encoder_from_dict(config["encoder"])
    return AttachedExits(encoder, options_from_dict(AttachedConfig, config["model"], "model"))


def _plain(config: type, model: Callable[[Any], nn.Module]) -> dict[str, Any]:
    """How a kind is written down that is nothing but its configuration."""
    return {
        "config": config,
        "to_dict": lambda made: {"model": asdict(made.config)},
        "from_dict": lambda found: model(options_from_dict(config, found["model"], "model")),
    }


def _seeded(make: Callable[[], M], seed: int) -> M:
    """What `make` draws at random, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def _bert_positions(model: Any) -> int:
    encoder: Any = model.encoder if isinstance(model, LearnedRegressor) else model
    return int(encoder.bert_config.max_position_embeddings)


KINDS: dict[str, Kind] = {
    BERT: Kind(
        EncoderConfig, encoder_from_pretrained, _bert_to_dict, _bert_from_dict, _bert_positions, default_encoder_path
    ),
    "regression": Kind(
        RegressionConfig,
        _fresh_regressor,
        _regressor_to_dict,
        _regressor_from_dict,
        _bert_positions,
        default_encoder_path,
    ),
    "attached": Kind(
        AttachedConfig,
        attached_from_pretrained,
        _attached_to_dict,
        _attached_from_dict,
        lambda model: int(model.num_positions),
        default_encoder_path,
    ),
    "cascade": Kind(
        **_plain(CascadeConfig, CascadeTransformer),
        fresh=lambda weights, config, seed: _seeded(lambda: CascadeTransformer(config), seed),
        num_positions=lambda model: int(model.num_positions),
    ),
    "branchynet": Kind(
        **_plain(BranchyNetConfig, BranchyNet),
        fresh=lambda weights, config, seed: _seeded(lambda: BranchyNet(config), seed),
    ),
    "language-model": Kind(
        **_plain(DecoderConfig, lambda config: LanguageModel(EarlyExitDecoder(config))),
        fresh=lambda weights, config, seed: _seeded(lambda: fresh_language_model(config), seed),
        num_positions=lambda model: int(model.config.max_positions),
    ),
    "efficientnet": Kind(
        **_plain(EfficientNetConfig, EfficientNet),
        fresh=efficientnet_from_pretrained,
        default_weights=default_efficientnet_path,
    ),
}
