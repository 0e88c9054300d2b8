"""The cheapest carry: a minimum cut, in nanoseconds, between what a segment leaves behind and what is needed.

What crosses the boundary after exit k must be enough to compute every later exit. Each tensor that exists by
exit k is a pair of vertices joined by an edge that costs what carrying it costs; each operator is a vertex that
costs, from the source, what running it a second time costs. The minimum cut says which tensors to carry and
which operators to run again (the idea of the min-cut partitioner of AOTAutograd, which saves or recomputes
activations between forward and backward).

Boundaries are cut one by one, and the results fit together. Going from boundary k to k + 1, operators that did
not exist yet become ones that may be left behind, so edges from the source only gain capacity and edges to the
sink only lose it; for such a family of networks the largest source sides of the minimum cuts are nested (Gallo,
Grigoriadis and Tarjan 1989, section 2). A tensor carried over boundary k + 1 is thus on the sink side of
boundary k: carried there too, or rebuilt from what was. No later boundary ever asks for something that an
earlier one left behind, and the sum over boundaries is minimal because each term is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

_NEVER_NS = 10**12  # 1,000 s: more than any sum of honest costs, small enough to add up


@dataclass(frozen=True)
class CutProblem:
    """An operator graph with prices: what `minimum_carry` needs to know, and nothing about ONNX.

    Operators are numbered in topological order. `reads[i]` are the tensors that operator i reads,
    `makes[i]` those that it makes. A tensor no operator makes is an input: it can be carried, not rebuilt.
    A price of None means never.
    """

    reads: Sequence[Collection[str]]
    makes: Sequence[Collection[str]]
    carry_ns: Mapping[str, int | None]
    rerun_ns: Sequence[int | None]

    def price_ns(self, carried: Collection[str], rerun: Collection[int]) -> int:
        """The price of carrying `carried` and running `rerun` again, forbidden ones at a prohibitive price."""
        prices = [self.carry_ns[name] for name in carried] + [self.rerun_ns[index] for index in rerun]
        return sum(_NEVER_NS if price is None else price for price in prices)


@dataclass(frozen=True)
class Carry:
    """The solution for one boundary."""

    tensors: tuple[str, ...]  # in the order in which they first appear in the graph
    rerun: frozenset[int]  # operators of earlier segments that later ones run again
    forbidden: tuple[str, ...]  # tensors among `tensors` that must not be carried: the cut is not possible


def minimum_carry(problem: CutProblem, existing: Collection[int], needed: Collection[int]) -> Carry:
    """The cheapest carry when the operators `existing` have run and the operators `needed` are yet to run."""
    network, order = nx.DiGraph(), {}
    network.add_node("source")
    network.add_node("sink")

    def add_tensor(name: str, maker: int | None) -> None:
        price = problem.carry_ns[name]
        order[name] = len(order)
        network.add_edge(("in", name), ("out", name), capacity=_NEVER_NS if price is None else price)
        # Whoever rebuilds the tensor runs its maker again; an input has no maker and exists for ever.
        network.add_edge("source" if maker is None else ("op", maker), ("in", name))

    made = {name for index in existing for name in problem.makes[index]}
    for index in sorted(existing):
        for name in problem.reads[index]:
            if name not in order and name not in made:
                add_tensor(name, None)
        for name in problem.makes[index]:
            add_tensor(name, index)
        price = problem.rerun_ns[index]
        network.add_edge("source", ("op", index), capacity=_NEVER_NS if price is None else price)
        for name in problem.reads[index]:
            network.add_edge(("out", name), ("op", index))
    later = {name for index in needed for name in problem.makes[index]}
    for index in sorted(set(needed) - set(existing)):
        for name in problem.reads[index]:
            if name in later and name not in made:
                continue
            if name not in order:
                add_tensor(name, None)
            network.add_edge(("out", name), "sink")
    _, (left, _) = nx.minimum_cut(network, "source", "sink")
    tensors = [name for name in order if ("in", name) in left and ("out", name) not in left]
    rerun = frozenset(index for index in existing if ("op", index) not in left)
    return _carry(problem, tensors, rerun)


def _carry(problem: CutProblem, tensors: list[str], rerun: frozenset[int]) -> Carry:
    forbidden = [name for name in tensors if problem.carry_ns[name] is None]
    forbidden += [name for index in rerun if problem.rerun_ns[index] is None for name in problem.makes[index]]
    return Carry(tuple(tensors), rerun, tuple(forbidden))
