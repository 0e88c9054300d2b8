"""Token pruning against a reference that treats one row at a time, without padding and with plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import OptionError
from offramp.models.pruning import Pruning, Shortening, norm_importance, num_kept, prune

LIMIT = 140
# The mean of what was dropped: sums of at most 130 numbers of about 1 in another order, 2.4e-7 seen.
MERGED_TOLERANCE = 2e-6


def reference(hidden: torch.Tensor, importance: torch.Tensor, pruning: Pruning, ratio: float) -> torch.Tensor:
    """One row of t real tokens (t, d): Algorithm 1, then the merged token."""
    tokens = len(hidden)
    kept = max(math.ceil(round((1 - ratio) * 1000) * (tokens - 1) / 1000), pruning.min_tokens - 1)
    order = sorted(range(1, tokens), key=lambda place: (-float(importance[place]), place))
    chosen, dropped = [0, *sorted(order[:kept])], order[kept:]
    result = hidden[chosen]
    if pruning.merge and dropped:
        weights = importance[dropped]
        merged = (weights[:, None] * hidden[dropped]).sum(0) / weights.sum()
        result = torch.cat([result, merged[None]])
    return result


def rows_of(lengths: list[int], width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (N, T, 8), kept (N, 1, T), importance (N, T) in few values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(lengths), width, 8, generator=generator)
    kept = (torch.arange(width) < torch.tensor(lengths)[:, None]).float()[:, None]
    importance = torch.randint(1, 6, (len(lengths), width), generator=generator).float()
    return hidden, kept, importance


@pytest.mark.parametrize("merge", [False, True])
@given(
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    padding=st.integers(0, 9),
    ratio=st.sampled_from([0.0, 0.15, 0.3, 0.5, 0.95]),
    min_tokens=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_row_keeps_what_it_would_alone(
    merge: bool, lengths: list[int], padding: int, ratio: float, min_tokens: int, seed: int
) -> None:
    pruning = Pruning(ratio=ratio, min_tokens=min_tokens, merge=merge)
    hidden, kept, importance = rows_of(lengths, max(lengths) + padding, seed)
    short, left = prune(hidden, kept, importance, Shortening(pruning, ratio, LIMIT))
    assert short.shape[1] == left.shape[2] == num_kept(hidden.shape[1], ratio, pruning)
    for row, length in enumerate(lengths):
        expected = reference(hidden[row, :length], importance[row, :length], pruning, ratio)
        assert left[row, 0].tolist() == [1.0] * len(expected) + [0.0] * (short.shape[1] - len(expected))
        torch.testing.assert_close(short[row, : len(expected)], expected, rtol=0, atol=MERGED_TOLERANCE)


@pytest.mark.parametrize("merge", [False, True])
def test_counts_at_every_length(merge: bool) -> None:
    """The paper's 30 %: exactly the formula, never more than there is, never fewer for a longer row."""
    pruning = Pruning(merge=merge)
    counts = [num_kept(tokens, 0.3, pruning) for tokens in range(131)]
    for tokens, count in enumerate(counts[1:], 1):
        formula = max(math.ceil(7 * (tokens - 1) / 10) + 1, pruning.min_tokens)
        assert count == min(tokens, formula + merge)
    assert counts[0] == 0
    assert counts == sorted(counts)


def test_gaps_in_the_mask_go_first() -> None:
    """Padding anywhere, however important its states look."""
    hidden, _, importance = rows_of([10], 10, 0)
    kept = torch.tensor([[[1.0, 0, 1, 1, 0, 0, 1, 1, 0, 1]]])
    importance += 10 * (1 - kept[:, 0])
    short, left = prune(hidden, kept, importance, Shortening(Pruning(min_tokens=1), 0.3, LIMIT))
    places = kept[0, 0].bool()
    expected = reference(hidden[0, places], importance[0, places], Pruning(min_tokens=1), 0.3)
    assert left[0, 0].sum() == len(expected) == 5
    assert torch.equal(short[0, :5], expected)


def test_norm() -> None:
    hidden = torch.randn(2, 5, 16)
    torch.testing.assert_close(norm_importance(hidden), hidden.norm(dim=2) / 4)


@pytest.mark.parametrize(
    "wrong",
    [{"layers": ()}, {"layers": (0, 2)}, {"layers": (4, 2)}, {"ratio": 1.0}, {"importance": "luck"}, {"min_tokens": 0}],
)
def test_pruning_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=r"got .*expected"):
        Pruning(**wrong)
