"""Language models end to end: train, export, generate, for both kinds of blocks; against the model in torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from offramp.bundle import load_manifest
from offramp.cli import main
from offramp.models.checkpoint import load_checkpoint
from offramp.policy import Policy
from offramp.runtime.generator import MODES, GenerateOptions, Generator
from tests.texts import write_texts

LENGTH = 20
PROMPTS = ("The harbour ", "A", "Every boat belongs to the sea. The old captain looks at the")
BLOCKS = ("transformer", "resnet-bk")
LOGITS_ATOL = 1e-4  # chunk against one by one, logits up to 30


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module", params=BLOCKS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its bundle, made by the commands that a user gives."""
    folder = tmp_path_factory.mktemp(request.param)
    write_texts(folder / "texts", 12)
    (folder / "tiny.toml").write_text(
        f'[data]\nname = "{folder}/texts"\nmax_length = 32\n'
        f'[model]\nkind = "language-model"\nblock = "{request.param}"\nvocabulary = 300\nwidth = 16\nlayers = 2\n'
        "heads = 2\nkv_heads = 1\nffn = 24\nnum_experts = 2\nexits = [1, 2]\nmax_positions = 96\ngated = true\n"
        '[run]\nbatch_size = 8\nprecision = "float32"\n'
        '[[stage]]\nstrategy = "joint"\nepochs = 2\nencoder_lr = 1e-2\nhead_lr = 1e-2\nloss.confidence_weight = 0.3\n'
    )
    report = json.loads(run("train", folder / "tiny.toml", "-o", folder / "checkpoint", "--json"))
    assert report["measure"] == "perplexity"
    assert max(report["epochs"][-1]["validation"]) < 100
    run("export", folder / "checkpoint", "-o", folder / "bundle")
    return folder


@torch.no_grad()
def greedy(folder: Path, prompt: list[int]) -> list[int]:
    """Full depth in torch, without any cache."""
    model, ids = load_checkpoint(folder / "checkpoint").model.decoder, torch.tensor([prompt])
    for _ in range(LENGTH):
        ids = torch.cat([ids, model(ids).exits[-1].logits[:, -1:].argmax(-1)], 1)  # type: ignore[operator]
    return ids[0, len(prompt) :].tolist()


def test_all_modes_say_what_torch_says(trained: Path) -> None:
    """Full depth in every mode, and lossless whatever is proposed; batches of one and ragged ones."""
    policies = {mode: [Policy.full_depth()] for mode in MODES}
    policies["lossless"] += [Policy.thresholds("max_prob", [0.0]), Policy.thresholds("learned", [0.4])]
    wanted = None
    for mode, chosen in policies.items():
        for policy in chosen:
            for max_batch in (1, 3):
                with Generator.open(trained / "bundle", policy, max_batch=max_batch, threads=1) as generator:
                    options = GenerateOptions(LENGTH, mode=mode)
                    prompts = [generator._text.encode(prompt) for prompt in PROMPTS]
                    wanted = wanted or [greedy(trained, prompt) for prompt in prompts]
                    stop = generator.decoder.spec.stop_tokens[0]
                    found = [completion.tokens for completion in generator.generate(prompts, options)]
                assert found == [tokens[: tokens.index(stop) if stop in tokens else None] for tokens in wanted]


def test_what_is_remembered_is_that_of_the_model(trained: Path) -> None:
    """States of every position that a segment has processed."""
    model = load_checkpoint(trained / "checkpoint").model.decoder
    leave = Policy.thresholds("max_prob", [0.4])
    with Generator.open(trained / "bundle", leave, threads=1) as generator:
        prompt = generator._text.encode(PROMPTS[2])
        found = generator.generate([prompt], GenerateOptions(LENGTH))[0]
        read = torch.tensor([[*prompt, *found.tokens]])
        with torch.no_grad():
            present = model(read).present  # type: ignore[operator]
        for index in range(2):
            length = int(generator.decoder.filled(index)[0])
            for got, expected in zip(generator.decoder.cached(index, 0).values(), present[index], strict=True):
                assert torch.allclose(torch.from_numpy(got), expected[0, :, :length], atol=LOGITS_ATOL)
        assert generator.decoder.filled(0)[0] == read.shape[1] - 1
        copied = generator.generate([prompt], GenerateOptions(LENGTH, mode="copy"))[0]
        assert len(copied.tokens) == len(found.tokens)


def test_the_bundle_names_what_a_layer_remembers(trained: Path) -> None:
    manifest = load_manifest(trained / "bundle")
    config = load_checkpoint(trained / "checkpoint").config
    names = {"transformer": ["key_1", "value_1"], "resnet-bk": ["resolvent_1"]}[config.block]
    assert [state.tensor.name for state in manifest.segments[1].states] == names
    assert manifest.parity["chain_bit_equal"]
    text = run("generate", trained / "bundle", "--prompt", "The harbour", "--max-new-tokens", 5, "--json")
    assert len(json.loads(text)[0]["tokens"]) == 5


def test_tensorrt_builds_plans_of_segments_and_head(trained: Path) -> None:
    """In FP16, the resolvent and the experts of ResNet-BK blocks included."""
    pytest.importorskip("tensorrt_rtx")
    done = json.loads(run("build-engine", trained / "bundle", "--max-shapes", "input_ids:2x16", "--json"))
    assert [built["name"] for built in done["segments"]] == ["segment 0", "segment 1", "head_0"]
    assert all(part.plans[0].fp16_share > 0.9 for part in load_manifest(trained / "bundle").parts)
