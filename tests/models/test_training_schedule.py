"""What changes from step to step."""

import math

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import OptionError
from offramp.models.schedule import annealed, layer_rates, layers_dropped, learning_rate_scale


def test_learning_rate_goes_up_and_down_in_lines() -> None:
    scales = [learning_rate_scale(step, 10, 0.2) for step in range(10)]
    assert scales == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate_scale(0, 5, 0.0) == 1.0
    assert 0 < learning_rate_scale(4, 5, 1.0) <= 1.0


def test_values_anneal_in_lines_between_ends_of_epochs() -> None:
    values = (0.0, 0.0, 0.15, 0.3)
    got = [annealed(values, epochs) for epochs in (0, 0.5, 1, 1.5, 2, 2.75, 3, 7)]
    assert got == pytest.approx([0, 0, 0, 0.075, 0.15, 0.2625, 0.3, 0.3])
    assert annealed((0.5,), 2.5) == 0.5


def test_deeper_layers_are_skipped_more_often() -> None:
    rates = layer_rates(5, 0.2)
    assert rates == pytest.approx([0.2 * (2 ** (layer / 4) - 1) for layer in range(5)])
    assert (rates[0], rates[-1]) == pytest.approx((0.0, 0.2))
    assert layer_rates(1, 0.2) == (0.0,)


class Plus(nn.Module):
    """Adds a number; with `shorter`, it also drops a column, as pruning does."""

    def __init__(self, number: float, shorter: bool = False) -> None:
        super().__init__()
        self.number, self.shorter = number, shorter

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, 1:] + self.number if self.shorter else hidden + self.number


class Sum(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_every_row_draws_for_itself() -> None:
    torch.manual_seed(0)
    model, rows = Sum(Plus(1), Plus(10), Plus(100)), 4000
    with layers_dropped(model, 0.5):
        got = model.train()(torch.zeros(rows, 2, 3))
    assert (got == got[:, :1, :1]).all(), "a row skips a layer whole"
    found = got[:, 0, 0]
    assert set(found.tolist()) == {111.0, 101.0, 11.0, 1.0}, "never the first layer"
    shares = {layer: float((found.div(number, rounding_mode="floor") % 10 == 0).float().mean())
              for layer, number in ((1, 10), (2, 100))}  # fmt: skip
    assert shares[1] == pytest.approx(0.5 * (math.sqrt(2) - 1), abs=0.02)
    assert shares[2] == pytest.approx(0.5, abs=0.03)
    with layers_dropped(model, 0.5):
        assert (model.eval()(torch.zeros(rows, 2)) == 111).all()
    assert (model.train()(torch.zeros(rows, 2)) == 111).all()


def test_a_layer_that_prunes_is_not_skipped() -> None:
    model = Sum(Plus(1), Plus(10, shorter=True)).train()
    with layers_dropped(model, 1.0):
        assert (model(torch.zeros(50, 4)) == 11).all()


def test_a_model_without_layers() -> None:
    with pytest.raises(OptionError, match="Linear has no list of layers"), layers_dropped(nn.Linear(2, 2), 0.1):
        pass
    with layers_dropped(nn.Linear(2, 2), 0.0):
        pass
