"""A decoder with routers, exits with layers of their own and a small vocabulary, through its bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.bundle import DecoderSpec, load_manifest
from offramp.errors import OptionError
from offramp.policy import Policy
from offramp.runtime.capacity import EVERYBODY, router_thresholds
from offramp.runtime.generator import MODES, GenerateOptions, Generator
from tests import decoders

LENGTH = 16
GATES = (0.55, 0.5)
FULL = Policy.full_depth()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.export_to(tmp_path_factory.mktemp("adaptive"), decoders.source_of(decoders.adaptive()))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [decoders.greedy(list(prompt), LENGTH) for prompt in decoders.PROMPTS]


def generated(bundle: Path, policy: Policy, max_batch: int = 1, **options):
    with Generator.open(bundle, policy, max_batch=max_batch, threads=1) as generator:
        return generator.generate(decoders.PROMPTS, GenerateOptions(**{"max_new_tokens": LENGTH, **options}))


def test_the_bundle_has_thresholds_for_every_capacity(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.decoder.router_threshold == "router_threshold"
    assert sorted(manifest.decoder.capacities) == ["0.3", "0.6", "0.9"]
    assert np.allclose(manifest.decoder.capacities["0.9"], [-0.4, -0.5, -0.3])
    assert [len(part.states) for part in manifest.segments] == [4, 4, 2]  # a layer of an exit has keys and values too
    assert len(manifest.heads) == 3
    assert manifest.parity["chain_bit_equal"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_batch", [1, 5])
def test_all_ffns_and_closed_exits_are_the_model_it_is_put_on(
    bundle: Path, expected, mode: str, max_batch: int
) -> None:
    for wanted, text in zip(expected, generated(bundle, FULL, max_batch, mode=mode), strict=True):
        assert text.tokens == wanted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("capacity", "max_batch"), [(0.9, 5), (0.6, 1), (0.3, 5)])
def test_at_a_capacity_it_is_the_decoder_that_skips(bundle: Path, mode: str, max_batch: int, capacity: float) -> None:
    thresholds = tuple(decoders.adaptive().thresholds[decoders.CAPACITIES.index(capacity)].tolist())
    texts = generated(bundle, FULL, max_batch, mode=mode, capacity=capacity)
    for prompt, text in zip(decoders.PROMPTS, texts, strict=True):
        assert text.tokens == decoders.routed_greedy(tuple(prompt), LENGTH, thresholds)


@pytest.mark.parametrize("capacity", [1, 0.6])
def test_leaving_at_exits_with_layers_of_their_own(bundle: Path, capacity: float) -> None:
    model = decoders.adaptive()
    thresholds = torch.full((decoders.LAYERS,), -1e4) if capacity == 1 else model.thresholds[1]
    texts = generated(bundle, Policy.thresholds("learned", GATES), 3, capacity=capacity)
    left = set()
    for prompt, text in zip(decoders.PROMPTS, texts, strict=True):
        wanted = decoders.adaptive_leaving(list(prompt), LENGTH, GATES, thresholds)
        assert (text.tokens, text.exit_indices) == wanted
        left |= set(text.exit_indices)
    assert left == {0, 1, 2}


def test_an_early_exit_says_only_what_it_knows(bundle: Path) -> None:
    known = set(decoders.adaptive().exits[0].draft.tokens.tolist())
    for text in generated(bundle, Policy.thresholds("learned", [0, None])):
        assert set(text.tokens) <= known
        assert set(text.exit_indices) == {0}


def spec(**capacities: tuple[float, ...]) -> DecoderSpec:
    plain = DecoderSpec("input_ids", "past_length", (), "chunk", "past", 8)
    return replace(plain, capacities={name.replace("_", "."): values for name, values in capacities.items()})


def test_thresholds_between_those_of_the_table() -> None:
    table = spec(_3=(2.0, 4.0), _7=(0.0, 1.0))
    assert router_thresholds(table, 1).tolist() == [EVERYBODY] * 2
    assert router_thresholds(table, 0.7).tolist() == [0, 1]
    assert np.allclose(router_thresholds(table, 0.5), [1, 2.5])
    assert not len(router_thresholds(spec(), 1))


def test_capacities_that_cannot_be_had(bundle: Path) -> None:
    with pytest.raises(OptionError, match="has no routers"):
        router_thresholds(spec(), 0.5)
    with pytest.raises(OptionError, match=r"expected 1, or 0\.3 to 0\.9"):
        generated(bundle, FULL, capacity=0.2)
