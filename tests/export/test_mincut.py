"""The minimum cut against brute force: every set of tensors that could be carried, on small random graphs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.export.capture import DEFAULT_OPSET
from offramp.export.costs import CostModel
from offramp.export.graph import GraphView
from offramp.export.mincut import CutProblem, minimum_carry
from offramp.export.probe import probe_graph
from offramp.export.source import source_from_model
from tests.export.test_cut import FACTORIES, GRAPHS, source_from_graph


def cheapest_by_brute_force(problem: CutProblem, existing: frozenset[int], needed: frozenset[int]) -> int:
    """The lowest price over all sets of carried tensors: what is not carried is run again, back to what is."""
    maker = {name: index for index in existing for name in problem.makes[index]}
    later = {name for index in needed for name in problem.makes[index]}
    asked = {name for index in needed for name in problem.reads[index]} - later
    inputs = {name for index in existing for name in problem.reads[index]} | asked
    tensors = sorted(inputs | set(maker))
    prices = []
    for size in range(len(tensors) + 1):
        for carried in itertools.combinations(tensors, size):
            rerun, pending, possible = set(), [name for name in asked if name not in carried], True
            while pending:
                name = pending.pop()
                if name not in maker:
                    possible = False
                    break
                if maker[name] not in rerun:
                    rerun.add(maker[name])
                    pending += [read for read in problem.reads[maker[name]] if read not in carried]
            if possible:
                prices.append(problem.price_ns(carried, rerun))
    return min(prices)


@st.composite
def problems(draw: st.DrawFn) -> tuple[CutProblem, frozenset[int], frozenset[int]]:
    """A random graph of up to 8 operators over 2 inputs, cut at a random place."""
    price = st.one_of(st.none(), st.integers(0, 20))
    count = draw(st.integers(2, 8))
    names = ["x", "y"]
    reads, makes = [], []
    for index in range(count):
        reads.append(tuple(draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))))
        makes.append((f"t{index}",) if draw(st.booleans()) else (f"t{index}", f"u{index}"))
        names += makes[-1]
    carry = {name: draw(price) for name in names} | {"x": draw(st.integers(0, 40)), "y": draw(st.integers(0, 40))}
    problem = CutProblem(reads, makes, carry, [draw(price) for _ in range(count)])
    border = draw(st.integers(1, count - 1))
    return problem, frozenset(range(border)), frozenset(range(border, count))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_carry_is_cheaper(case: tuple[CutProblem, frozenset[int], frozenset[int]]) -> None:
    problem, existing, needed = case
    carry = minimum_carry(problem, existing, needed)
    assert problem.price_ns(carry.tensors, carry.rerun) == cheapest_by_brute_force(problem, existing, needed)


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_later_boundaries_never_miss_what_earlier_ones_left(
    case: tuple[CutProblem, frozenset[int], frozenset[int]], data: st.DataObject
) -> None:
    problem, first, rest = case
    border = data.draw(st.integers(len(first), len(first) + len(rest) - 1))
    second = frozenset(range(border))
    everything = first | rest
    early = minimum_carry(problem, first, rest)
    late = minimum_carry(problem, second, everything - second)
    maker = {name: index for index in second for name in problem.makes[index]}
    at_hand = set(early.tensors) | {name for i in early.rerun | (second - first) for name in problem.makes[i]}
    assert set(late.tensors) <= at_hand, "carried on without being carried in or made here"
    assert late.rerun <= early.rerun | (second - first)
    assert all(name in maker or name in ("x", "y") for name in late.tensors)


@pytest.mark.parametrize("name", [*GRAPHS, "residual CNN", "two streams", "shared weights"])
def test_real_graphs_are_cut_minimally(tmp_path, name: str) -> None:
    if name in GRAPHS:
        make, exits = GRAPHS[name]
        source = source_from_graph(make(), exits, tmp_path)
    else:
        source = source_from_model("m", *FACTORIES[name](), DEFAULT_OPSET)
        exits = source.exits
    view = GraphView(source.graph)
    probe = probe_graph(view, source.inputs, source.dimensions, source.example)
    reads = [() if node.op_type == "Shape" else view.reads[i] for i, node in enumerate(view.nodes)]
    problem = CostModel().problem(view, probe, reads)
    existing = view.upstream(exits[:1], reads)
    needed = view.upstream(exits[1:], reads) - existing
    carry = minimum_carry(problem, existing, needed)
    assert carry.tensors
    assert problem.price_ns(carry.tensors, carry.rerun) == cheapest_by_brute_force(problem, existing, needed)


def test_diamond_by_hand() -> None:
    """x -> a -> b, both needed later: carrying b and running a's cheap reader again beats carrying both."""
    problem = CutProblem(
        reads=[("x",), ("a",), ("b", "a")],
        makes=[("a",), ("b",), ("out",)],
        carry_ns={"x": 50, "a": 10, "b": 10, "out": None},
        rerun_ns=[None, 3, 0],
    )
    carry = minimum_carry(problem, frozenset({0, 1}), frozenset({2}))
    assert (carry.tensors, carry.rerun, carry.forbidden) == (("a",), frozenset({1}), ())


def test_what_cannot_be_carried_is_named() -> None:
    problem = CutProblem([("x",), ("a",)], [("a",), ("out",)], {"x": None, "a": None, "out": None}, [None, 0])
    assert minimum_carry(problem, frozenset({0}), frozenset({1})).forbidden
