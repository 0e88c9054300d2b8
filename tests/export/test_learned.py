"""Learned confidences from the model to the decision: captured, cut, lowered, recorded, calibrated, answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

from offramp.bundle import load_manifest, replace_policy
from offramp.cli import main
from offramp.commands.verification import verify_bundle
from offramp.errors import CaptureError, CutError, DataError, OptionError
from offramp.export.capture import DEFAULT_OPSET, Example, graph_from_model
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import ModelSource, source_from_model, source_from_onnx
from offramp.policy import LEARNED, Policy
from offramp.runtime import Runner
from offramp.tuning.calibrate import CalibrateOptions, calibrate
from offramp.tuning.replay import replay
from tests.export import graphs, models

FP32 = ExportOptions(precision="fp32")
FP16_ATOL = 5e-3  # as in test_export_bundle
WHICH = {"all": (True, True, True), "early": (True, True, False), "none": (False, False, False)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """One bundle per kind of model; the first has FP16, too."""
    folder = tmp_path_factory.mktemp("learned")
    for name, which in WHICH.items():
        source = source_from_model(name, *models.confident(which), DEFAULT_OPSET)
        export_bundle(source, folder / name, ExportOptions() if name == "all" else FP32)
    return {name: folder / name for name in WHICH}


def expected(which: tuple[bool, ...], features: np.ndarray) -> np.ndarray:
    """What torch says: the learned confidences (N, E), NaN for exits without."""
    model, _ = models.confident(which)
    with torch.no_grad():
        exits = model(torch.from_numpy(features))
    missing = torch.full((len(features),), torch.nan)
    return torch.stack([missing if isinstance(said, Tensor) else said.learned.reshape(-1) for said in exits], 1).numpy()


@pytest.mark.parametrize("name", WHICH)
def test_from_the_model_to_the_decision(bundles: dict[str, Path], name: str) -> None:
    bundle, which = bundles[name], WHICH[name]
    features = models.waves(40, 6).numpy()
    assert tuple(bool(spec.learned) for spec in load_manifest(bundle).exits) == which
    assert verify_bundle(bundle).chain_bit_equal
    with Runner.open(bundle) as runner:
        trace = runner.record([{"features": features[:23]}, {"features": features[23:]}])
        if name == "none":
            assert trace.learned.shape == (40, 0)
            with pytest.raises(DataError, match="no exit before the final one has a learned confidence"):
                calibrate(trace, CalibrateOptions(LEARNED, 0.2, "full_depth"))
            with pytest.raises(OptionError, match=r"'learned' at exits 0; .* confidence at exits \(none\)"):
                runner.policy = Policy.thresholds(LEARNED, [0.5, None])
            return
        np.testing.assert_allclose(trace.learned, expected(which, features), atol=1e-6)
        policy = calibrate(trace, CalibrateOptions(LEARNED, 0.2, "full_depth")).policy
        assert policy.score == LEARNED
        runner.policy = policy
        result = runner.run({"features": features})
        decided = replay(policy, trace)
        assert len(set(result.exit_index.tolist())) > 1, "some leave and some go on"
        np.testing.assert_array_equal(result.exit_index, decided.exit_index)
        np.testing.assert_array_equal(result.score, trace.learned[np.arange(40), result.exit_index])
        assert np.isnan(result.score[result.exit_index == 2]).all() == (not which[2])
        for row in range(40):
            alone = runner.run({"features": features[row : row + 1]})
            np.testing.assert_array_equal(alone.score, result.score[row : row + 1])
            assert alone.exit_index[0] == result.exit_index[row]


def test_fp16_keeps_the_confidence_in_fp32_and_near(bundles: dict[str, Path]) -> None:
    features = models.waves(16, 6).numpy()
    graph = onnx.load(bundles["all"] / "segments/00/model.fp16.onnx").graph
    assert {value.name: value.type.tensor_type.elem_type for value in graph.output}[LEARNED] == TensorProto.FLOAT
    assert any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer)
    with Runner.open(bundles["all"], precision="fp16") as runner:
        learned = runner.record([{"features": features}]).learned
    assert learned.dtype == np.float32
    np.testing.assert_allclose(learned, expected(WHICH["all"], features), atol=FP16_ATOL)
    figures = load_manifest(bundles["all"]).parity
    assert figures["rows"] == 24


def test_policies_are_refused_where_the_manifest_is_known(bundles: dict[str, Path], tmp_path: Path) -> None:
    """When it is opened, and when it is set; a closed exit needs no confidence, and neither does another score."""
    with pytest.raises(OptionError, match=r"at exits 0, 1; .*use another score"):
        Runner.open(bundles["none"], policy=Policy.thresholds(LEARNED, [0.5, 0.5]))
    nested = Policy(sources={"mail": Policy.thresholds(LEARNED, [0.5, 0.5])})
    with pytest.raises(OptionError, match="at exits 0, 1"):
        Runner.open(bundles["none"], policy=nested)
    with Runner.open(bundles["early"], policy=Policy.thresholds(LEARNED, [None, 0.5])) as runner:
        runner.policy = Policy.thresholds(LEARNED, [0.5, 0.5])
    with Runner.open(bundles["none"], policy=Policy.thresholds(LEARNED, [None, None])) as runner:
        runner.policy = Policy.thresholds("margin", [0.5, 0.5])
    source = source_from_model("copy", *models.confident(WHICH["none"]), DEFAULT_OPSET)
    export_bundle(source, tmp_path / "bundle", FP32)
    replace_policy(tmp_path / "bundle", Policy.thresholds(LEARNED, [0.5, 0.5]).to_json().encode())
    with pytest.raises(OptionError, match="at exits 0, 1"):
        Runner.open(tmp_path / "bundle")


def test_segments_of_a_model_without_confidences_are_what_they_were(bundles: dict[str, Path]) -> None:
    for name, which in WHICH.items():
        for k, has in enumerate(which):
            graph = onnx.load(bundles[name] / f"segments/{k:02d}/model.onnx").graph
            assert (LEARNED in {value.name for value in graph.output}) == has
            assert any("/learned" in node.name for node in graph.node) == has


def test_exits_chosen_take_their_confidences_with_them(tmp_path: Path) -> None:
    model, example = models.confident(WHICH["early"])
    source = source_from_model("chosen", model, example, DEFAULT_OPSET, ["logits_2", "logits_3"])
    assert source.row_outputs == {"logits_2": {"learned": "learned_2"}}
    manifest = export_bundle(source, tmp_path / "bundle", FP32)
    assert [spec.learned for spec in manifest.exits] == ["learned_2", ""]
    features = models.waves(7, 6).numpy()
    with Runner.open(tmp_path / "bundle") as runner:
        learned = runner.record([{"features": features}]).learned
    np.testing.assert_allclose(learned[:, 0], expected(WHICH["early"], features)[:, 1], atol=1e-6)


# --- graphs made elsewhere


def confident_graph() -> onnx.ModelProto:
    """Confidences with names in the contract's way: one is called `learned`, in FP16; one is a column out of range."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["a"]),
        helper.make_node("MatMul", ["h", "w3"], ["doubt"]),
        helper.make_node("Sigmoid", ["doubt"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Squeeze", ["half", "one"], ["learned"]),
        helper.make_node("Tanh", ["h"], ["h2"]),
        helper.make_node("MatMul", ["h2", "w2"], ["b"]),
        helper.make_node("Mul", ["wide", "slightly_more"], ["sure"]),
    ]
    constants = [graphs.constant("one", [1]), graphs.constant("slightly_more", 1.0005, np.float32)]
    weights = [graphs.weight("w1", 4, 4), graphs.weight("w2", 4, 3), graphs.weight("w3", 4, 1), *constants]
    outputs = {"a": ["batch", 3], "b": ["batch", 3], "sure": ["batch", 1]}
    model = graphs.model_of(nodes, {"x": ["batch", 4]}, outputs, weights)
    model.graph.output.append(helper.make_tensor_value_info("learned", TensorProto.FLOAT16, ["batch"]))
    return model


def from_onnx(tmp_path: Path, *learned: str) -> ModelSource:
    path = tmp_path / "graph.onnx"
    path.write_bytes(confident_graph().SerializeToString())
    return source_from_onnx(path, ("a", "b"), {}, {}, {"learned": learned})


def test_command_line_names_the_confidences_of_an_onnx_file(tmp_path: Path) -> None:
    from_onnx(tmp_path)
    bundle = str(tmp_path / "bundle")
    options = ["--exits", "a,b", "--learned", "learned,sure", "--precision", "fp32", "--json"]
    done = CliRunner().invoke(main, ["export", str(tmp_path / "graph.onnx"), "-o", bundle, *options])
    assert done.exit_code == 0, done.output
    exits = json.loads(done.stdout)["exits"]
    assert [spec["learned"] for spec in exits] == ["learned", "sure"]
    assert "learned confidence sure" in CliRunner().invoke(main, ["inspect", bundle]).output
    inputs = {"x": models.waves(32, 4).numpy() * 8}
    np.savez(tmp_path / "data.npz", **inputs)
    options = ["--data", str(tmp_path / "data.npz"), "--score", "learned", "--consistency", "--max-drop", "1"]
    done = CliRunner().invoke(main, ["calibrate", bundle, *options, "--json"])
    assert done.exit_code == 0, done.output
    with Runner.open(bundle) as runner:
        assert runner.policy.score == LEARNED
        result = runner.run(inputs)
        trace = runner.record([inputs])
    sigmoid = 1 / (1 + np.exp(-(inputs["x"] @ weights("w1") @ weights("w3"))[:, 0]))
    assert np.ptp(sigmoid) > 0.5
    np.testing.assert_allclose(trace.learned[:, 0], sigmoid, atol=1e-3)  # it is FP16 in the model
    np.testing.assert_allclose(trace.learned[:, 1], np.minimum(sigmoid * 1.0005, 1), atol=1e-6)
    assert set(result.reason) == {LEARNED}


def weights(name: str) -> np.ndarray:
    return onnx.numpy_helper.to_array(
        next(tensor for tensor in confident_graph().graph.initializer if tensor.name == name)
    )


@pytest.mark.parametrize(
    ("learned", "error", "message"),
    [
        (("-", "learned", "sure"), OptionError, "got 3 outputs for --learned and 2 exits"),
        (
            ("nothing",),
            CutError,
            "'nothing' is not computed by the graph; its outputs are a, b, sure",
        ),
        (("sure", "sure"), CutError, "with learned sure, learned sure, expected each output once"),
        (("b",), CutError, "with learned b, expected each output once"),
    ],
)
def test_names_that_make_no_sense(tmp_path, learned: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export_bundle(from_onnx(tmp_path, *learned), tmp_path / "bundle", FP32)


def test_a_dash_is_an_exit_without(tmp_path: Path) -> None:
    assert from_onnx(tmp_path, "-", "sure").row_outputs == {"b": {"learned": "sure"}}
    assert from_onnx(tmp_path).row_outputs == {}


def test_only_onnx_files_need_names(tmp_path: Path) -> None:
    options = ["--learned", "conf_1"]
    done = CliRunner().invoke(main, ["export", "tests.export.models:confident", "-o", str(tmp_path / "b"), *options])
    assert done.exit_code == 2
    assert "expected it for an .onnx file only" in done.output


# --- what is refused


class Returns(nn.Module):
    """Returns what `answer` makes of the two heads of a layer."""

    def __init__(self, answer: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(6, 4), answer

    def forward(self, x: Tensor) -> object:
        said = self.layer(x)
        return self.answer(said[:, :3], said[:, 3])


class Unknown(NamedTuple):
    logits: Tensor
    confidence: Tensor


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, y: models.Said(x, y), r"returned Said; expected a tuple"),
        (lambda x, y: (Unknown(x, y), x), r"returned tuple of Unknown\(logits, confidence\); expected a tuple"),
        (lambda x, y: (models.Said(x, x), x), r"exit 1 of Returns: its learned confidence is \(5, 3\) for 5 rows"),
        (lambda x, y: (x, models.Said(x, y[:2])), r"exit 2 of Returns: its learned confidence is \(2,\) for 5 rows"),
        (lambda x, y: (x, models.Said(x, 0.5)), r"returned tuple of Said\(logits, learned\); expected a tuple"),
    ],
)
def test_wrong_answers(answer: Callable[[Tensor, Tensor], object], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        graph_from_model(Returns(answer), Example({"x": models.waves(5, 6)}))


def test_named_tuples_without_confidence_are_logits() -> None:
    model = models.with_fixed_weights(Returns(lambda x, _: (models.Said(x, None), x * 2)))
    source = source_from_model("plain", model, Example({"x": models.waves(5, 6)}), DEFAULT_OPSET)
    assert (source.exits, source.row_outputs) == (("logits_1", "logits_2"), {})


@pytest.mark.parametrize(
    ("learned", "error", "message"),
    [
        (lambda y: y * 20, CaptureError, r"learned_1 of exit logits_1 is 5.*expected a probability in \[0, 1\]"),
        (lambda y: torch.sigmoid(y - y.mean(0)), CutError, "learned confidence 'learned_1'.*each of its row alone"),
        (lambda y: y.long(), CutError, "learned_1' of exit 'logits_1' is int64 of shape"),
    ],
)
def test_confidences_that_are_none(tmp_path, learned: Callable, error: type[Exception], message: str) -> None:
    model = models.with_fixed_weights(Returns(lambda x, y: (models.Said(x, learned(y)), x.tanh())))
    source = source_from_model("wrong", model, Example({"x": models.waves(5, 6)}), DEFAULT_OPSET)
    with pytest.raises(error, match=message):
        export_bundle(source, tmp_path / "bundle", FP32)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(
    limits=st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=2),
    patience=st.integers(0, 3),
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=40),
)
def test_replay_is_the_live_decision(bundles, limits: list[float | None], patience: int, rows: list[int]) -> None:
    inputs = {"features": models.waves(40, 6).numpy()[rows]}
    policy = Policy(LEARNED, tuple(limits), patience=patience)
    with Runner.open(bundles["early"], policy=policy) as runner:
        result, trace = runner.run(inputs), runner.record([inputs])
    decided = replay(policy, trace)
    np.testing.assert_array_equal(result.exit_index, decided.exit_index)
    assert result.reason == decided.reason.tolist()
