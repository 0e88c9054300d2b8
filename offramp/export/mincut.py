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


Vertex = str | tuple[str, str] | tuple[str, int]


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
    network = nx.DiGraph()
    maker = {name: index for index in existing for name in problem.makes[index]}
    made_later = {name for index in needed for name in problem.makes[index]}
    asked = {name for index in needed for name in problem.reads[index]} - made_later
    tensors = dict.fromkeys(name for index in sorted(existing) for name in problem.reads[index])
    tensors |= dict.fromkeys([*maker, *sorted(asked)])
    for name in tensors:
        _add_edge(network, ("in", name), ("out", name), problem.carry_ns[name])
        # Who rebuilds a tensor runs its maker again; an input has no maker and is there from the start.
        network.add_edge(("op", maker[name]) if name in maker else "source", ("in", name))
    for index in sorted(existing):
        _add_edge(network, "source", ("op", index), problem.rerun_ns[index])
        network.add_edges_from((("out", name), ("op", index)) for name in problem.reads[index])
    network.add_edges_from((("out", name), "sink") for name in sorted(asked))
    if not asked:
        return Carry((), frozenset(), ())
    _, (left, _) = nx.minimum_cut(network, "source", "sink")
    carried = [name for name in tensors if ("in", name) in left and ("out", name) not in left]
    rerun = frozenset(index for index in existing if ("op", index) not in left)
    forbidden = [name for name in carried if problem.carry_ns[name] is None]
    forbidden += [name for index in rerun if problem.rerun_ns[index] is None for name in problem.makes[index]]
    return Carry(tuple(carried), rerun, tuple(forbidden))


def _add_edge(network: nx.DiGraph, tail: Vertex, head: Vertex, price_ns: int | None) -> None:
    network.add_edge(tail, head, capacity=_NEVER_NS if price_ns is None else price_ns)
