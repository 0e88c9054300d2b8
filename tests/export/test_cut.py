"""The cut on graphs that are not the demo's: the chain equals the whole, and nothing dearer than needed is carried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from onnx import ModelProto
from torch import nn

from offramp.bundle import ROWS, DimensionSpec
from offramp.errors import CaptureError, CutError
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.chain import Arrays, Chain, open_session
from offramp.export.cut import CutModel, segments_from_graph
from offramp.export.sizes import resize_inputs
from offramp.export.source import ModelSource, source_from_model, source_from_onnx
from tests.export import graphs, models

FUSION_ATOL = 1e-6  # docs/tolerances.md: fusions that see one side of a cut only

FACTORIES: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "residual CNN": models.residual_cnn,
    "two streams": models.two_streams,
    "shared weights": models.shared_weights,
    "pruned BERT": models.pruned_bert,
    "time first": models.time_major,
    "strided CNN": models.strided_cnn,
    "odd outputs": models.odd_outputs,
}
GRAPHS: dict[str, tuple[Callable[[], ModelProto], tuple[str, ...]]] = {
    "odd names": (graphs.odd_names, ("exit one", "Exit/2")),
    "odd names, opset 11": (lambda: graphs.odd_names(11), ("exit one", "Exit/2")),
    "stacked": (graphs.stacked, ("a", "b")),
    "lost shape": (graphs.reads_shape_of_lost_tensor, ("logits_a", "logits_b")),
    "names taken": (graphs.names_taken, ("a", "b")),
    "branch": (graphs.branch_on_constant, ("a", "b")),
    "loop": (graphs.loop_that_shadows, ("a", "b")),
    "local function": (graphs.local_function, ("a", "b")),
    "initializer as input": (graphs.initializer_as_input, ("a", "b")),
    "routed": (graphs.routed, ("a", "b")),
}


@dataclass(frozen=True)
class Cut:
    source: ModelSource
    model: CutModel

    def inputs(self, rows: int, length: int) -> Arrays:
        size = {symbol: min(max(length, limits.min), limits.max) for symbol, limits in self.source.dimensions.items()}
        return resize_inputs(self.source.inputs, self.source.example, {**size, ROWS: rows})


def cut_source(source: ModelSource) -> Cut:
    model = segments_from_graph(source.graph, source.exits, source.inputs, source.dimensions, source.example)
    return Cut(source, model)


def source_from_graph(graph: ModelProto, exits: tuple[str, ...], tmp_path) -> ModelSource:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    return source_from_onnx(path, exits, {}, {})


@pytest.fixture(scope="module")
def cuts(tmp_path_factory) -> dict[str, Cut]:
    made = {name: cut_source(source_from_model("m", *make(), DEFAULT_OPSET)) for name, make in FACTORIES.items()}
    for name, (make, exits) in GRAPHS.items():
        made[name] = cut_source(source_from_graph(make(), exits, tmp_path_factory.mktemp("graph")))
    return made


def chain_of(cut: Cut) -> Chain:
    return Chain.open(cut.model.segments, [segment.model for segment in cut.model.segments])


@pytest.mark.parametrize("name", [*FACTORIES, *GRAPHS])
@pytest.mark.parametrize(("rows", "length"), [(1, 4), (3, 17), (8, 40)])
def test_chain_equals_whole(cuts: dict[str, Cut], name: str, rows: int, length: int) -> None:
    cut = cuts[name]
    inputs = cut.inputs(rows, length)
    whole = open_session(cut.source.graph).run(list(cut.source.exits), inputs)
    for (_, out), expected in zip(chain_of(cut).run(inputs), whole, strict=True):
        np.testing.assert_allclose(out["logits"], expected, rtol=0, atol=FUSION_ATOL)
        np.testing.assert_array_equal(out["prediction"], expected.argmax(1))
        assert out["logits"].dtype == np.float32


@pytest.mark.parametrize("name", [*FACTORIES, *GRAPHS])
def test_survivors_do_not_notice_who_left(cuts: dict[str, Cut], name: str) -> None:
    cut = cuts[name]
    inputs = cut.inputs(7, 12)
    whole = open_session(cut.source.graph).run(list(cut.source.exits), inputs)
    live = np.arange(7)
    chosen = {0: np.array([6, 2, 3]), 1: np.array([1])}
    for index, (_, out) in enumerate(chain_of(cut).run(inputs, lambda index, _: chosen[index])):
        np.testing.assert_allclose(out["logits"], whole[index][live], rtol=0, atol=FUSION_ATOL)
        live = live[chosen[index]] if index in chosen else live


def test_carry_of_two_streams_is_both(cuts: dict[str, Cut]) -> None:
    first, second, last = cuts["two streams"].model.segments
    assert [len(spec.shape) for spec in first.carry_out] == [2, 2]
    assert {spec.shape[1] for spec in second.carry_out} == {8, 5}
    assert last.carry_out == ()


def test_residual_cut_carries_both_sides_of_the_skip(cuts: dict[str, Cut]) -> None:
    first = cuts["residual CNN"].model.segments[0]
    assert [spec.shape for spec in first.carry_out] == [(ROWS, 4, 8, 8), (ROWS, 4, 8, 8)]


def test_time_first_is_carried_with_rows_first(cuts: dict[str, Cut]) -> None:
    first, last = cuts["time first"].model.segments
    assert [spec.shape for spec in first.carry_out] == [(ROWS, 4, 6)]
    assert [node.op_type for node in last.model.graph.node[:2]] == ["Gather", "Transpose"]


def test_height_and_width_are_never_taken_for_each_other(cuts: dict[str, Cut]) -> None:
    cut = cuts["strided CNN"]
    ((_, _, height, width),) = [spec.shape for spec in cut.model.segments[0].carry_out]
    assert isinstance(height, str)
    assert isinstance(width, str)
    assert height != width
    assert {height, width} == cut.model.derived.keys()


def test_input_read_late_is_carried_and_one_nobody_reads_is_not(cuts: dict[str, Cut]) -> None:
    first, second, _ = cuts["odd outputs"].model.segments
    assert [spec.shape[1] for spec in first.carry_out] == [8, 3, 3], "hidden state, first logits, late input"
    assert [spec.shape[1] for spec in second.carry_out] == [8, 3]


def test_what_values_decide_is_rebuilt_and_never_read_off_a_shape(tmp_path) -> None:
    """Every flag of the example is positive, so the chosen rows look like all rows; at run time they are fewer."""
    path = tmp_path / "routed.onnx"
    path.write_bytes(graphs.routed().SerializeToString())
    example = {"x": models.waves(6, 4).numpy(), "flag": np.arange(1, 7, dtype=np.float32)}
    cut = cut_source(source_from_onnx(path, ("a", "b"), {}, example))
    inputs = {"x": example["x"], "flag": np.array([1, -1, 1, -1, -1, 1], np.float32)}
    whole = open_session(cut.source.graph).run(["a", "b"], inputs)
    live = np.array([5, 1, 0])
    (_, first), (_, second) = chain_of(cut).run(inputs, lambda *_: live)
    np.testing.assert_allclose(first["logits"], whole[0], rtol=0, atol=FUSION_ATOL)
    np.testing.assert_allclose(second["logits"], whole[1][live], rtol=0, atol=FUSION_ATOL)


def test_shared_weights_stand_in_every_segment(cuts: dict[str, Cut]) -> None:
    for segment in cuts["shared weights"].model.segments:
        shapes = [tuple(tensor.dims) for tensor in segment.model.graph.initializer]
        assert (6, 6) in shapes
    assert all(len(segment.carry_out) == 1 for segment in cuts["shared weights"].model.segments[:-1])


def test_pruned_hidden_state_is_carried_short_and_masks_narrow(cuts: dict[str, Cut]) -> None:
    cut = cuts["pruned BERT"]
    _, second, last = cut.model.segments
    assert all(spec.dtype == "int64" for spec in second.carry_out if len(spec.shape) == 2), (
        "a broadcast mask is never carried"
    )
    (hidden,) = [spec for spec in second.carry_out if len(spec.shape) == 3]
    assert isinstance(hidden.shape[1], str)
    assert hidden.shape[1] in cut.model.derived
    outputs = [out for _, out in chain_of(cut).run(cut.inputs(3, 20))]
    assert outputs[1][hidden.name].shape == (3, 15, 16)  # 1 + ceil(0.7 x 19) tokens after the first pruning
    assert last.carry_out == ()


def test_gather_is_the_first_operator_of_later_segments(cuts: dict[str, Cut]) -> None:
    for cut in cuts.values():
        for segment in cut.model.segments[1:]:
            first = segment.model.graph.node[: len(segment.carry_in)]
            assert [node.op_type for node in first] == ["Gather"] * len(segment.carry_in)
            assert all(node.input[1] == ROWS for node in first)


def test_shape_of_a_tensor_left_behind_is_read_off_the_carry(cuts: dict[str, Cut]) -> None:
    segment = cuts["lost shape"].model.segments[1]
    assert [spec.shape[2] for spec in segment.carry_in] == [2], "only the narrow tensor is carried"
    shapes = [node.input[0] for node in segment.model.graph.node if node.op_type == "Shape"]
    assert "wide" not in shapes


def test_learned_layers_never_run_twice(cuts: dict[str, Cut]) -> None:
    for cut in cuts.values():
        for segment in cut.model.segments:
            assert not [operator for operator in segment.rerun if operator.split()[0] in ("MatMul", "Gemm", "Conv")]


BAD: dict[str, tuple[Callable[[], ModelProto], tuple[str, ...], type[Exception], str]] = {
    "fixed batch": (graphs.fixed_batch, ("a", "b"), CaptureError, "runs with 2 rows and not with 3"),
    "random": (graphs.random_noise, ("a",), CutError, "'noise' draws random numbers"),
    "unknown operator": (graphs.unknown_operator, ("a", "b"), CutError, "Mystery"),
    "constant exit": (graphs.constant_exit, ("a", "b"), CutError, "exit 'b' is not computed from any input"),
    "unknown exit": (graphs.constant_exit, ("a", "z"), CutError, "unknown exit z: the graph's outputs are a, b"),
    "wrong order": (graphs.stacked, ("b", "a"), CutError, "'a' adds nothing to exit 'b'"),
    "twice": (graphs.odd_names, ("Exit/2", "Exit/2"), CutError, "each once"),
    "dropout": (graphs.training_dropout, ("a", "b"), CutError, "Dropout 'drop' is in training mode"),
    "batch norm": (graphs.training_batch_norm, ("a", "b"), CutError, "'norm' is in training mode"),
    "random inside": (
        lambda: graphs.branch_on_constant("RandomNormalLike"),
        ("a", "b"),
        CutError,
        "RandomNormalLike making 'p' draws random numbers",
    ),
    "branch on values": (
        graphs.branch_on_values,
        ("a", "b"),
        CutError,
        "takes its branch by values of the whole batch",
    ),
    "branch on rows": (graphs.branch_on_rows, ("a", "b"), CutError, "changes with the other rows of its batch"),
    "longest row": (graphs.longest_row, ("a", "b"), CutError, "changes with the other rows of its batch"),
    "sparse": (graphs.sparse_weight, ("a", "b"), CutError, "weights sparse are sparse_initializers"),
    "old opset": (lambda: graphs.odd_names(10), ("exit one",), CutError, "opset 10, expected at least 11"),
}


@pytest.mark.parametrize("name", BAD)
def test_graphs_that_cannot_be_cut(tmp_path, name: str) -> None:
    make, exits, error, message = BAD[name]
    with pytest.raises(error, match=message.replace("(", r"\(")):
        cut_source(source_from_graph(make(), exits, tmp_path))


def test_rows_folded_into_windows_are_refused_with_the_tensor_named() -> None:
    source = source_from_model("m", *models.windowed(), DEFAULT_OPSET)
    with pytest.raises(
        CutError, match=r"after exit 'logits_1' would carry '\w+' of shape \(dim_\d, 2, 6\), where no axis is the row"
    ):
        cut_source(source)


def test_exits_that_are_no_logits_of_the_same_classes_are_refused(tmp_path) -> None:
    graph = graphs.stacked()
    graph.graph.initializer[1].CopyFrom(graphs.weight("w2", 3, 1))
    graph.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 1
    with pytest.raises(CutError, match=r"exit 'b' is float32 of shape \(rows, 1\).*binary exit needs two logits"):
        cut_source(source_from_graph(graph, ("a", "b"), tmp_path))
    graph.graph.initializer[1].CopyFrom(graphs.weight("w2", 3, 2))
    graph.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 2
    with pytest.raises(CutError, match="different numbers of classes: a 3, b 2"):
        cut_source(source_from_graph(graph, ("a", "b"), tmp_path))


def test_rows_that_are_all_the_same_show_nothing(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graphs.stacked().SerializeToString())
    source = source_from_onnx(path, ("a", "b"), {}, {"x": np.zeros((4, 4), np.float32)})
    with pytest.raises(CaptureError, match="all rows of the example are the same"):
        cut_source(source)


def test_exit_that_mixes_rows_is_refused() -> None:
    source = source_from_model("m", *models.batch_normalised(), DEFAULT_OPSET)
    with pytest.raises(CutError, match="changes with the other rows of its batch"):
        cut_source(source)


def test_dimension_declared_dynamic_but_fixed_is_refused() -> None:
    model, example = models.two_streams()
    source = source_from_model("m", model, example, DEFAULT_OPSET)
    inputs = tuple(
        spec if spec.name != "first" else type(spec)("first", spec.dtype, (ROWS, "width"), None, None, False)
        for spec in source.inputs
    )
    with pytest.raises(
        CaptureError, match="dimension 'width' of first is declared dynamic but the graph runs at 8 and not"
    ):
        segments_from_graph(source.graph, source.exits, inputs, {"width": DimensionSpec(4, 32)}, source.example)
