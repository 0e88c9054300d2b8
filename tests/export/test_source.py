"""Sources: what a stranger's ONNX file or factory may look like, and what is said about one that cannot be taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from offramp.bundle import DimensionSpec
from offramp.errors import CaptureError, CutError, OptionError
from offramp.export.capture import DEFAULT_OPSET
from offramp.export.source import source_from_factory, source_from_onnx
from tests.export import graphs

EXITS = ("a", "b")


def saved(graph: ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(graph, path)
    return path


def test_dimensions_called_rows_give_way_to_the_row_axis(tmp_path) -> None:
    ranges = {"x_2": DimensionSpec(7, 70), "cols": DimensionSpec(7, 70)}
    source = source_from_onnx(saved(graphs.image_with_rows(), tmp_path), EXITS, ranges, {})
    assert source.inputs[0].shape == ("rows", 4, "x_2", "cols")
    assert source.example["x"].shape == (8, 4, 64, 64)
    assert source.dimensions == ranges | {"rows": DimensionSpec(1, 32)}


def test_dimensions_without_a_name_get_one(tmp_path) -> None:
    graph = graphs.reads_shape_of_lost_tensor()
    for dim in graph.graph.input[0].type.tensor_type.shape.dim[:2]:
        dim.ClearField("dim_param")
    source = source_from_onnx(saved(graph, tmp_path), ("logits_a", "logits_b"), {}, {})
    assert source.inputs[0].shape == ("rows", "x_1", 3)


def test_weights_beside_the_file_are_read(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graphs.stacked(), path, save_as_external_data=True, location="weights", size_threshold=0)
    source = source_from_onnx(path, EXITS, {}, {})
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in source.graph.graph.initializer)


def with_first_dimension(size: int | str, position: int = 0) -> ModelProto:
    graph = graphs.routed()
    dim = graph.graph.input[position].type.tensor_type.shape.dim[0]
    if isinstance(size, int):
        dim.dim_value = size
    else:
        dim.dim_param = size
    return graph


def with_row_name_elsewhere() -> ModelProto:
    graph = graphs.longest_row()
    graph.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "time"
    return graph


def with_strings() -> ModelProto:
    graph = graphs.stacked()
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    del graph.graph.node[:]
    return graph


def test_two_names_for_the_batch_are_one(tmp_path) -> None:
    source = source_from_onnx(saved(with_first_dimension("m", 1), tmp_path), EXITS, {}, {})
    assert [spec.shape[0] for spec in source.inputs] == ["rows", "rows"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_first_dimension(8), "input 'x' has a first dimension fixed at 8"),
        (with_row_name_elsewhere, "dimension 'time' is axis 1 of input 'x' and axis 0 of another"),
    ],
)
def test_axis_0_must_hold_the_rows(tmp_path, make, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        source_from_onnx(saved(make(), tmp_path), EXITS, {}, {})


def test_strings_are_refused(tmp_path) -> None:
    graph = with_strings()
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises((CaptureError, CutError)):
        source_from_onnx(path, EXITS, {}, {})


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"y": np.ones((3, 4), np.float32)}, "got y; expected x"),
        ({"x": np.ones((3, 4))}, r"input 'x' is float64 \(3, 4\); expected float32 \(rows, 4\)"),
        ({"x": np.ones((3, 5), np.float32)}, r"is float32 \(3, 5\); expected"),
        ({"x": np.ones((0, 4), np.float32)}, r"is float32 \(0, 4\); expected"),
    ],
)
def test_example_data_must_fit(tmp_path, example, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        source_from_onnx(saved(graphs.stacked(), tmp_path), EXITS, {}, example)


def test_options_that_name_nothing(tmp_path) -> None:
    path = saved(graphs.stacked(), tmp_path)
    with pytest.raises(OptionError, match="pass `--exits"):
        source_from_onnx(path, (), {}, {})
    with pytest.raises(OptionError, match=r"has no dimension time beside the rows; its dimensions are \(none\)"):
        source_from_onnx(path, EXITS, {"time": DimensionSpec(1, 2)}, {})


def test_file_that_is_no_model(tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(CutError, match="expected a valid ONNX model"):
        source_from_onnx(tmp_path / "model.onnx", EXITS, {}, {})
    with pytest.raises(CutError, match=r"missing\.onnx"):
        source_from_onnx(tmp_path / "missing.onnx", EXITS, {}, {})


def test_factory() -> None:
    source = source_from_factory("tests.export.models:shared_weights", DEFAULT_OPSET, ("logits_1", "logits_3"))
    assert (source.name, source.exits) == ("shared_weights", ("logits_1", "logits_3"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tests.export.models:nothing", "expected package.module:factory"),
        ("no.such.module:factory", "expected package.module:factory"),
        (":factory", "expected package.module:factory"),
        ("tests.export.models", "expected package.module:factory"),
        ("tests.export.models:DEFAULT", "expected package.module:factory"),
        ("tests.export.graphs:stacked", r"returned ModelProto; expected a pair \(nn.Module"),
    ],
)
def test_wrong_factories(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        source_from_factory(spec, DEFAULT_OPSET)
