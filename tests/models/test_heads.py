"""Exit heads against loops over tokens, and what padding may not change."""

import pytest
import torch

from offramp.models.heads import LinearHead, Tokens, WindowHead, exit_head, mean_weights


def tokens_of(lengths: list[int], width: int) -> Tokens:
    """Mark the first tokens of every row."""
    kept = (torch.arange(width) < torch.tensor(lengths)[:, None]).float()[:, None]
    return Tokens(kept, mean_weights(kept))


def window_by_hand(head: WindowHead, states: list[torch.Tensor]) -> torch.Tensor:
    """Classify one row, token by token."""
    parts = [head.mix(state).chunk(3) for state in states]
    features = []
    for place, (_, own, _) in enumerate(parts):
        total = own
        if place > 0:
            total = total + parts[place - 1][0]
        if place + 1 < len(parts):
            total = total + parts[place + 1][2]
        features.append(total.relu())
    table = torch.stack(features)
    return head.classes(torch.cat([table.mean(dim=0), table.max(dim=0).values]))


@torch.no_grad()
def test_a_window_is_every_token_with_its_neighbours() -> None:
    torch.manual_seed(0)
    head = WindowHead(8, 3, 0.1).eval()
    hidden = torch.randn(4, 5, 8)
    lengths = [5, 3, 2, 1]
    got = head(hidden, tokens_of(lengths, 5))
    for row, length in enumerate(lengths):
        expected = window_by_hand(head, list(hidden[row, :length]))
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-6)


def test_a_window_sees_the_order_and_a_mean_does_not() -> None:
    torch.manual_seed(0)
    hidden, tokens = torch.randn(1, 4, 8), tokens_of([4], 4)
    window, mean = (exit_head(8, 2, pooling, 0.0) for pooling in ("window", "mean"))
    assert not torch.allclose(window(hidden, tokens), window(hidden.flip(1)[:, [1, 0, 2, 3]], tokens))
    torch.testing.assert_close(mean(hidden, tokens), mean(hidden.flip(1), tokens))


@pytest.mark.parametrize("pooling", ["window", "mean", "cls"])
def test_what_is_padded_does_not_count(pooling: str) -> None:
    torch.manual_seed(0)
    head = exit_head(8, 2, pooling, 0.0)
    hidden = torch.randn(2, 6, 8)
    tokens = tokens_of([4, 1], 6)
    other = torch.where(tokens.kept.transpose(1, 2).bool(), hidden, torch.full_like(hidden, 7.0))
    assert torch.equal(head(hidden, tokens), head(other, tokens))


def test_mean_and_first_token_in_exact_arithmetic() -> None:
    hidden = torch.tensor([[[2.0, 4.0], [4.0, 8.0], [99.0, 99.0]]])
    for pooling, expected in (("mean", [3.0, 6.0]), ("cls", [2.0, 4.0])):
        head = LinearHead(2, 2, pooling, 0.0)
        torch.nn.init.eye_(head[1].weight)
        torch.nn.init.zeros_(head[1].bias)
        assert head(hidden, tokens_of([2], 3)).tolist() == [expected]


@pytest.mark.parametrize("pooling", ["window", "mean"])
def test_a_row_without_tokens_gives_numbers(pooling: str) -> None:
    assert torch.isfinite(exit_head(8, 2, pooling, 0.0)(torch.randn(1, 3, 8), tokens_of([0], 3))).all()
