"""The encoder with pruning and window attention through capture, cut, FP16, runtime and TensorRT-RTX.

"The same" means the same bits, on ONNX Runtime's CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from offramp.bundle import DimensionSpec, Manifest, load_manifest
from offramp.export.build_engine import BuildOptions, build_engines
from offramp.export.capture import DEFAULT_OPSET, Example
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.export.source import source_from_model
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.models.pruning import Pruning, num_kept
from offramp.policy import Policy
from offramp.runtime import Runner
from tests.export.models import with_fixed_weights

LENGTH = 130
CONFIGS = {
    "pruned": EncoderConfig((2, 3), pruning=Pruning((1, 2)), early_pooling="mean"),
    "pruned in blocks": EncoderConfig((1, 2, 3), pruning=Pruning((1,), min_tokens=2), window=32, in_blocks=True),
    "merging, by attention": EncoderConfig(
        (2, 3), pruning=Pruning((2,), importance="attention", merge=True), window=8, early_pooling="cls"
    ),
}
FP16 = ExportOptions("fp16")


def make_encoder(config: EncoderConfig) -> EarlyExitEncoder:
    """An encoder of 3 layers; uneven normalisations, after which tokens have different norms."""
    bert = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
    )
    encoder: EarlyExitEncoder = with_fixed_weights(EarlyExitEncoder(BertModel(bert, add_pooling_layer=False), config))
    for number, module in enumerate(encoder.modules()):
        if isinstance(module, nn.LayerNorm):
            module.weight.data = 1 + 0.5 * torch.sin(torch.arange(32.0) + number)
    return encoder


def make_example() -> Example:
    ids = torch.arange(6 * 40).reshape(6, 40) * 7 % 50
    mask = (torch.arange(40)[None] < torch.tensor([40, 28, 9, 40, 3, 35])[:, None]).long()
    axes = {1: "sequence"}
    return Example(
        inputs={"input_ids": ids, "attention_mask": mask},
        dynamic={"input_ids": axes, "attention_mask": axes},
        ranges={"sequence": (1, LENGTH)},
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("eat")
    for name, config in CONFIGS.items():
        source = source_from_model(name, make_encoder(config), make_example(), DEFAULT_OPSET)
        export_bundle(source, folder / name, FP16)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module", params=CONFIGS)
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


def batch_of(lengths: list[int], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of `lengths` tokens; a row's tokens follow from its length and the seed."""
    ids = np.zeros((len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = np.random.default_rng((seed, length)).integers(1, 50, length)
    return {"input_ids": ids, "attention_mask": (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)}


def leaving_at(exit_index: int, manifest: Manifest) -> Policy:
    return Policy.thresholds("max_prob", [0.0 if k == exit_index else None for k in range(len(manifest.exits) - 1)])


def test_chain_is_the_whole_graph(bundle: Path) -> None:
    parity = load_manifest(bundle).parity
    assert parity["chain_bit_equal"]
    assert parity["compacted_bit_equal"]


def test_carry_is_the_shorter_hidden_state_and_masks(bundles: dict[str, Path]) -> None:
    """Behind a pruning nothing is carried that is as long as the text, and no length is worked out again."""
    for name, path in bundles.items():
        manifest = load_manifest(path)
        carry = manifest.segments[0].carry_out
        symbols = {size for spec in carry for size in spec.shape if isinstance(size, str)} - {"rows"}
        assert len(symbols) == 1, name
        shorter = LENGTH
        for _ in CONFIGS[name].pruning.layers:
            shorter = num_kept(shorter, 0.3, CONFIGS[name].pruning)
        assert manifest.dimensions[symbols.pop()] == DimensionSpec(1, shorter), name


@pytest.mark.parametrize("exit_index", [0, 1])
def test_a_row_has_the_same_bits_in_any_batch_and_padding(bundle: Path, exit_index: int) -> None:
    """Lengths 1 to 130; every row alone, and among others in a wider batch."""
    manifest = load_manifest(bundle)
    with Runner.open(bundle, "onnxruntime", leaving_at(exit_index, manifest), threads=1) as runner:
        for length in range(1, LENGTH + 1, 1 if exit_index else 3):
            width = min(LENGTH, length + length % 7 + length % 40)
            alone = runner.run(batch_of([length], length))
            others = [max(1, width - length), length, width]
            together = runner.run(batch_of(others, width))
            np.testing.assert_array_equal(alone.outputs["logits"][0], together.outputs["logits"][1])


def test_the_runtime_says_what_torch_says(bundle: Path) -> None:
    """Also for lengths that the example did not have: another number of blocks, fewer tokens than are kept."""
    manifest = load_manifest(bundle)
    encoder = make_encoder(CONFIGS[bundle.name])
    for exit_index in (0, len(manifest.exits) - 1):
        with Runner.open(bundle, "onnxruntime", leaving_at(exit_index, manifest), threads=1) as runner:
            for lengths in ([1], [3, 2], [33, 20, 5], [65, 64], [130, 97, 7]):
                inputs = batch_of(lengths, max(lengths), seed=3)
                with torch.no_grad():
                    expected = encoder(*(torch.from_numpy(array) for array in inputs.values()))[exit_index].numpy()
                np.testing.assert_allclose(runner.run(inputs).outputs["logits"], expected, rtol=0, atol=1e-5)


def test_retention_reaches_the_trace(tmp_path: Path) -> None:
    """The share of a row's own tokens, whatever it was padded to."""
    encoder = make_encoder(CONFIGS["pruned"])
    encoder.reports_retention = True
    export_bundle(
        source_from_model("told", encoder, make_example(), DEFAULT_OPSET), tmp_path / "b", ExportOptions("fp32")
    )
    with Runner.open(tmp_path / "b", "onnxruntime", threads=1) as runner:
        trace = runner.record([batch_of([100, 20, 2, 1], 110)])
    twice = [num_kept(num_kept(length, 0.3, Pruning()), 0.3, Pruning()) / length for length in (100, 20, 2, 1)]
    np.testing.assert_allclose(trace.retention, np.array([twice, twice]).T, rtol=1e-6)


def test_fp16_keeps_nothing_but_the_interface_in_fp32(bundle: Path) -> None:
    parity = load_manifest(bundle).parity
    assert min(parity["fp16_weight_share"]) > 0.9
    assert parity["fp16_predictions_changed"] <= 1


def test_every_segment_becomes_a_plan(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: plans of the pruned encoder were not built")
    report = build_engines(bundle, BuildOptions())
    assert [segment.action for segment in report.segments] == ["build"] * len(load_manifest(bundle).segments)
