"""The kinds of models that a checkpoint can hold: how each is written down in config.json and built from that again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import BertConfig, BertModel

from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.models.pruning import Pruning

BERT = "bert"


@dataclass(frozen=True)
class Kind:
    """One kind of model. `from_dict` builds what `to_dict` wrote down, with weights that are still to be loaded.

    Models of texts read input_ids and attention_mask and have `num_positions`; models of images read pixels and have 0.
    """

    to_dict: Callable[[Any], dict[str, Any]]
    from_dict: Callable[[Mapping[str, Any]], nn.Module]
    num_positions: Callable[[Any], int]
    is_text: bool = True


def _bert_to_dict(model: EarlyExitEncoder) -> dict[str, Any]:
    return {"encoder": asdict(model.config), "bert": model.bert_config.to_dict()}


def _bert_from_dict(config: Mapping[str, Any]) -> EarlyExitEncoder:
    """Older ones had one pooling for all exits, and no pruning."""
    written = config["encoder"]
    values = {"early_pooling": written.get("pooling"), **written, "exits": tuple(written["exits"])}
    if pruning := values.get("pruning"):
        values["pruning"] = Pruning(**{**pruning, "layers": tuple(pruning["layers"])})
    bert = BertModel(BertConfig.from_dict(config["bert"]), add_pooling_layer=False)
    return EarlyExitEncoder(bert, EncoderConfig(**values))


KINDS: dict[str, Kind] = {
    BERT: Kind(_bert_to_dict, _bert_from_dict, lambda model: int(model.bert_config.max_position_embeddings)),
}
