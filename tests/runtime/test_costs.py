"""Batch costs: what they say between and beyond the measured sizes, and how they are measured."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import DataError, InputError, OptionError
from offramp.runtime import BatchCosts, Runner, fake_runner, measure_batch_costs
from offramp.runtime.costs import _straightened
from offramp.runtime.fake import MAX_ROWS

positive = st.floats(1e-3, 1e3)


@st.composite
def batch_costs(draw: st.DrawFn) -> BatchCosts:
    sizes = draw(st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True).map(sorted))
    line = st.lists(positive, min_size=len(sizes), max_size=len(sizes)).map(sorted).map(tuple)
    lines = draw(st.lists(line, min_size=1, max_size=3))
    return BatchCosts(tuple(sizes), tuple(lines), draw(st.integers(1, 64)))


@given(costs=batch_costs(), rows=st.lists(st.floats(0, 300), min_size=2), row_size=st.integers(0, 128))
def test_more_rows_never_cost_less(costs: BatchCosts, rows: list[float], row_size: int) -> None:
    for segment, line in enumerate(costs.ms):
        found = [costs.latency_ms(segment, each, row_size) for each in sorted(rows)]
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(found))
        assert costs.latency_ms(segment, 0, row_size) == 0
        at_sizes = [costs.latency_ms(segment, size) for size in costs.sizes]
        np.testing.assert_allclose(at_sizes, line, rtol=1e-9)


def test_between_and_beyond_the_sizes_lines_are_straight() -> None:
    costs = BatchCosts((2, 4, 8), ((1.0, 2.0, 6.0),), row_size=10)
    assert [costs.latency_ms(0, rows) for rows in (1, 3, 6, 12)] == [0.5, 1.5, 4.0, 10.0]
    assert costs.latency_ms(0, 3, row_size=20) == costs.latency_ms(0, 6)
    assert BatchCosts((4,), ((2.0,),)).latency_ms(0, 6) == 3.0


@given(costs=batch_costs())
def test_json_gives_back_the_same(costs: BatchCosts) -> None:
    assert BatchCosts.from_json(costs.to_json()) == costs


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"sizes": [8, 1]},
        {"sizes": "ab"},
        {"ms": [[2.0, 1.0]]},
        {"ms": [[1.0]]},
        {"ms": 3},
        {"row_size": 0},
    ],
)
def test_other_json_is_refused(change: dict[str, object]) -> None:
    document = json.loads(BatchCosts((1, 8), ((1.0, 2.0),)).to_json()) | change
    with pytest.raises(DataError, match="batch costs"):
        BatchCosts.from_json(json.dumps(document))
    with pytest.raises(DataError, match="batch costs"):
        BatchCosts.from_json("[" * 100_000)


@pytest.mark.parametrize("line", [(0.0, 1.0), (1.0, float("nan")), (2.0, 1.0), (1.0,)])
def test_impossible_costs_are_refused(line: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="segment 0"):
        BatchCosts((1, 8), (line,))


def test_measuring_covers_every_segment_and_size(shared_runner: Runner) -> None:
    inputs = tiny.request(tiny.sentences(3))
    costs = measure_batch_costs(shared_runner, inputs, sizes=(4, 1, 8, 64), budget_s=0.0)
    assert costs.sizes == (1, 4, 8)  # 64 is more than the bundle takes
    assert len(costs.ms) == tiny.NUM_SEGMENTS
    assert costs.row_size == inputs["ids"].shape[1]


def test_measuring_takes_every_size_and_runs_in_rounds() -> None:
    runner = fake_runner([0.6, 0.6])
    assert measure_batch_costs(runner, {"x": np.zeros(3, np.float32)}, sizes=(2, 5), budget_s=0.0).row_size == 1
    rows = [[len(call.rows) for call in engine.calls] for engine in runner.engines]
    assert rows == [[2, 5] * 6] * 2  # a round for warming up, and five


def test_measuring_nothing_is_refused() -> None:
    runner = fake_runner([0.6, 0.6])
    with pytest.raises(InputError, match="no rows"):
        measure_batch_costs(runner, {"x": np.zeros(0, np.float32)})
    for sizes in ([], [MAX_ROWS + 1], [0, 1]):
        with pytest.raises(OptionError, match="sizes"):
            measure_batch_costs(runner, {"x": np.zeros(1, np.float32)}, sizes)


@given(line=st.lists(positive, min_size=1, max_size=8), step=st.integers(1, 7))
def test_a_noisy_line_is_straightened(line: list[float], step: int) -> None:
    sizes = [1 + step * number for number in range(len(line))]
    straight = _straightened(sizes, line)
    assert BatchCosts(tuple(sizes), (straight,)).ms == (straight,)  # which never falls
    per_row = [ms / size for size, ms in zip(sizes, straight, strict=True)]
    assert all(a * (1 + 1e-9) >= b for a, b in pairwise(per_row))
    np.testing.assert_allclose(_straightened(sizes, list(straight)), straight)


def test_straightening_averages_what_contradicts_and_nothing_else() -> None:
    assert _straightened([1, 2, 4], [1.0, 1.5, 2.5]) == (1.0, 1.5, 2.5)
    assert _straightened([1, 2, 4], [3.0, 1.0, 4.0]) == (2.0, 2.0, 4.0)  # more rows cannot cost less
    assert _straightened([1, 2, 4], [2.0, 2.0, 8.0]) == (2.0, 3.0, 6.0)  # nor a row more among more
