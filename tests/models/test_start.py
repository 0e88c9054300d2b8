"""A model that begins with the weights of another: heads by depth, what does not fit stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from offramp.errors import OptionError
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.models.start import start_from
from tests.models.tiny_encoder import tiny_bert


def test_layers_and_the_head_of_the_same_depth_are_taken() -> None:
    config = EncoderConfig(exits=(4,), num_classes=2)
    taught = EarlyExitEncoder(tiny_bert(), config)
    nn.init.normal_(taught.layers[2].output.dense.weight)
    nn.init.normal_(taught.heads[0][1].weight)
    model = EarlyExitEncoder(tiny_bert(), replace(config, exits=(2, 4)))
    before = model.heads[0].classes.weight.clone()
    assert start_from(model, taught) == len(taught.state_dict())
    assert torch.equal(model.layers[2].output.dense.weight, taught.layers[2].output.dense.weight)
    assert torch.equal(model.heads[1][1].weight, taught.heads[0][1].weight)
    assert torch.equal(model.heads[0].classes.weight, before)


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(OptionError, match="has no weights that fit into a Conv1d"):
        start_from(nn.Conv1d(2, 3, 4), nn.Linear(5, 6))
