"""Generation with exits: exact where it says so, batched, sampled, stopped; against slow references in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.bundle import StateSpec, TensorSpec, load_manifest
from offramp.errors import BackendError, BundleError, InputError, OptionError
from offramp.policy import Policy, Veto
from offramp.runtime import Runner
from offramp.runtime.generator import MODES, GenerateOptions, Generator
from offramp.runtime.kv_cache import KeyValueCache, grown
from offramp.runtime.sampling import Sampling, probabilities, sampled
from tests import decoders

LENGTH = 24
STATE_ATOL = 1e-4  # docs/tolerances.md: keys and values against transformers', up to 20
FIRST = Policy.thresholds("max_prob", [0.0, None])  # everybody leaves at the first exit
GATES = (0.5, 0.45)
GATED = Policy.thresholds("learned", GATES)


@pytest.fixture(scope="module")
def bundle(decoder_bundle: Path) -> Path:
    return decoder_bundle


def generated(bundle: Path, policy: Policy, prompts=decoders.PROMPTS, max_batch: int = 1, **options):
    with Generator.open(bundle, policy, max_batch=max_batch, threads=1) as generator:
        return generator.generate(prompts, GenerateOptions(**{"max_new_tokens": LENGTH, **options}))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [decoders.greedy(list(prompt), LENGTH) for prompt in decoders.PROMPTS]


def test_the_bundle_says_who_is_given_what(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    first, second, third = manifest.segments
    assert first.inputs == ("input_ids", "past_length", "past_key_0", "past_value_0")
    assert second.inputs == ("past_length", "active_1", "past_key_1", "past_value_1")
    assert [spec.shape for spec in second.carry_in] == [("previous_rows", "chunk", 48)]
    assert not third.carry_out
    assert [(state.tensor.name, state.past) for state in third.states] == [
        ("key_2", "past_key_2"),
        ("value_2", "past_value_2"),
    ]
    assert {spec.head for spec in manifest.exits} == {"head_0"}  # tied: one head for all
    assert manifest.parity["chain_bit_equal"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_batch", [1, 3, 5])
def test_with_all_exits_closed_it_is_the_model(bundle: Path, expected, mode: str, max_batch: int) -> None:
    found = generated(bundle, Policy.full_depth(), max_batch=max_batch, mode=mode)
    assert [completion.tokens for completion in found] == expected
    assert {completion.reason for completion in found} == {"length"}


@pytest.mark.parametrize("policy", [FIRST, GATED, Policy.thresholds("max_prob", [0.6, 0.4])])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_lossless_is_full_depth_whatever_is_proposed(bundle: Path, expected, policy: Policy, max_batch: int) -> None:
    found = generated(bundle, policy, max_batch=max_batch, mode="lossless", draft=3)
    assert [completion.tokens for completion in found] == expected
    exits = [index for completion in found for index in completion.exit_indices]
    assert 0 < exits.count(0) < len(exits)  # some proposals were right, some were not


@pytest.mark.parametrize("mode", ["deferred", "copy"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_leaving_is_what_the_slow_reference_does(bundle: Path, mode: str, max_batch: int) -> None:
    found = generated(bundle, GATED, max_batch=max_batch, mode=mode)
    for prompt, completion in zip(decoders.PROMPTS, found, strict=True):
        tokens, exits = decoders.leaving(tuple(prompt), LENGTH, GATES, mode)
        assert (completion.tokens, completion.exit_indices) == (tokens, exits)
    assert {0, 1, 2} == {index for completion in found for index in completion.exit_indices}


def test_deferred_keys_and_values_are_those_of_full_depth(bundle: Path) -> None:
    """Of every layer and every position that a segment has processed; what still waits is less than everything."""
    prompt = decoders.PROMPTS[1]
    with Generator.open(bundle, GATED, threads=1) as generator:
        completion = generator.generate([prompt], GenerateOptions(LENGTH))[0]
        read = [*prompt, *completion.tokens[:-1]]
        whole = decoders.keys_and_values(read)
        filled = [int(generator.decoder.filled(index)[0]) for index in range(decoders.LAYERS)]
        for index, length in enumerate(filled):
            cached = list(generator.decoder.cached(index, 0).values())
            for got, wanted in zip(cached, whole[index], strict=True):
                np.testing.assert_allclose(got, wanted[:, :length], atol=STATE_ATOL)
    assert filled[0] == len(read)
    assert len(prompt) < filled[-1] <= filled[1] <= filled[0]


def test_a_closed_exit_runs_no_head_and_a_gate_only_for_those_that_leave(bundle: Path, monkeypatch) -> None:
    with Generator.open(bundle, Policy.full_depth(), threads=1) as generator:
        asked: list[tuple[int, int]] = []
        logits = generator.decoder.logits
        monkeypatch.setattr(
            generator.decoder,
            "logits",
            lambda k, hidden: asked.append((k, len(hidden))) or logits(k, hidden),
        )
        generator.generate([decoders.PROMPTS[0]], GenerateOptions(6))
        assert asked == [(2, 1)] * 6
        asked.clear()
        generator.policy = GATED
        found = generator.generate([decoders.PROMPTS[0]], GenerateOptions(LENGTH))[0]
        assert asked == [(index, 1) for index in found.exit_indices]


def test_nothing_waits_longer_than_a_chunk_allows(bundle: Path) -> None:
    """A prompt longer than a chunk, and more waiting positions than fit in one."""
    prompt = list(range(2 * decoders.CHUNK + 5))
    with Generator.open(bundle, FIRST, threads=1) as generator:
        early = generator.generate([prompt], GenerateOptions(20))[0]
        assert generator.decoder.filled(1)[0] == 0
        last = generator.decoder.filled(0)[0]
        generator.policy = Policy.full_depth()
        late = generator.generate([prompt + early.tokens], GenerateOptions(5))[0]
    assert last == len(prompt) + 19
    assert late.tokens == decoders.greedy(prompt + early.tokens, 5)


@pytest.mark.parametrize("mode", MODES)
def test_it_stops(bundle: Path, expected, mode: str) -> None:
    stop = expected[1][7]
    options = {"policy": Policy.full_depth(), "mode": mode, "max_batch": 2}
    found = generated(bundle, stop_tokens=(stop,), **options)
    for completion, tokens in zip(found, expected, strict=True):
        end = tokens.index(stop) if stop in tokens else LENGTH
        assert (completion.tokens, completion.reason) == (tokens[:end], "stop" if stop in tokens else "length")
    long = list(range(decoders.POSITIONS - 4))
    assert len(generated(bundle, prompts=[long], **options)[0].tokens) == 5  # as many as have a position to come from


def test_sampling_does_not_depend_on_the_batch(bundle: Path) -> None:
    sampling = Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=4)
    alone, together = (generated(bundle, GATED, max_batch=size, sampling=sampling) for size in (1, 5))
    assert [completion.tokens for completion in alone] == [completion.tokens for completion in together]
    other = generated(bundle, GATED, sampling=Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=5))
    assert [completion.tokens for completion in alone] != [completion.tokens for completion in other]


def test_streaming_gives_every_token_once(bundle: Path, expected) -> None:
    with Generator.open(bundle, Policy.full_depth(), max_batch=2, threads=1) as generator:
        texts: dict[int, list[int]] = {}
        for token in generator.stream(decoders.PROMPTS, GenerateOptions(LENGTH)):
            texts.setdefault(token.prompt, []).append(token.token)
        assert [texts[number] for number in range(len(expected))] == expected


def test_what_onnx_runtime_refuses_says_which_segment_and_shapes(bundle: Path) -> None:
    with Generator.open(bundle, max_batch=2, threads=1) as generator:
        generator.decoder.read(0, [[1, 2], [3]])
        with pytest.raises(BackendError, match=r"running segment 1 of a decoder .*carry_in_0 \(2, 2, 48\)"):
            generator.decoder.advance(1, 0, [2, 1], [[99], [0]])
    with pytest.raises(BackendError, match="it was closed"):
        generator.generate([[1]])


def test_what_is_refused(bundle: Path) -> None:
    with pytest.raises(OptionError, match="max_batch 7, expected 1 to 6"):
        Generator.open(bundle, max_batch=7)
    with pytest.raises(OptionError, match="got mode 'exact'"):
        GenerateOptions(mode="exact")
    with pytest.raises(OptionError, match="lossless mode is greedy"):
        GenerateOptions(mode="lossless", sampling=Sampling(1.0))
    with pytest.raises(BundleError, match=r"is a decoder.*Generator"):
        Runner.open(bundle)
    with Generator.open(bundle) as generator:
        for prompts, message in (
            (["text"], "no tokenizer"),
            ([[]], "got 0 tokens"),
            ([[decoders.VOCABULARY]], "each from 0"),
        ):
            with pytest.raises(InputError, match=message):
                generator.generate(prompts)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.integers(0, 12), st.floats(0.05, 1))
def test_probabilities_after_top_k_and_top_p(numbers: list[float], top_k: int, top_p: float) -> None:
    """Token by token, from the most likely on: kept while fewer than k are, and the rest has not reached p."""
    logits = np.array(numbers, np.float32)
    powers = [float(np.exp((number - logits.max()) / 0.7)) for number in logits.astype(np.float64)]
    order = sorted(range(len(powers)), key=lambda token: -powers[token])[: top_k or None]
    total, kept, reached = sum(powers[token] for token in order), [], 0.0
    for token in order:
        if reached < top_p:
            kept.append(token)
            reached += powers[token] / total
    got = probabilities(logits, Sampling(0.7, top_k, top_p))
    wanted = [powers[token] / sum(powers[t] for t in kept) if token in kept else 0.0 for token in range(len(powers))]
    if abs(reached - top_p) > 1e-9 and len(set(powers)) == len(powers):  # no tie and nothing on the edge
        np.testing.assert_allclose(got, wanted, atol=1e-9)
    assert got.sum() == pytest.approx(1)
    assert sampled(logits, Sampling(), np.random.default_rng(0)) == int(np.argmax(logits))


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 70), min_size=1, max_size=3)), max_size=12))
def test_the_cache_is_a_list_of_positions_per_slot(appended: list[tuple[int, list[int]]]) -> None:
    spec = StateSpec(TensorSpec("key", "float32", ("rows", 2, "chunk", 3)), "past", 2)
    cache, lists = KeyValueCache([spec], 5, 10_000), [[] for _ in range(5)]
    number = 0.0
    for low, counts in appended:
        made = np.zeros((len(counts), 2, max(1, *counts), 3), np.float32)
        for row, count in enumerate(counts):
            for at in range(count):
                number += 1
                made[row, :, at] = number
                lists[low + row].append(number)
        cache.append(low, [made[None]], counts)
    cache.move(1, 3)
    lists[3] = list(lists[1])
    for slot, wanted in enumerate(lists):
        got = cache.past(slot, slot + 1)["past"][0]
        assert cache.lengths[slot] == len(wanted)
        assert (got[:, : len(wanted)] == np.array(wanted).reshape(1, -1, 1)).all()
    assert cache.past(1, 4)["past"].flags.c_contiguous


def test_states_of_different_shapes_are_kept_each_along_its_axis() -> None:
    """Keys beside what a recurrent layer remembers, positions on another axis."""
    specs = [
        StateSpec(TensorSpec("key", "float32", ("rows", 2, "chunk", 3)), "past_key", 2),
        StateSpec(TensorSpec("memory", "float64", ("rows", "chunk", 5)), "past_memory", 1),
        StateSpec(TensorSpec("value", "float32", ("rows", 2, "chunk", 3)), "past_value", 2),
    ]
    cache = KeyValueCache(specs, 2, 200)
    random, kept = np.random.default_rng(3), {spec.past: [] for spec in specs}
    for count in (1, 70, 2):
        made, views = cache.room(2, count)
        for spec in specs:
            views[spec.tensor.name][...] = random.normal(size=views[spec.tensor.name].shape)
            kept[spec.past].append(views[spec.tensor.name][1].copy())
        cache.append(0, made, [count, count])
    for spec in specs:
        wanted = np.concatenate(kept[spec.past], spec.axis - 1)
        np.testing.assert_array_equal(cache.cached(1)[spec.past], wanted)
        past = cache.past(1, 2)[spec.past]
        assert past.dtype == spec.tensor.dtype
        assert past.flags.c_contiguous
        np.testing.assert_array_equal(
            np.moveaxis(past[0], spec.axis - 1, 0)[:73], np.moveaxis(wanted, spec.axis - 1, 0)
        )


@given(st.integers(1, 5000))
def test_growing_copies_no_more_than_a_few_times_what_there_is(length: int) -> None:
    capacity = copied = 0
    for needed in range(1, length + 1):
        larger = grown(capacity, needed, 1_000_000)
        copied += capacity if larger > capacity else 0
        capacity = larger
    assert length <= capacity <= max(64, 1.25 * length + 64)
    assert copied <= 5 * length + 64


def test_asking_for_answers_is_what_deciding_reads() -> None:
    assert [Policy.full_depth().asks(0), FIRST.asks(1), GATED.asks(0)] == ["nothing", "nothing", "learned"]
    assert FIRST.asks(0) == Policy("learned", (0.5,), veto=Veto(margin=0.1)).asks(0) == "answers"
    assert Policy(patience=2).asks(0) == Policy("learned", (None, 0.5), patience=2).asks(0) == "answers"
