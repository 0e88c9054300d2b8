"""Capture: a torch model becomes a graph that says the same, and nothing else happens to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import CaptureError, OptionError
from offramp.export.capture import DEFAULT_OPSET, Example, graph_from_model
from tests.export import models

SEQUENCE = {"x": {1: "sequence"}}


class Returns(nn.Module):
    """Returns what `answer` makes of a linear layer's output."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(6, 3), answer

    def forward(self, x: Tensor) -> object:
        return self.answer(self.layer(x))


def test_nothing_happens_to_the_model(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    model, example = models.strided_cnn()
    model.train()
    model.stem[1].eval()  # a frozen normalisation in a model under training
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    first = graph_from_model(model, example).SerializeToString(deterministic=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert graph_from_model(model, example).SerializeToString(deterministic=True) == first
    assert str(tmp_path.home()).encode() not in first
    assert b"models.py" not in first


def test_inputs_taken_by_keyword() -> None:
    graph = graph_from_model(*models.by_keyword()).graph
    shapes = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    assert shapes == {"input_ids": ["rows", "sequence"], "attention_mask": ["rows", "sequence"]}


def test_inputs_in_another_order_than_forward_has_them() -> None:
    """`graph_from_model` compares with the model, so a swap would be an error."""
    graph = graph_from_model(*models.odd_outputs()).graph
    assert {value.name for value in graph.input} == {"dense", "code", "late", "unused"}


def test_graph_that_does_not_say_what_the_model_says_is_refused() -> None:
    """torch exports an adaptive pool for one size only, and says nothing."""
    model, example = models.strided_cnn(nn.AdaptiveAvgPool2d(2), 16)
    with pytest.raises(CaptureError, match=r"(?s)StridedCNN at height=8, width=19.*something in forward was fixed"):
        graph_from_model(model, example)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, "returned Tensor; expected a tuple with one tensor of logits"),
        (lambda x: {"logits": x}, "returned dict; expected a tuple"),
        (lambda x: (), "returned tuple; expected a tuple with one tensor"),
        (lambda x: (x, None), "returned tuple of NoneType; expected a tuple with one tensor"),
        (lambda x: (x, x[:, None]), r"exit 2 of Returns is \(4, 1, 3\) for 4 rows; expected \(4, classes\)"),
        (lambda x: x.nothing, "running Returns on its example inputs: 'Tensor' object has no attribute 'nothing'"),
    ],
)
def test_wrong_answers(answer: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        graph_from_model(Returns(answer), Example({"x": models.waves(4, 6)}))


def test_what_torch_refuses_is_said_in_short() -> None:
    example = Example({"x": models.waves(4, 6)})
    with pytest.raises(CaptureError) as caught:
        graph_from_model(Returns(lambda x: (x * (2 if x.sum() > 0 else 3),)), example)
    text = str(caught.value)
    assert text.startswith("capturing Returns: torch.onnx.export failed: ")
    assert len(text) < 800
    assert "\x1b" not in text
    assert "Next steps" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": {}}, "expected torch tensors"),
        ({"inputs": {"x": [1, 2]}}, "got inputs {'x': 'list'}; expected torch tensors"),
        ({"inputs": {"x": models.waves(2, 6).bfloat16()}}, "input 'x' is torch.bfloat16"),
        ({"inputs": {"x": models.waves(1, 6)}}, "at least 2"),
        ({"inputs": {"x": models.waves(2, 6), "y": models.waves(3, 6)}}, "the same number everywhere"),
        ({"dynamic": {"z": {1: "sequence"}}}, "dynamic or masks name z; inputs are x"),
        ({"masks": ("z",)}, "dynamic or masks name z"),
        ({"dynamic": {"x": {0: "batch"}}}, "dynamic axis 0 of 'x' is called 'batch'; expected an axis from 1 to 1"),
        ({"dynamic": {"x": {2: "sequence"}}}, "dynamic axis 2 of 'x'"),
        ({"dynamic": {"x": {1: "rows"}}}, "another name than 'rows'"),
        ({"dynamic": SEQUENCE}, r"`dynamic` names dimensions sequence, `ranges` has \(none\)"),
        ({"ranges": {"sequence": (1, 9)}}, "`ranges` has sequence; expected the same"),
        ({"dynamic": SEQUENCE, "ranges": {"sequence": (8, 9)}}, "range 8 to 9 and length 6"),
        ({"dynamic": SEQUENCE, "ranges": {"sequence": (0, 9)}}, "expected 1 <= low"),
        ({"max_rows": 0}, "dimension 'rows' has range 1 to 0"),
    ],
)
def test_examples_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Example(**({"inputs": {"x": models.waves(2, 6)}} | arguments))


def test_two_lengths_under_one_name() -> None:
    inputs = {"x": models.waves(2, 6), "y": models.waves(2, 5)}
    with pytest.raises(OptionError, match="dimension 'n' is 6 and, in 'y', 5"):
        Example(inputs, {"x": {1: "n"}, "y": {1: "n"}}, {"n": (1, 9)})


def test_default_opset_has_no_attention_operator() -> None:
    assert DEFAULT_OPSET < 23
