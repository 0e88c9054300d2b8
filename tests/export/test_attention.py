"""Attention as one operator: found where it is one, left alone where it is not, and the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper, shape_inference
from torch import nn
from transformers import BertConfig, BertModel

from offramp.bundle import load_manifest, read_file
from offramp.export import export_bundle as exporting
from offramp.export.attention import DOMAIN, expand_attention, fuse_attention, fused_from_segment
from offramp.export.build_engine import BuildOptions, build_engines
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.chain import Arrays, Chain, open_session
from offramp.export.cut import CutModel, segments_from_graph
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.export.tensorrt_builder import BuilderOptions
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from tests.export import models

# Queries of `t` tokens over keys of `s`: 2 heads of width 4, values of width 3.
BASE = """
attention (float[n, t, 5] x, float[n, s, 6] y, float[n, 1, 1, s] mask) => (float[n, t, 6] out) {
    q = MatMul (x, wq)
    k = MatMul (y, wk)
    v = MatMul (y, wv)
    q_heads = Reshape (q, to_4)
    k_heads = Reshape (k, to_4)
    v_heads = Reshape (v, to_3)
    queries = Transpose <perm = [0, 2, 1, 3]> (q_heads)
    keys = Transpose <perm = [0, 2, 3, 1]> (k_heads)
    values = Transpose <perm = [0, 2, 1, 3]> (v_heads)
    products = MatMul (queries, keys)
    scaled = Mul (products, half)
    scores = Add (scaled, mask)
    weights = Softmax <axis = -1> (scores)
    weighted = MatMul (weights, values)
    context = Transpose <perm = [0, 2, 1, 3]> (weighted)
    out = Reshape (context, to_6)
}"""
TWICE = """keys_straight = Transpose <perm = [0, 2, 1, 3]> (k_heads)
    keys = Transpose <perm = [0, 1, 3, 2]> (keys_straight)"""
GUARD = """weights_bare = Softmax <axis = -1> (scores)
    asked = IsNaN (weights_bare)
    weights = Where (asked, zero, weights_bare)"""
BOTH_SCALED = """queries_half = Mul (queries, third)
    keys_half = Mul (third, keys)
    scaled = MatMul (queries_half, keys_half)"""
KEYS, SCALED, PRODUCTS = (next(line.strip() for line in BASE.splitlines() if f" {name} = " in line)
                          for name in ("keys", "scaled", "products"))  # fmt: skip
ADDED, WEIGHTS = "scores = Add (scaled, mask)", "weights = Softmax <axis = -1> (scores)"
CONSTANTS = {
    "to_4": np.array([0, 0, 2, 4]),
    "to_1": np.array([0, 0, 1, 4]),
    "to_3": np.array([0, 0, 2, 3]),
    "to_6": np.array([0, 0, 6]),
    "half": np.array(0.5, np.float32),
    "third": np.array(1 / 3, np.float32),
    "three": np.array([3], np.float32),
    "zero": np.array(0, np.float32),
} | {
    name: np.sin(np.arange(np.prod(shape)) + 1, dtype=np.float32).reshape(shape)
    for name, shape in {"wq": (5, 8), "wk": (6, 8), "wk_1": (6, 4), "wv": (6, 6)}.items()
}
FUSED = {
    "as it is": {},
    "keys turned twice": {KEYS: TWICE},
    "divided": {SCALED: "scaled = Div (products, three)"},
    "queries and keys scaled": {PRODUCTS: "", SCALED: BOTH_SCALED},
    "not scaled": {SCALED: "", ADDED: "scores = Add (products, mask)"},
    "mask first": {ADDED: "scores = Add (mask, scaled)"},
    "no mask": {ADDED: "", WEIGHTS: "weights = Softmax <axis = -1> (scaled)"},
    "mask of pairs": {"float[n, 1, 1, s] mask": "float[n, 1, t, s] mask"},
    "mask of all": {"float[n, 1, 1, s] mask": "float[n, 2, t, s] mask"},
    "mask without rows": {"float[n, 1, 1, s] mask": "float[t, s] mask"},
    "self-attention": {"float[n, s, 6] y": "float[n, t, 6] y", "float[n, 1, 1, s] mask": "float[n, 1, 1, t] mask"},
    "guarded": {WEIGHTS: GUARD},
}
LEFT_ALONE = {
    "weights are an output": {"(float[n, t, 6] out)": "(float[n, t, 6] out, float[n, 2, t, s] weights)"},
    "weights read twice": {"weighted = MatMul (weights, values)": "w = Relu (weights)\n weighted = MatMul (w, values)"},
    "keys rotated": {KEYS: "turned = Neg (k_heads)\n keys = Transpose <perm = [0, 2, 3, 1]> (turned)"},
    "one head of keys for all": {"k = MatMul (y, wk)": "k = MatMul (y, wk_1)", "(k, to_4)": "(k, to_1)"},
    "two additions": {SCALED: "once = Mul (products, half)\n scaled = Add (once, mask)"},
    "softmax over queries": {"axis = -1": "axis = 2"},
    "mask per class": {"float[n, 1, 1, s] mask": "float[n, 2, 1, other] mask"},
    "queries of one row": {"float[n, t, 5] x": "float[1, t, 5] x"},
    "heads not joined": {"(float[n, t, 6] out)": "(float[m, 6] out)", "to_6)": "flat)"},
    "scaled by a tensor": {"half)": "mask)"},
}  # fmt: skip


def graph(changes: dict[str, str], opset: int = 20) -> ModelProto:
    text = BASE
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    for name, array in (CONSTANTS | {"flat": np.array([-1, 6])}).items():
        if f"{name})" in text or f"({name}" in text or f", {name}" in text:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def feeds(model: ModelProto, sizes: dict[str, int]) -> Arrays:
    """Fixed numbers; of every row's mask, the last third is closed."""
    found: Arrays = {}
    for position, value in enumerate(model.graph.input):
        shape = [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        array = np.cos(np.arange(np.prod(shape)) * (position + 0.7)).reshape(shape).astype(np.float32)
        if value.name == "mask":
            array[..., shape[-1] - shape[-1] // 3 :] = -np.inf
        found[value.name] = array
    return found


def fused(model: ModelProto, count: int = 1) -> ModelProto:
    copy = ModelProto.FromString(model.SerializeToString())
    assert fuse_attention(copy) == count
    onnx.checker.check_model(copy, full_check=True)
    return copy


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("opset", [13, 20])
def test_every_way_to_write_it_gives_the_same_bits(name: str, opset: int) -> None:
    model = graph(FUSED[name], opset)
    one = fused(model)
    assert {"Softmax", "Transpose"}.isdisjoint(operators(one))
    again = expand_attention(one)
    assert [entry.domain for entry in again.opset_import] == [""]
    onnx.checker.check_model(again, full_check=True)
    sessions = [open_session(candidate) for candidate in (model, one, again)]
    for n, t, s in ((1, 1, 1), (1, 3, 2), (3, 1, 9), (2, 7, 11), (4, 24, 24), (2, 33, 130)):
        feed = feeds(model, {"n": n, "t": t, "s": s})
        wanted, got, expanded = (session.run(None, feed)[0] for session in sessions)
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(expanded, wanted)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_something_else_is_left_alone(name: str) -> None:
    model = graph(LEFT_ALONE[name])
    before = model.SerializeToString(deterministic=True)
    assert fused_from_segment(model) is model
    assert fuse_attention(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_without_shapes_nothing_is_certain() -> None:
    model = graph({})
    del model.graph.value_info[:]
    assert fuse_attention(model) == 0


def test_query_that_may_look_at_nothing_gets_zero_only_where_the_model_says_so() -> None:
    for changes, wanted in (({WEIGHTS: GUARD}, 0.0), ({}, np.nan)):
        model = graph(changes)
        feed = feeds(model, {"n": 2, "t": 3, "s": 4})
        feed["mask"][1] = -np.inf
        plain, one = (open_session(candidate).run(None, feed)[0] for candidate in (model, fused(model)))
        np.testing.assert_array_equal(one, plain)
        np.testing.assert_array_equal(one[1], np.full((3, 6), wanted, np.float32))


def test_attention_that_came_with_the_model_stays() -> None:
    model = fused(graph({}))
    model.graph.node[-1].name = "of the model"
    assert expand_attention(model) is model


def bert_config(heads: int, **more: object) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=32,
        max_position_embeddings=130,
        **more,
    )


class Layers(nn.Module):
    """A `transformers` BertModel with an exit after each layer."""

    def __init__(self, attention: str, heads: int) -> None:
        super().__init__()
        config = bert_config(heads, attn_implementation=attention)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleList(nn.Linear(24, 2) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.bert(input_ids, attention_mask, output_hidden_states=True).hidden_states[1:]
        return tuple(head(x[:, 0]) for head, x in zip(self.heads, hidden, strict=True))


class Packed(nn.Module):
    """torch's own layer: projections in one, heads split with time first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(16, 2) for _ in range(2))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            features = layer(features)
            logits.append(head(features[:, 0]))
        return tuple(logits)


def encoder(exits: tuple[int, ...] = (1, 2, 3)) -> nn.Module:
    return EarlyExitEncoder(BertModel(bert_config(3), add_pooling_layer=False), EncoderConfig(exits=exits))


def cut_text(model: nn.Module) -> CutModel:
    example = Example(
        {"input_ids": torch.arange(6 * 20).reshape(6, 20) % 50, "attention_mask": torch.ones(6, 20, dtype=torch.long)},
        {name: {1: "sequence"} for name in ("input_ids", "attention_mask")},
        {"sequence": (1, 130)},
    )
    source = source_from_model("text", models.with_fixed_weights(model), example, DEFAULT_OPSET)
    return segments_from_graph(source.graph, source.exits, source.inputs, source.dimensions, source.example)


@pytest.fixture(scope="module", params=["encoder", "eager", "sdpa"])
def chains(request) -> tuple[Chain, Chain]:
    """A model of text, three segments of one layer, in standard operators and with attention fused."""
    cut = cut_text(encoder() if request.param == "encoder" else Layers(request.param, 4))
    plain = [segment.model for segment in cut.segments]
    one_each = [fused(model) for model in plain]
    return Chain.open(cut.segments, plain), Chain.open(cut.segments, one_each)


def texts(lengths: list[int], padded: int) -> Arrays:
    mask = (np.arange(padded) < np.array(lengths)[:, None]).astype(np.int64)
    ids = (np.arange(len(lengths) * padded).reshape(mask.shape) * 7 + np.array(lengths)[:, None]) % 50
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(chain: Chain, inputs: Arrays) -> list[np.ndarray]:
    return [out["logits"] for _, out in chain.run(inputs)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=32), st.integers(0, 9))
def test_padded_batches_have_the_same_bits(chains: tuple[Chain, Chain], lengths: list[int], more: int) -> None:
    inputs = texts(lengths, min(130, max(lengths) + more))
    for got, wanted in zip(logits(chains[1], inputs), logits(chains[0], inputs), strict=True):
        np.testing.assert_array_equal(got, wanted)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=32), st.data())
def test_rows_do_not_notice_each_other_or_padding(chains: tuple[Chain, Chain], lengths: list[int], data) -> None:
    together = texts(lengths, 130)
    row = data.draw(st.integers(0, len(lengths) - 1))
    padded = data.draw(st.integers(lengths[row], 130))
    alone = {name: array[row : row + 1, :padded] for name, array in together.items()}
    for all_rows, one_row in zip(logits(chains[1], together), logits(chains[1], alone), strict=True):
        np.testing.assert_array_equal(all_rows[row : row + 1], one_row)


def test_one_mask_for_all_layers_of_a_segment() -> None:
    cut = cut_text(encoder((3,)))
    model = fused(cut.segments[0].model, 3)
    assert operators(model).count("Expand") == 1
    masks = {node.input[5] for node in model.graph.node if node.domain == DOMAIN}
    assert len(masks) == 1


def test_torchs_own_layer_is_left_alone() -> None:
    example = Example({"features": models.waves(6, 10, 16)}, {"features": {1: "sequence"}}, {"sequence": (2, 64)})
    source = source_from_model("packed", models.with_fixed_weights(Packed()), example, DEFAULT_OPSET)
    cut = segments_from_graph(source.graph, source.exits, source.inputs, source.dimensions, source.example)
    assert [fuse_attention(segment.model) for segment in cut.segments] == [0, 0]


def test_shortened_sequences_have_masks_of_their_own() -> None:
    source = source_from_model("pruned", *models.pruned_bert(), DEFAULT_OPSET)
    cut = segments_from_graph(source.graph, source.exits, source.inputs, source.dimensions, source.example)
    plain = Chain.open(cut.segments, [segment.model for segment in cut.segments])
    one_each = Chain.open(cut.segments, [fused(segment.model) for segment in cut.segments])
    for lengths in ([2], [9, 20, 3], [40, 2, 64, 17]):
        inputs = texts(lengths, max(lengths))
        for got, wanted in zip(logits(one_each, inputs), logits(plain, inputs), strict=True):
            np.testing.assert_array_equal(got, wanted)


def domains(bundle: Path, precision: str) -> list[int]:
    """Per segment, how many operators ONNX Runtime alone knows."""
    manifest = load_manifest(bundle)
    graphs = [onnx.load_from_string(read_file(bundle, segment.graphs[precision])) for segment in manifest.segments]
    return [sum(node.domain == DOMAIN for node in model.graph.node) for model in graphs]


def test_bundle_has_it_for_onnx_runtime_and_tensorrt_builds_it(tmp_path) -> None:
    source = source_from_model("text", *models.by_keyword(), DEFAULT_OPSET)
    manifest = export_bundle(source, tmp_path / "bundle")
    assert manifest.parity["chain_bit_equal"]
    assert manifest.parity["compacted_bit_equal"]
    assert (domains(tmp_path / "bundle", "fp32"), domains(tmp_path / "bundle", "fp16")) == ([1, 1], [0, 0])
    builder = BuilderOptions(backend="tensorrt-rtx")
    report = build_engines(tmp_path / "bundle", BuildOptions(precision="fp32", builder=builder))
    assert [build.action for build in report.segments] == ["build", "build"]


def test_other_bits_are_not_worth_it(tmp_path, monkeypatch) -> None:
    """Were the operator to round otherwise, the graphs that keep the bits of the whole graph are written."""

    def rounded_otherwise(model: ModelProto) -> ModelProto:
        copy = fused(model)
        for tensor in copy.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(array * np.float32(1 + 2e-7), tensor.name))
        return copy

    monkeypatch.setattr(exporting, "fused_from_segment", rounded_otherwise)
    source = source_from_model("text", *models.by_keyword(), DEFAULT_OPSET)
    steps: list[str] = []
    manifest = export_bundle(source, tmp_path / "bundle", ExportOptions(precision="fp32"), steps.append)
    assert any("attention stays in standard operators" in step for step in steps)
    assert manifest.parity["chain_bit_equal"]
    assert domains(tmp_path / "bundle", "fp32") == [0, 0]
