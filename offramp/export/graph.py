"""A read-only view of an ONNX graph: who makes a tensor, who reads it, what it depends on.

Works on one flat graph. A node with subgraphs (If, Loop, Scan) is one node that also reads what its
subgraphs take from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Operators whose output's size is decided by values, and those that take it as an operand (input position).
_SIZED_BY_DATA = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "SequenceAt"})
_SIZE_OPERANDS = {"ConstantOfShape": (0,), "Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Resize": (2, 3)}
_SIZE_OPERANDS |= dict.fromkeys(("Reshape", "Expand", "Tile", "TopK", "Pad", "Split", "OneHot"), (1,))
# Operators whose output has the shape of their first input, whatever the others are.
_SHAPED_BY_FIRST = frozenset({"ScatterND", "ScatterElements", "Scatter"})


@dataclass(frozen=True)
class GraphView:
    """`model`'s top graph, its nodes in topological order."""

    model: ModelProto

    @cached_property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

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

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name of a tensor that occurs anywhere in the graph and its subgraphs."""
        graph = self.model.graph
        found = {*self.initializers, *(value.name for value in graph.input)}
        for node in walk_nodes(graph):
            found.update(node.input, node.output)
            for inner in inner_graphs(node):
                found.update(value.name for value in (*inner.input, *inner.initializer))
        return frozenset(found)

    @cached_property
    def data_valued(self) -> frozenset[str]:
        """Tensors that depend on the values of the inputs, not on their shapes alone."""
        return self._data_dependence[0]

    @cached_property
    def data_shaped(self) -> frozenset[str]:
        """Tensors whose very shape may depend on the values of the inputs."""
        return self._data_dependence[1]

    @cached_property
    def _data_dependence(self) -> tuple[frozenset[str], frozenset[str]]:
        data, shaped = set(self.input_names), set[str]()
        for node, reads in zip(self.nodes, self.reads, strict=True):
            depends = not data.isdisjoint(reads)
            operands = [node.input[at] for at in _SIZE_OPERANDS.get(node.op_type, ()) if at < len(node.input)]
            sized = node.op_type in _SIZED_BY_DATA and depends
            inherits = reads[:1] if node.op_type in _SHAPED_BY_FIRST else reads
            if sized or not data.isdisjoint(operands) or not shaped.isdisjoint(inherits):
                shaped.update(node.output)
            if not shaped.isdisjoint(reads) or (depends and node.op_type not in ("Shape", "Size")):
                data.update(node.output)
        return frozenset(data - {""}), frozenset(shaped - {""})

    def made_from(self, inputs: Sequence[str]) -> frozenset[str]:
        """Tensors whose values are decided by `inputs`, and by none of the other inputs; shapes do not count."""
        mine, others = set(inputs), set(self.input_names) - set(inputs)
        for node, reads in zip(self.nodes, self.reads, strict=True):
            if node.op_type in ("Shape", "Size"):
                continue
            if not others.isdisjoint(reads):
                others.update(node.output)
            elif not mine.isdisjoint(reads):
                mine.update(node.output)
        return frozenset(mine - {""})

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


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    """The subgraphs of a node: branches of an If, the body of a Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def walk_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes of `graph`, those of subgraphs included."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from walk_nodes(inner)


def read_names(node: NodeProto) -> Iterator[str]:
    """Names that `node` reads, including what its subgraphs take from the graph around them."""
    yield from (name for name in node.input if name)
    for graph in inner_graphs(node):
        yield from _captured_names(graph)


def _captured_names(graph: GraphProto) -> Iterator[str]:
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        yield from (name for name in read_names(node) if name not in known)
        known.update(node.output)
    yield from (value.name for value in graph.output if value.name not in known)


def rename_tensors(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy of `node` with its tensors renamed, in its subgraphs too; what subgraphs shadow stays shadowed.

    No new name may be in use already, except as the old name of something that is renamed as well.
    """
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename_in_place(copy, names)
    return copy


def _rename_in_place(node: NodeProto, names: Mapping[str, str]) -> None:
    for field in (node.input, node.output):
        field[:] = [names.get(name, name) for name in field]
    for graph in inner_graphs(node):
        for inner in graph.node:
            _rename_in_place(inner, names)
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = names.get(value.name, value.name)


def weight_share(model: ModelProto, data_type: int) -> float:
    """Share, in elements, of the stored weights that are of `data_type` and not in FP32."""
    counts = {TensorProto.FLOAT: 0, data_type: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in counts:
            counts[tensor.data_type] += prod(tensor.dims)
    return counts[data_type] / max(1, sum(counts.values()))


def describe_node(node: NodeProto) -> str:
    """Operator and name of a node, for messages."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{operator} {node.name!r}" if node.name else f"{operator} making {node.output[0]!r}"
