"""Pruning, window attention and exits in one encoder, against one row at a time without padding."""

import pytest
import torch
from tiny_encoder import WORDS, tiny_bert
from torch import nn

from offramp.errors import OptionError
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig, ExitAnswer
from offramp.models.pruning import Pruning, num_kept

# A row in a batch and alone: FP32 sums in another order, 2.4e-7 seen on logits up to 1.4 (docs/tolerances.md).
LOGIT_TOLERANCE = 1e-5
LENGTHS = (32, 25, 17, 9, 4, 2, 1)
PRUNINGS = {
    "by norm": Pruning(layers=(1, 3), min_tokens=2),
    "by attention": Pruning(layers=(1, 3), ratio=0.5, importance="attention", min_tokens=2),
    "merging": Pruning(layers=(2,), ratio=0.5, min_tokens=2, merge=True),
}


def make_encoder(config: EncoderConfig) -> EarlyExitEncoder:
    """Return the tiny encoder with uneven normalisations: after an even one all tokens have the same norm."""
    torch.manual_seed(0)
    encoder = EarlyExitEncoder(tiny_bert(), config).eval()
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return encoder


def make_batch(width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, len(WORDS), mask.shape, generator=generator) * mask, mask


@pytest.mark.parametrize("window", [(0, False), (8, False), (8, True)], ids=["dense", "window", "blocks"])
@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
@torch.no_grad()
def test_a_row_says_the_same_alone(pruning: Pruning, window: tuple[int, bool]) -> None:
    encoder = make_encoder(EncoderConfig((0, 2, 4), pruning=pruning, window=window[0], in_blocks=window[1]))
    ids, mask = make_batch()
    together = encoder(ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])
        for logits, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=LOGIT_TOLERANCE)


@torch.no_grad()
def test_blocks_say_what_the_mask_says() -> None:
    ids, mask = make_batch()
    configs = [EncoderConfig((2, 4), pruning=PRUNINGS["by norm"], window=4, in_blocks=flag) for flag in (False, True)]
    masked, blocks = (make_encoder(config)(ids, mask) for config in configs)
    for one, other in zip(masked, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=LOGIT_TOLERANCE)


@torch.no_grad()
def test_the_sequence_really_becomes_shorter() -> None:
    encoder = make_encoder(EncoderConfig((0, 1, 2, 3, 4), pruning=PRUNINGS["by norm"]))
    lengths = [hidden.shape[1] for hidden, _ in encoder.states(*make_batch())]
    first = num_kept(32, 0.3, PRUNINGS["by norm"])
    second = num_kept(first, 0.3, PRUNINGS["by norm"])
    assert lengths == [32, first, first, second, second]
    assert (first, second) == (23, 17)


@torch.no_grad()
def test_retention_is_the_share_of_each_rows_own_tokens() -> None:
    pruning = PRUNINGS["by norm"]
    encoder = make_encoder(EncoderConfig((0, 2, 4), pruning=pruning))
    plain = encoder(*make_batch())
    encoder.reports_retention = True
    answers = encoder(*make_batch())
    assert all(isinstance(answer, ExitAnswer) for answer in answers)
    first = [num_kept(length, 0.3, pruning) for length in LENGTHS]
    second = [num_kept(length, 0.3, pruning) for length in first]
    for answer, logits, left in zip(answers, plain, (LENGTHS, first, second), strict=True):
        assert torch.equal(answer.logits, logits)
        torch.testing.assert_close(answer.retention, torch.tensor(left) / torch.tensor(LENGTHS))


@torch.no_grad()
def test_a_ratio_of_zero_is_the_encoder_without_pruning() -> None:
    """As in the first epoch; the ratio may change at any time."""
    encoder = make_encoder(EncoderConfig((2, 4), pruning=PRUNINGS["by norm"]))
    assert encoder.pruning_ratio == 0.3
    encoder.pruning_ratio = 0.0
    for logits, expected in zip(
        encoder(*make_batch()), make_encoder(EncoderConfig((2, 4)))(*make_batch()), strict=True
    ):
        torch.testing.assert_close(logits, expected, rtol=0, atol=LOGIT_TOLERANCE)
    with pytest.raises(OptionError, match="got 1"):
        encoder.pruning_ratio = 1.0


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_all_weights_learn_through_pruning(pruning: Pruning) -> None:
    encoder = make_encoder(EncoderConfig((2, 4), pruning=pruning, window=8, in_blocks=True)).train()
    torch.stack(encoder(*make_batch())).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if "token_type" not in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("wrong", [{"window": 5}, {"window": -2}, {"in_blocks": True}])
def test_config_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}: got .*expected"):
        EncoderConfig(**wrong)
