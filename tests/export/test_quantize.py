"""INT8 lowering: what is quantized and what is not, against plain numpy, and answers that are a row's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from offramp.errors import OptionError
from offramp.export.build_engine import BuildOptions
from offramp.export.capture import DEFAULT_OPSET
from offramp.export.chain import open_session
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.graph import weight_share
from offramp.export.quantize import Quantized, int8_from_segment, products_from_graph
from offramp.export.source import source_from_onnx
from offramp.policy import Policy
from offramp.runtime import Runner

K, N = 128, 160


def waves(*shape: int, phase: float = 0.0) -> np.ndarray:
    """Fixed, non-random values in [-1, 1], the rows of a matrix independent."""
    return np.sin(np.arange(np.prod(shape)) ** 2 * 0.37 + phase).reshape(shape).astype(np.float32)


def model_from_nodes(nodes: list[onnx.NodeProto], output_width: int = N, **arrays: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "segment_00",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "sequence", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "sequence", output_width])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def linear(**arrays: np.ndarray) -> ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], "product"), helper.make_node("Add", ["b", "p"], ["y"])]
    return model_from_nodes(nodes, **{"w": waves(K, N), "b": waves(N), **arrays})


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    return open_session(model).run(["y"], {"x": x})[0]


def lowered(model: ModelProto, *xs: np.ndarray) -> Quantized:
    return int8_from_segment(model, [{"x": x} for x in xs])


def test_product_and_bias_are_what_numpy_says() -> None:
    x = waves(3, 5, K, phase=1)
    found = lowered(linear(), x)
    assert found.treatments == {"x": "plain"}
    assert operators(found.model) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    low, high = x.min(), x.max()
    scale = np.float32((float(high) - float(low)) / 255)
    zero = np.rint(-low / scale)
    activation = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    scales = np.abs(waves(K, N)).max(0) / 127
    weights = np.rint(waves(K, N) / scales)
    np.testing.assert_allclose(run(found.model, x), activation @ weights * scale * scales + waves(N), atol=1e-4)


def test_values_beyond_those_seen_are_clipped() -> None:
    x = waves(1, 4, K)
    found = lowered(linear(), x)
    np.testing.assert_allclose(run(found.model, x * 50), run(found.model, np.clip(x * 50, x.min(), x.max())), atol=0.3)


def test_one_activation_is_quantized_once_for_all_that_read_it() -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"p{i}"]) for i in range(3)]
    nodes += [helper.make_node("Sum", ["p0", "p1", "p2"], ["y"])]
    found = lowered(model_from_nodes(nodes, **{f"w{i}": waves(K, N, phase=i) for i in range(3)}), waves(2, 3, K))
    assert operators(found.model).count("QuantizeLinear") == 1
    assert operators(found.model).count("MatMulIntegerToFloat") == 3
    assert {t.data_type for t in found.model.graph.initializer if t.dims and t.name.endswith("weights")} == {
        TensorProto.INT8
    }
    assert weight_share(found.model, TensorProto.INT8) > 0.95


def test_gemm_in_every_form() -> None:
    def graph(**options: object) -> ModelProto:
        weights = waves(K, N).T if options.get("transB") else waves(K, N)
        nodes = [
            helper.make_node("Reshape", ["x", "flat"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "b"], ["g"], **options),
            helper.make_node("Reshape", ["g", "deep"], ["y"]),
        ]
        shapes = {"flat": np.array([-1, K]), "deep": np.array([-1, 5, N])}
        return model_from_nodes(nodes, w=np.ascontiguousarray(weights), b=waves(1, N), **shapes)

    x = waves(3, 5, K, phase=1)
    for options in ({}, {"transB": 1}):
        found = lowered(graph(**options), x)
        assert operators(found.model) == ["Reshape", "QuantizeLinear", "MatMulIntegerToFloat", "Reshape"]
        np.testing.assert_array_equal(run(found.model, x), run(lowered(linear(), x).model, x))
    for options in ({"alpha": 0.5}, {"beta": 2.0}):
        assert products_from_graph(graph(**options)) == []


@pytest.mark.parametrize("reason", ["small", "two readers", "is an output", "bias of another shape", "not finite"])
def test_what_is_left_as_it_is(reason: str) -> None:
    model = linear()
    if reason == "small":
        model = linear(w=waves(K, 2), b=waves(2))
        assert products_from_graph(model) == []
        return
    if reason == "not finite":
        assert products_from_graph(linear(w=np.full((K, N), np.inf, np.float32))) == []
        return
    if reason == "two readers":
        model.graph.node.append(helper.make_node("Abs", ["p"], ["other"]))
    elif reason == "is an output":
        model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["rows", "sequence", N]))
    else:
        model = linear(b=waves(5, 1))
    [product] = products_from_graph(model)
    assert (product.bias, product.output) == (None, "p")
    found = lowered(model, waves(2, 5, K))
    assert "Add" in operators(found.model)
    np.testing.assert_allclose(run(found.model, waves(2, 5, K)), run(model, waves(2, 5, K)), atol=0.3)


def test_an_outlier_channel_is_levelled_and_costs_no_accuracy() -> None:
    x = waves(4, 6, K, phase=2)
    x[..., 7] *= 200
    weights = waves(K, N)
    weights[7] /= 200
    model = linear(w=weights)
    found = lowered(model, x)
    assert found.treatments == {"x": "levelled"}
    assert operators(found.model) == ["Mul", "QuantizeLinear", "MatMulIntegerToFloat"]
    assert np.abs(run(found.model, x) - run(model, x)).max() < 0.3
    assert found.unusual == {"x": "levelled"}


def test_what_no_levelling_helps_stays_in_fp32() -> None:
    """Every channel swings between tiny and huge, and the answer is the tiny part: 8 bits cannot hold both."""
    x = np.tile(waves(1, 1, K), (2, 4, 1))
    x[:, 0] *= 10_000
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Clip", ["p", "low", "high"], ["c"]),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    model = model_from_nodes(nodes, w=waves(K, N), low=np.float32(-5), high=np.float32(5))
    found = lowered(model, x)
    assert found.treatments == {"x": "fp32"}
    assert operators(found.model) == operators(model)
    np.testing.assert_array_equal(run(found.model, x), run(model, x))


def test_same_bytes_every_time() -> None:
    contents = {
        hashlib.sha256(lowered(linear(), waves(3, 5, K)).model.SerializeToString(deterministic=True)).hexdigest()
        for _ in range(3)
    }
    assert len(contents) == 1


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(9)), size=st.integers(1, 9), padding=st.integers(0, 6))
def test_a_rows_answer_is_its_own(order: list[int], size: int, padding: int) -> None:
    """In any batch and order, and with any padding behind it: the same bits."""
    x = waves(9, 5, K, phase=3)
    session = open_session(_SHARED)
    alone = [session.run(["y"], {"x": x[row : row + 1]})[0][0] for row in range(9)]
    for start in range(0, 9, size):
        rows = order[start : start + size]
        padded = np.pad(x[rows], ((0, 0), (0, padding), (0, 0)), constant_values=0.25)
        got = session.run(["y"], {"x": padded})[0][:, :5]
        np.testing.assert_array_equal(got, np.stack([alone[row] for row in rows]))


_SHARED = lowered(linear(), waves(9, 5, K)).model


def two_exits(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["p1"]),
        helper.make_node("Relu", ["p1"], ["h1"]),
        helper.make_node("MatMul", ["h1", "head"], ["a"]),
        helper.make_node("MatMul", ["h1", "w2"], ["p2"]),
        helper.make_node("Relu", ["p2"], ["h2"]),
        helper.make_node("MatMul", ["h2", "head"], ["b"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 3]) for name in "ab"],
        [
            numpy_helper.from_array(array, name)
            for name, array in {
                "w1": waves(K, K) / 10,
                "w2": waves(K, K, phase=1) / 10,
                "head": waves(K, 3) / 10,
            }.items()
        ],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", DEFAULT_OPSET)], ir_version=10), path)
    return path


def test_a_bundle_in_all_precisions(tmp_path: Path) -> None:
    rows = waves(40, K, phase=5)
    source = source_from_onnx(two_exits(tmp_path), ("a", "b"), {}, {"x": rows})
    steps: list[str] = []
    manifest = export_bundle(source, tmp_path / "bundle", ExportOptions("fp16,int8"), steps.append)
    assert [set(segment.graphs) for segment in manifest.segments] == [{"fp32", "fp16", "int8"}] * 2
    assert steps.index("verifying FP16") < steps.index("lowering segment 0 to INT8") < steps.index("verifying INT8")
    assert any(step.startswith("segment 01, activation 1 of 1: plain, error 0.0") for step in steps)
    assert len(manifest.parity["int8_segments"]) == len(manifest.parity["fp16_segments"]) == 2
    assert manifest.parity["int8_weight_share"][0] > 0.9
    assert 0 < manifest.parity["int8_chain"]["rms"] < 0.05
    with (
        Runner.open(tmp_path / "bundle", policy=Policy.full_depth()) as fp32,
        Runner.open(tmp_path / "bundle", policy=Policy.full_depth(), precision="int8") as int8,
    ):
        assert (fp32.precision, int8.precision) == ("fp32", "int8"), "INT8 only where it is asked for"
        exact, rounded = (runner.run({"x": rows}).outputs["logits"] for runner in (fp32, int8))
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_int8_is_for_cpus() -> None:
    with pytest.raises(OptionError, match="for ONNX Runtime on CPUs"):
        BuildOptions(precision="int8")
