"""What is put on a frozen decoder changes nothing until it is asked for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offramp.errors import OptionError
from offramp.models.adapters import UNKNOWN_LOGIT, DraftVocabulary
from offramp.models.frozen import Additions, decoder_with
from offramp.models.llama import decoder_from_llama
from offramp.models.routers import EVERYBODY, feed_where
from tests import decoders
from tests.models.test_decoder import said

ATOL = 1e-5  # the same products in tensors of other shapes


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def with_threshold(ids: torch.Tensor, threshold: torch.Tensor):
    model, rows = decoders.adaptive(), len(ids)
    past = [(torch.zeros(rows, 2, 1, 8),) * 2] * model.config.num_remembering
    active = [torch.arange(ids.shape[1]).repeat(rows, 1)] * 2
    return model(ids, torch.zeros(rows, dtype=torch.int64), active, past, threshold)


def test_with_all_ffns_the_final_exit_is_the_model_it_is_put_on() -> None:
    ids = torch.tensor([[5, 80, 3, 17, 200, 44], [1, 2, 3, 4, 5, 6]])
    everybody = torch.full((2, decoders.LAYERS), EVERYBODY)
    wanted = decoders.llama()(ids).logits
    assert torch.allclose(with_threshold(ids, everybody).exits[-1].logits, wanted, atol=1e-4)


def test_an_ffn_runs_where_the_threshold_is_reached_and_its_shortcut_everywhere_else() -> None:
    generator = torch.Generator().manual_seed(4)
    active, normed = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    seen = []

    def times(factor: int, rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return factor * rows

    for chosen in (torch.rand(2, 5, generator=generator) < 0.5, torch.zeros(2, 5, dtype=torch.bool)):
        got = feed_where(active, normed, chosen, partial(times, 3), partial(times, 2))
        assert torch.allclose(got, active + torch.where(chosen[..., None], 3, 2) * normed, atol=ATOL)
        assert seen[-2:] == [chosen.sum(), 10 - chosen.sum()]


def test_rows_may_have_thresholds_of_their_own() -> None:
    ids = torch.tensor([[5, 80, 3, 17, 200, 44]]).repeat(2, 1)
    thresholds = torch.stack([torch.full((3,), EVERYBODY), torch.full((3,), -EVERYBODY)])
    both = with_threshold(ids, thresholds).exits[-1].logits
    for row in range(2):
        alone = with_threshold(ids[:1], thresholds[row : row + 1]).exits[-1].logits[0]
        assert torch.allclose(both[row], alone, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1)


def test_an_exit_says_only_tokens_that_it_knows() -> None:
    draft = DraftVocabulary(10, 3)
    draft.set_tokens(torch.tensor([7, 0, 4]))
    said_here = draft(torch.tensor([[1.0, 2.0, 3.0]]))
    assert said_here[0].tolist() == [2.0, *[UNKNOWN_LOGIT] * 3, 3.0, *[UNKNOWN_LOGIT] * 2, 1.0, *[UNKNOWN_LOGIT] * 2]
    assert draft.tokens.tolist() == [7, 0, 4]


def test_an_exit_begins_as_the_last_layers_and_the_rows_of_its_tokens() -> None:
    model = decoders.adaptive()
    leave = model.exits[0]
    assert torch.equal(leave.layers[0].up.weight, decoders.decoder().layers[-1].up.weight)
    assert torch.equal(leave.head.weight, model.embedding.weight[leave.draft.tokens])
    hidden = said(model, torch.tensor([[4, 9, 3]]), past=[(torch.zeros(1, 2, 1, 8),) * 2] * 5).exits[0]
    known = leave.draft.tokens
    assert torch.allclose(hidden.logits[..., known], hidden.hidden @ model.embedding.weight[known].T, atol=ATOL)


def test_additions_that_do_not_fit_are_refused() -> None:
    base = decoder_from_llama(decoders.llama())
    with pytest.raises(OptionError, match="expected the same last"):
        decoder_with(base, Additions((1, 2)))
    with pytest.raises(OptionError, match="expected the same last"):
        decoder_with(decoders.adaptive(), Additions((1, 3)))
    with pytest.raises(OptionError, match="vocabulary of 211"):
        decoder_with(base, Additions((1, 3), tokens=(211,)))
    with pytest.raises(OptionError, match="capacities"):
        decoder_with(base, Additions((1, 3), capacities=(1.5,)))
