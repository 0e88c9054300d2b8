"""The TensorRT engine on a fake device: the same bits as ONNX Runtime, whatever leaves when, and no hazard."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from faked import Faked, compare_in_threads, log_of, random_request
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import random_policies

from offramp.errors import BackendError, InputError
from offramp.policy import Policy
from offramp.runtime import Runner, TensorRtOptions
from offramp.runtime.tensorrt.fake_device import FakeDevice
from offramp.runtime.tensorrt.lane import bucket_sizes
from offramp.runtime.tensorrt.worker import GraphWarning

ONE = np.float32(1)
MODES = {
    f"graphs {graphs}, speculation {speculate}": TensorRtOptions(graphs=graphs, speculate=speculate)
    for graphs, speculate in itertools.product((False, True), repeat=2)
}


@pytest.fixture(params=MODES, scope="module")
def options(request: pytest.FixtureRequest) -> TensorRtOptions:
    return MODES[request.param]


@pytest.fixture(scope="module")
def runners(options: TensorRtOptions, bundle: Path) -> tuple[Runner, Runner]:
    """The same bundle on a fake device and on ONNX Runtime, for a whole module of requests."""
    return Faked(bundle, options).runner(Policy()), Runner.open(bundle, "onnxruntime", threads=1)


@settings(max_examples=60, deadline=None)
@given(policy=random_policies(3), seed=st.integers(0, 99), num_rows=st.integers(0, 3 * tiny.MAX_ROWS))
def test_answers_are_those_of_onnxruntime(
    runners: tuple[Runner, Runner], policy: Policy, seed: int, num_rows: int
) -> None:
    inputs = random_request(np.random.default_rng(seed), num_rows)
    for runner in runners:
        runner.policy = policy
    for _ in range(3):  # plainly, then proving a graph, then by its replay
        tiny.assert_same(runners[0].run(inputs), runners[1].run(inputs))


@pytest.mark.parametrize("num_rows", range(1, tiny.MAX_ROWS + 1))
def test_every_batch_size_again_and_again(runners: tuple[Runner, Runner], num_rows: int) -> None:
    for runner in runners:
        runner.policy = Policy.thresholds("max_prob", [0.6, 0.8])
    rng = np.random.default_rng(num_rows)
    for _ in range(6):
        inputs = random_request(rng, num_rows)
        tiny.assert_same(runners[0].run(inputs), runners[1].run(inputs))


def test_graphs_are_captured_the_second_time_and_replayed_from_then_on(bundle: Path) -> None:
    faked = Faked(bundle)
    inputs = tiny.request(tiny.sentences(3))
    counts = []
    with faked.runner(Policy.full_depth()) as runner:
        for _ in range(4):
            runner.run(inputs)
            counts.append((faked.devices[0].log.count("capture"), faked.devices[0].log.count("replay")))
    assert counts == [(0, 0), (3, 3), (3, 6), (3, 9)]


def test_a_replay_sets_no_shape_and_no_address(bundle: Path) -> None:
    faked = Faked(bundle)
    with faked.runner(Policy.full_depth()) as runner:
        for _ in range(2):
            runner.run(tiny.request(tiny.sentences(3)))
        before = [len(context.calls) for plan in faked.plans for context in plan.contexts]
        runner.run(tiny.request(tiny.sentences(3)))
        assert before == [len(context.calls) for plan in faked.plans for context in plan.contexts]


def test_shapes_and_addresses_are_set_only_where_they_change(bundle: Path) -> None:
    faked = Faked(bundle, TensorRtOptions(graphs=False))
    contexts = [plan.contexts[0] for plan in faked.plans]
    with faked.runner(Policy.full_depth()) as runner:
        assert [sum("address" in call for call in context.calls) for context in contexts] == [8, 9, 7]
        runner.run(tiny.request(tiny.sentences(3)))
        for context in contexts:
            context.calls.clear()
        runner.run(tiny.request(tiny.sentences(3)))
        assert [context.calls for context in contexts] == [[], [], []]
        runner.run(tiny.request(tiny.sentences(3), width=9))
        assert contexts[0].calls == ["shape of ids", "shape of mask"]
        assert contexts[1].calls == ["shape of carry_in_0", "shape of carry_in_1"]


def test_nothing_is_allocated_after_opening(bundle: Path) -> None:
    faked = Faked(bundle, TensorRtOptions(speculate=True))
    with faked.runner(Policy.full_depth()) as runner:
        opened = len(faked.devices[0].log)
        for num_rows in range(1, tiny.MAX_ROWS + 1):
            runner.run(tiny.request(tiny.sentences(num_rows)))
    assert not [entry for entry in faked.devices[0].log[opened:] if entry.startswith("allocate")]


def test_one_wait_per_segment_and_only_answers_come_back(bundle: Path) -> None:
    faked = Faked(bundle, TensorRtOptions(graphs=False))
    with faked.runner(Policy.full_depth()) as runner:
        opened = len(faked.devices[0].log)
        runner.run(tiny.request(tiny.sentences(2)))
        log = faked.devices[0].log[opened:]
    assert [log.count(f"{what} in compute") for what in ("upload", "run", "download")] == [2 + 1 + 1, 3, 3]
    assert [entry for entry in log if entry.startswith("wait")] == ["wait answered"] * 3


def test_speculation_enqueues_the_next_segment_before_it_waits(bundle: Path) -> None:
    faked = Faked(bundle, TensorRtOptions(graphs=False, speculate=True))
    with faked.runner(Policy.full_depth()) as runner:
        opened = len(faked.devices[0].log)
        runner.run(tiny.request(tiny.sentences(2)))
        log = faked.devices[0].log[opened:]
    steps = [entry for entry in log if entry.startswith(("run", "download", "wait"))]
    segment = ["download in copies", "run in compute", "wait answered"]
    assert steps == ["run in compute", *segment, *segment, "download in copies", "wait answered"]


def test_thrown_away_speculation_costs_a_run_and_nothing_else(bundle: Path) -> None:
    faked = Faked(bundle, TensorRtOptions(graphs=False, speculate=True))
    leave_first = Policy.thresholds("max_prob", [0.0, 0.0])
    with faked.runner(leave_first) as runner, Runner.open(bundle, "onnxruntime", leave_first) as plain:
        for num_rows in (3, 1, 5, 5):
            inputs = tiny.request(tiny.sentences(num_rows))
            tiny.assert_same(runner.run(inputs), plain.run(inputs))
    assert faked.devices[0].log.count("run in compute") == 2 * 4


def test_a_plan_with_graphs_of_its_own_is_not_captured(bundle: Path) -> None:
    faked = Faked(bundle, has_own_graphs=True)
    with faked.runner(Policy.full_depth()) as runner:
        for _ in range(4):
            runner.run(tiny.request(tiny.sentences(3)))
    assert "capture" not in faked.devices[0].log


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("graphs", ["empty", "wrong", "refused"])
def test_graphs_that_do_not_work_are_given_up_once_and_the_answers_stay_right(
    bundle: Path, graphs: str, speculate: bool
) -> None:
    faked = Faked(bundle, TensorRtOptions(speculate=speculate), lambda: FakeDevice(graphs))
    inputs = tiny.request(tiny.sentences(5))
    policy = Policy.thresholds("max_prob", [0.6, 0.8])
    with faked.runner(policy) as runner, Runner.open(bundle, "onnxruntime", policy) as plain:
        expected = plain.run(inputs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                tiny.assert_same(runner.run(inputs), expected)
    assert [warning.category for warning in caught] == [GraphWarning]
    assert faked.devices[0].log.count("capture") == 1


def test_a_stale_or_foreign_carry_is_an_error(bundle: Path) -> None:
    engines = Faked(bundle).chain.engines
    carry = engines[0].run(tiny.request(tiny.sentences(3)), np.arange(3), ONE).carry
    with pytest.raises(BackendError, match=r"got rows \[0, 3\], the carry has 3"):
        engines[1].run(carry, np.array([0, 3]), ONE)
    with pytest.raises(BackendError, match="not one of segment 1"):
        engines[2].run(carry, np.arange(3), ONE)
    engines[0].run(tiny.request(tiny.sentences(2)), np.arange(2), ONE)
    with pytest.raises(BackendError, match="stale, segment 0 has run again"):
        engines[1].run(carry, np.arange(2), ONE)
    carry = Faked(bundle).chain.engines[0].run(tiny.request(tiny.sentences(3)), np.arange(3), ONE).carry
    with pytest.raises(BackendError, match="not one of segment 0 in this thread"):
        engines[1].run(carry, np.arange(2), ONE)


def test_too_many_rows_at_once_are_an_error(bundle: Path) -> None:
    engines = Faked(bundle).chain.engines
    with pytest.raises(InputError, match="got 9 rows, its plan runs up to 8"):
        engines[0].run(tiny.request(tiny.sentences(9)), np.arange(9), ONE)


def test_carries_cannot_be_merged(bundle: Path) -> None:
    with pytest.raises(BackendError, match="cannot merge the carries of 2 requests"):
        Faked(bundle).chain.engines[0].merged([None, None])


def test_closing_gives_everything_back_once(bundle: Path) -> None:
    faked = Faked(bundle)
    with faked.runner(Policy.full_depth()) as runner:
        runner.run(tiny.request(tiny.sentences(1)))
        faked.chain.engines[0].close()
        assert not any(plan.is_closed for plan in faked.plans)
    assert all(plan.is_closed for plan in faked.plans)
    faked.chain.engines[1].close()
    with pytest.raises(BackendError, match="segment 2: the engine is closed"):
        faked.chain.engines[2].run(None, np.arange(1), ONE)


def test_every_thread_has_a_worker_and_an_ended_one_hands_it_on(bundle: Path) -> None:
    faked = Faked(bundle, TensorRtOptions(speculate=True))
    policy = Policy.thresholds("max_prob", [0.6, 0.8])
    with faked.runner(policy) as runner, Runner.open(bundle, "onnxruntime", policy, threads=1) as plain:
        for _ in range(2):  # the second four take over the workers of the first
            compare_in_threads(runner, plain, 20, tiny.assert_same)
    assert len(faked.devices) == 1 + 4  # the thread that opened has one too
    assert "capture" in log_of(faked.devices[1:])


@pytest.mark.parametrize("told", [(), ("learned",), ("retention",), ("learned", "retention")])
def test_what_else_an_exit_tells_comes_along(bundle: Path, options: TensorRtOptions, told: tuple[str, ...]) -> None:
    engines = Faked(bundle, options, row_outputs=told).chain.engines
    for _ in range(3):
        out = engines[0].run(tiny.request(tiny.sentences(3)), np.arange(3), ONE)
        for name, share in (("learned", 2), ("retention", 3)):
            expected = out.scores[:, 1] / share if name in told else None
            np.testing.assert_array_equal(getattr(out, name), expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 1, (1,)),
        (1, 8, (1, 2, 4, 8)),
        (1, 20, (1, 2, 4, 8, 16, 20)),
        (3, 20, (3, 4, 8, 16, 20)),
        (5, 5, (5,)),
        (1, 64, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)),
    ],
)
def test_buckets(low: int, high: int, expected: tuple[int, ...]) -> None:
    assert bucket_sizes(low, high) == expected


@given(low=st.integers(1, 40), more=st.integers(0, 1000))
def test_buckets_pad_by_little(low: int, more: int) -> None:
    high = low + more
    sizes = bucket_sizes(low, high)
    assert (sizes[0], sizes[-1]) == (low if low in sizes else sizes[0], high)
    assert sizes[0] >= low
    for size in range(low, high + 1):
        bucket = next(one for one in sizes if one >= size)
        assert bucket - size < max(low, size, high // 16 + 8)
