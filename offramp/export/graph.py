"""A read-only view of an ONNX graph: who makes a tensor, who reads it, what it depends on.

Works on one flat graph. A node with subgraphs (If, Loop, Scan) is one node that also reads what its
subgraphs take from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx
from onnx import GraphProto, ModelProto, NodeProto

RANDOM_OPERATORS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass(frozen=True)
class GraphView:
    """`model`'s top graph, its nodes in topological order."""

    model: ModelProto

    @cached_property
    def nodes(self) -> tuple[NodeProto, ...]:
        return tuple(self.model.graph.node)

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs a caller must give, in order."""
        return tuple(value.name for value in self.model.graph.input if value.name not in self.initializers)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        return tuple(value.name for value in self.model.graph.output)

    @cached_property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """Per node, the distinct tensors it reads, those of its subgraphs included."""
        return tuple(tuple(dict.fromkeys(read_names(node))) for node in self.nodes)

    @cached_property
    def producer(self) -> dict[str, int]:
        """Tensor name -> index of the node that makes it."""
        return {name: index for index, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def constant_nodes(self) -> frozenset[int]:
        """Nodes that depend on no input at all: they may stand in any segment at no cost."""
        constant: set[int] = set()
        for index, names in enumerate(self.reads):
            if all(name in self.initializers or self.producer.get(name) in constant for name in names):
                constant.add(index)
        return frozenset(constant)

    def upstream(
        self, tensors: Iterable[str], reads: Sequence[Sequence[str]], stop: frozenset[str] = frozenset()
    ) -> frozenset[int]:
        """Nodes needed to compute `tensors` when those in `stop` are given and node i reads `reads[i]`."""
        found: set[int] = set()
        pending = [name for name in tensors if name not in stop]
        while pending:
            index = self.producer.get(pending.pop())
            if index is not None and index not in found:
                found.add(index)
                pending.extend(name for name in reads[index] if name not in stop)
        return frozenset(found)


def read_names(node: NodeProto) -> Iterator[str]:
    """Names that `node` reads, including what its subgraphs take from the graph around them."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
        for graph in graphs:
            yield from _captured_names(graph)


def _captured_names(graph: GraphProto) -> Iterator[str]:
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        yield from (name for name in read_names(node) if name not in known)
        known.update(node.output)
    yield from (value.name for value in graph.output if value.name not in known)


def rename_tensors(node: NodeProto, names: dict[str, str]) -> NodeProto:
    """A copy of `node` with its tensors renamed, in its subgraphs too (where not shadowed)."""
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename_in_place(copy, names)
    return copy


def _rename_in_place(node: NodeProto, names: dict[str, str]) -> None:
    for field in (node.input, node.output):
        field[:] = [names.get(name, name) for name in field]
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
        for graph in graphs:
            for inner in graph.node:
                _rename_in_place(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)


def describe_node(node: NodeProto) -> str:
    """Operator and name of a node, for messages."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{operator} {node.name!r}" if node.name else f"{operator} making {node.output[0]!r}"
