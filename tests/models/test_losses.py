"""The joint loss against the formula written out."""

import math

import pytest
import torch

from offramp.errors import OptionError
from offramp.models.losses import exit_weights, joint_loss, labels_or_answers_loss
from offramp.trace import UNKNOWN


def test_joint_loss_is_the_weighted_sum_of_cross_entropies() -> None:
    logits = [torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
    labels = torch.tensor([0, 1])
    by_hand = [
        sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(exit_, (0, 1), strict=True)) / 2
        for exit_ in ([[0.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]])
    ]
    got = joint_loss(logits, labels, (0.3, 1.0)).item()
    assert got == pytest.approx(0.3 * by_hand[0] + by_hand[1], rel=1e-6)


def test_every_exit_gets_a_gradient() -> None:
    logits = [torch.zeros(4, 3, requires_grad=True) for _ in range(3)]
    joint_loss(logits, torch.tensor([0, 1, 2, 0]), exit_weights(3)).backward()
    norms = [float(exit_logits.grad.norm()) for exit_logits in logits if exit_logits.grad is not None]
    assert norms == pytest.approx([0.3 * norms[2], 0.3 * norms[2], norms[2]])


def test_distillation_follows_the_label_or_the_final_exit() -> None:
    logits = [torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
    early = logits[0].log_softmax(dim=-1).tolist()
    answer = logits[1].softmax(dim=-1).tolist()
    by_label = -early[0][1]
    by_answer = -sum(share * value for share, value in zip(answer[1], early[1], strict=True))
    got = labels_or_answers_loss(logits, torch.tensor([1, UNKNOWN]), (0.3, 1.0)).item()
    assert got == pytest.approx(0.3 * (by_label + by_answer) / 2, rel=1e-6)


def test_distillation_teaches_the_final_exit_nothing() -> None:
    logits = [torch.zeros(4, 3, requires_grad=True) for _ in range(3)]
    labels_or_answers_loss(logits, torch.tensor([0, 1, 2, UNKNOWN]), exit_weights(3)).backward()
    assert [exit_logits.grad is None for exit_logits in logits] == [False, False, True]


def test_loss_of_bfloat16_logits_is_float32() -> None:
    loss = joint_loss([torch.zeros(2, 2, dtype=torch.bfloat16)], torch.tensor([0, 1]), (1.0,))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(("num_exits", "weights"), [(1, (1.0,)), (3, (0.3, 0.3, 1.0))])
def test_default_weights(num_exits: int, weights: tuple[float, ...]) -> None:
    assert exit_weights(num_exits) == weights


def test_a_weight_per_exit_is_needed() -> None:
    with pytest.raises(OptionError, match="2 weights for 1 exits"):
        joint_loss([torch.zeros(2, 2)], torch.tensor([0, 1]), (0.3, 1.0))
    with pytest.raises(OptionError, match="2 weights for 3 exits"):
        labels_or_answers_loss([torch.zeros(2, 2)] * 3, torch.tensor([0, 1]), (0.3, 1.0))
