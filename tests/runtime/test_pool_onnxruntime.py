"""The pool on real engines: every answer is that of `runner.run` on the request alone, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import random_policies
from pooling import PATIENCE_S, flat_costs

from offramp.bundle import load_manifest
from offramp.errors import InputError
from offramp.policy import Policy
from offramp.runtime import Admission, Pool, Result, Runner
from offramp.runtime.onnxruntime_engine import open_onnxruntime_engines

COSTS = flat_costs(num_segments=tiny.NUM_SEGMENTS)
token_lists = st.lists(
    st.lists(
        st.lists(st.integers(0, tiny.NUM_TOKENS - 1), min_size=1, max_size=tiny.MAX_LENGTH), min_size=1, max_size=5
    ),
    min_size=1,
    max_size=12,
)


def eager(pool: Pool) -> Pool:
    """Let it regroup from the first batch on."""
    for k in range(tiny.NUM_SEGMENTS - 1):
        pool._epoch.survival.observe(k, 100, 50)
    return pool


@given(
    requests=token_lists,
    policy=random_policies(tiny.NUM_SEGMENTS, with_sources=True),
    pad_to=st.sampled_from([1, 4, 5, 64]),
    max_batch=st.integers(1, 8),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_pooled_answers_are_those_of_each_request_alone(
    shared_runner: Runner,
    requests: list[list[list[int]]],
    policy: Policy,
    pad_to: int,
    max_batch: int,
    data: st.DataObject,
) -> None:
    shared_runner.policy = policy
    sources = [data.draw(st.sampled_from(["", *policy.sources])) for _ in requests]
    inputs = [tiny.request(tokens) for tokens in requests]
    with eager(Pool(shared_runner, max_batch, costs=COSTS, admission=Admission(pad_to=pad_to))) as pool:
        answers = [pool.submit(each, source) for each, source in zip(inputs, sources, strict=True)]
        for answer, each, source in zip(answers, inputs, sources, strict=True):
            tiny.assert_same(answer.result(PATIENCE_S), shared_runner.run(each, source))


def test_lengths_share_a_batch_when_they_are_padded(shared_runner: Runner) -> None:
    shared_runner.policy = Policy.full_depth()
    requests = [tiny.request([[1] * length]) for length in (1, 2, 3, 5, 11)]
    with Pool(shared_runner, admission=Admission(pad_to=5)) as pool:
        for each in requests:
            tiny.assert_same(pool.submit(each).result(PATIENCE_S), shared_runner.run(each))
        assert sorted(pool.plans) == [5, 12]  # 12 is the bundle's maximum, not 15
    with Pool(shared_runner) as pool:
        for each in requests:
            pool.submit(each).result(PATIENCE_S)
        assert sorted(pool.plans) == [1, 2, 3, 5, 11]
        with pytest.raises(InputError, match="too long"):
            pool.submit(tiny.request([[1] * 13]))
        assert isinstance(pool.submit(tiny.request([[1], []])).exception(PATIENCE_S), InputError)


def in_32_threads(ask: Callable[[tiny.Inputs], Result], requests: list[tiny.Inputs]) -> list[list[Result]]:
    """What each thread was answered, request by request; they begin at different ones."""
    found: list[list[Result]] = [[] for _ in range(32)]
    together = threading.Barrier(32)

    def work(index: int) -> None:
        together.wait()
        order = [*range(index, len(requests)), *range(index)]
        answers = {number: ask(requests[number]) for number in order}
        found[index] = [answers[number] for number in range(len(requests))]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_32_threads_get_what_one_gets(shared_runner: Runner, workers: int) -> None:
    """On one runner without a pool (0 workers), and through a pool."""
    shared_runner.policy = Policy.thresholds("max_prob", [0.95, 0.95])
    requests = [tiny.request([tokens]) for tokens in tiny.sentences(40)]
    alone = [shared_runner.run(each) for each in requests]
    if workers:
        with eager(Pool(shared_runner, 8, workers=workers, costs=COSTS, admission=Admission(pad_to=4))) as pool:
            found = in_32_threads(lambda each: pool.submit(each).result(PATIENCE_S), requests)
            assert all(any(plan.regroup) for plan in pool.plans.values())
    else:
        found = in_32_threads(shared_runner.run, requests)
    assert {int(result.exit_index[0]) for result in alone} == {0, 1, 2}
    for answers in found:
        for answer, expected in zip(answers, alone, strict=True):
            tiny.assert_same(answer, expected)


def test_merging_takes_rows_of_several_carries_in_order(bundle: Path) -> None:
    first, second, _ = open_onnxruntime_engines(bundle, load_manifest(bundle), "fp32", threads=1)
    one, everyone = np.float32(1), np.arange(4)
    inputs = [tiny.request(tiny.sentences(8)[start : start + 4], width=7) for start in (0, 4)]
    carries = [first.run(each, everyone, one).carry for each in inputs]
    kept = [tensor.copy() for carry in carries for tensor in carry]
    parts = list(zip(carries, (np.array([3, 1]), np.array([0, 2, 3])), strict=True))
    out = second.run(second.merged(parts), np.arange(5), one)
    apart = [second.run(carry, rows, one).logits for carry, rows in parts]
    np.testing.assert_array_equal(out.logits, np.concatenate(apart))
    for before, tensor in zip(kept, (tensor for carry in carries for tensor in carry), strict=True):
        np.testing.assert_array_equal(before, tensor)


def test_inputs_that_must_not_be_0_are_padded_with_what_they_may_be(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    ids, mask = manifest.inputs
    shifted = replace(manifest, inputs=(replace(ids, minimum=1), mask))
    engines = open_onnxruntime_engines(bundle, manifest, "fp32", threads=1)
    runner = Runner(engines, shifted, Policy.full_depth(), backend="onnxruntime")
    each = tiny.request([[1, 2, 3]])
    with Pool(runner, admission=Admission(pad_to=8)) as pool:
        tiny.assert_same(pool.submit(each).result(PATIENCE_S), runner.run(each))
