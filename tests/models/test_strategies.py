"""Losses of the strategies against formulas written out, and options that are refused."""

import math
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional

from offramp.errors import OptionError
from offramp.models.devices import CPU, precision_on
from offramp.models.losses import Answers, calibration_loss, confidence_loss, joint_loss, teacher_loss
from offramp.models.options import options_from_dict
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.strategies import STRATEGIES, LossOptions, set_learners, step_loss
from offramp.trace import UNKNOWN

LOGITS = tuple(torch.tensor([[0.5, -1.0], [2.0 * k, 1.0], [0.0, k]]) for k in (0.0, 1.0, 2.0))
LABELS = torch.tensor([0, 1, 1])
ANSWERS = Answers(LOGITS, (None, None, None))


def cross_entropies() -> list[float]:
    return [float(functional.cross_entropy(logits, LABELS)) for logits in LOGITS]


@pytest.mark.parametrize(
    ("strategy", "options", "step", "factors"),
    [
        ("joint", LossOptions(), 0, (0.3, 0.3, 1.0)),
        ("joint", LossOptions(rule="equal"), 0, (1.0, 1.0, 1.0)),
        ("joint", LossOptions(rule="linear"), 0, (1 / 3, 2 / 3, 1.0)),
        ("joint", LossOptions(weights=(0.0, 2.0, 0.5)), 0, (0.0, 2.0, 0.5)),
        ("final", LossOptions(), 0, (0.0, 0.0, 1.0)),
        ("early_heads", LossOptions(), 0, (0.3, 0.3, 0.0)),
        ("alternating", LossOptions(), 4, (0.3, 0.3, 0.0)),
        ("alternating", LossOptions(), 5, (0.0, 0.0, 1.0)),
        ("berxit", LossOptions(), 4, (0.3, 0.3, 1.0)),
        ("berxit", LossOptions(), 5, (0.0, 0.0, 1.0)),
        ("labels_or_answers", LossOptions(), 0, (0.3, 0.3, 0.0)),
    ],
)
def test_weights_and_turns(strategy: str, options: LossOptions, step: int, factors: tuple[float, ...]) -> None:
    got = float(step_loss(STRATEGIES[strategy], options, ANSWERS, LABELS, step))
    assert got == pytest.approx(sum(f * ce for f, ce in zip(factors, cross_entropies(), strict=True)), rel=1e-6)


def test_self_distillation_looks_at_no_label() -> None:
    got = [float(step_loss(STRATEGIES["self_distillation"], LossOptions(), ANSWERS, labels, 0))
           for labels in (LABELS, torch.full((3,), UNKNOWN))]  # fmt: skip
    answer = LOGITS[-1].softmax(-1)
    by_hand = sum(0.3 * float(-(answer * logits.log_softmax(-1)).sum(-1).mean()) for logits in LOGITS[:-1])
    assert got == pytest.approx([by_hand, by_hand], rel=1e-6)


def test_the_teacher_has_a_temperature() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    wanted, said = (teacher / 2).softmax(-1), (LOGITS[-1] / 2).softmax(-1)
    by_hand = 4 * float((wanted * (wanted / said).log()).sum(-1).mean())
    answers = Answers(LOGITS, ANSWERS.learned, teacher)
    assert float(teacher_loss(answers, 2.0)) == pytest.approx(by_hand, rel=1e-5)
    total = step_loss(STRATEGIES["joint"], LossOptions(teacher_weight=0.5), answers, LABELS, 0)
    assert float(total) == pytest.approx(float(joint_loss(LOGITS, LABELS, (0.3, 0.3, 1.0))) + 0.5 * by_hand, rel=1e-5)
    early = step_loss(STRATEGIES["early_heads"], LossOptions(teacher_weight=0.5), answers, LABELS, 0)
    assert float(early) == pytest.approx(0.3 * sum(cross_entropies()[:2]), rel=1e-5)
    values = Answers((torch.tensor([[1.0]]),), (None,), torch.tensor([[3.0]]))
    assert float(teacher_loss(values, 2.0)) == 4.0
    with pytest.raises(OptionError, match=r"its logits are \(1, 1\)"):
        teacher_loss(Answers(LOGITS, ANSWERS.learned, torch.tensor([[3.0]])), 2.0)


