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
from offramp.export.probe import resize_inputs
from offramp.export.source import ModelSource, source_from_model, source_from_onnx
from tests.export import graphs, models

FUSION_ATOL = 1e-6  # docs/tolerances.md: fusions that see one side of a cut only

FACTORIES: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "residual CNN": models.residual_cnn,
    "two streams": models.two_streams,
    "shared weights": models.shared_weights,
    "pruned BERT": models.pruned_bert,
}
GRAPHS: dict[str, tuple[Callable[[], ModelProto], tuple[str, ...]]] = {
    "odd names": (graphs.odd_names, ("exit one", "Exit/2")),
    "odd names, opset 11": (lambda: graphs.odd_names(11), ("exit one", "Exit/2")),
    "stacked": (graphs.stacked, ("a", "b")),
    "lost shape": (graphs.reads_shape_of_lost_tensor, ("logits_a", "logits_b")),
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
    "fixed batch": (graphs.fixed_batch, ("a", "b"), CaptureError, "runs with 2 rows and not with 5"),
    "random": (graphs.random_noise, ("a",), CutError, "'noise' draws random numbers"),
    "unknown operator": (graphs.unknown_operator, ("a", "b"), CutError, "Mystery"),
    "constant exit": (graphs.constant_exit, ("a", "b"), CutError, "exit 'b' does not depend on any input"),
    "unknown exit": (graphs.constant_exit, ("a", "z"), CutError, "unknown exit z: the graph's outputs are a, b"),
    "wrong order": (graphs.stacked, ("b", "a"), CutError, "'a' adds nothing to exit 'b'"),
    "twice": (graphs.odd_names, ("Exit/2", "Exit/2"), CutError, "each once"),
    "old opset": (lambda: graphs.odd_names(10), ("exit one",), CutError, "opset 10, expected at least 11"),
}


@pytest.mark.parametrize("name", BAD)
def test_graphs_that_cannot_be_cut(tmp_path, name: str) -> None:
    make, exits, error, message = BAD[name]
    with pytest.raises(error, match=message.replace("(", r"\(")):
        cut_source(source_from_graph(make(), exits, tmp_path))


def test_time_first_is_refused_with_the_tensor_named() -> None:
    source = source_from_model("m", *models.time_major(), DEFAULT_OPSET)
    with pytest.raises(
        CutError, match=r"would carry '\w+' of shape \(4, rows, 6\), whose first axis is not the row axis"
    ):
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