def test_calibration_asks_for_larger_margins_of_right_rows_only() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]], requires_grad=True)
    gradients = {}
    for temperature in (1.0, 2.0):
        (gradient,) = torch.autograd.grad(calibration_loss([logits], torch.tensor([0, 0]), (1.0,), temperature), logits)
        gradients[temperature] = gradient.norm(dim=1).tolist()
    assert gradients[2.0][0] > 3 * gradients[1.0][0]
    assert gradients[2.0][1] == pytest.approx(gradients[1.0][1], rel=0.15)
    got = float(calibration_loss([logits.detach()], torch.tensor([0, 0]), (1.0,), 2.0))
    assert got == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)))
    with pytest.raises(OptionError, match="got a regression"):
        calibration_loss([logits[:, :1]], torch.tensor([0.0, 1.0]), (1.0,), 2.0)


def test_confidence_is_one_minus_tanh_of_the_error() -> None:
    values = torch.tensor([[1.0], [-2.0]], requires_grad=True)
    sure = torch.tensor([0.5, 0.25])
    answers = Answers((values, values), (sure[:, None], None))
    targets = torch.tensor([1.5, 1.0])
    by_hand = ((0.5 - (1 - math.tanh(0.5))) ** 2 + (0.25 - (1 - math.tanh(3.0))) ** 2) / 2
    got = confidence_loss(answers, targets)
    assert float(got) == pytest.approx(by_hand, rel=1e-6)
    assert not got.requires_grad, "the target teaches the value nothing"


def test_confidence_of_a_class_is_whether_it_is_right() -> None:
    answers = Answers((LOGITS[0], LOGITS[2]), (torch.tensor([0.75, 0.5, 1.0]), None))
    got = float(confidence_loss(answers, torch.tensor([0, 1, UNKNOWN])))  # right, and tied logits count as class 1
    right = float(LOGITS[0][1].argmax() == 1)
    assert got == pytest.approx(((0.75 - 1) ** 2 + (0.5 - right) ** 2) / 2)


def test_values_are_learned_by_squared_error() -> None:
    values = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    targets = torch.tensor([1.0, 4.0])
    answers = Answers(values, (None, None))
    assert float(step_loss(STRATEGIES["joint"], LossOptions(), answers, targets, 0)) == pytest.approx(0.3 * 2 + 5)
    assert float(step_loss(STRATEGIES["self_distillation"], LossOptions(), answers, targets, 0)) == pytest.approx(0.3)
    assert float(step_loss(STRATEGIES["labels_or_answers"], LossOptions(), answers, targets, 0)) == pytest.approx(0.6)


def test_a_model_without_heads_is_told() -> None:
    with pytest.raises(OptionError, match="no ModuleList called heads"):
        set_learners(torch.nn.Linear(2, 2), "all", ())


def test_a_plan_is_read_back() -> None:
    stage = Stage("final", 3, loss=LossOptions((0.1, 1.0), temperature=4.0), anneal={"ratio": (0.0, 0.3)})
    plan = Plan((stage, Stage("early_heads")), RunOptions(frozen=("a.", "b."), seed=3))
    assert options_from_dict(Plan, asdict(plan), "plan") == plan
    assert [plan.stage_of(epoch) for epoch in (0, 2, 3, 4)] == [
        (stage, 0), (stage, 0), (plan.stages[1], 3), (plan.stages[1], 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_precision(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert precision_on(CPU, "auto") == expected
    assert precision_on(CPU, "float32") == "float32"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (Stage, {"epochs": 0}),
        (Stage, {"encoder_lr": -1.0}),
        (Stage, {"head_lr": float("nan")}),
        (Stage, {"warmup_ratio": 1.5}),
        (Stage, {"layer_dropout": -0.1}),
        (Stage, {"strategy": "jiont"}),
        (Stage, {"anneal": {"ratio": ()}}),
        (RunOptions, {"batch_size": 0}),
        (RunOptions, {"seed": -1}),
        (RunOptions, {"precision": "float8"}),
        (RunOptions, {"weight_decay": float("inf")}),
        (RunOptions, {"snapshot_steps": -1}),
        (RunOptions, {"snapshot_seconds": 0.0}),
        (LossOptions, {"rule": "loud"}),
        (LossOptions, {"early_weight": float("inf")}),
        (LossOptions, {"weights": (1.0, -1.0)}),
        (LossOptions, {"temperature": 0.0}),
    ],
)
def test_options_refuse(options: type, wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}: got .*expected"):
        options(**wrong)


def test_a_plan_needs_a_stage_and_exits_a_weight_each() -> None:
    with pytest.raises(OptionError, match="no stages"):
        Plan(())
    with pytest.raises(OptionError, match="got 2 for 3 exits"):
        LossOptions(weights=(1.0, 1.0)).exit_weights(3)
