"""Fewer operators for the same numbers: reshapes whose target follows from probing take it as a constant, or vanish.

Beside weights that empty the caches a small operator costs ten times its warm price, so their number counts
(docs/log.md); the exporter writes three or four of them to say that a reshape keeps the batch and the length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from offramp.bundle import Dimension
from offramp.export.graph import read_names
from offramp.export.score_head import PREFIX


def simplify_graph(graph: GraphProto) -> None:
    """Rewrite `graph` in place; its value_info must hold the shapes that probing found."""
    _skip_reshapes(graph)
    _fix_reshapes(graph)
    drop_unread(graph)


def _skip_reshapes(graph: GraphProto) -> None:
    """Let the readers of a Reshape or Expand that changes no shape read what it reads."""
    shapes, outputs = known_shapes(graph), {value.name for value in graph.output}
    same: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type in ("Reshape", "Expand") and node.output[0] not in outputs:
            before = shapes.get(node.input[0])
            if before is not None and before == shapes.get(node.output[0]):
                same[node.output[0]] = node.input[0]


def _fix_reshapes(graph: GraphProto) -> None:
    """Give every Reshape whose result follows from its input's shape a constant target."""
    shapes = known_shapes(graph)
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in constants:
            continue
        target = reshape_target(shapes.get(node.input[0]), shapes.get(node.output[0]))
        if target is None:
            continue
        name = f"{PREFIX}target_{'_'.join(map(str, target))}"
        if name not in constants:
            constants.add(name)
            graph.initializer.append(numpy_helper.from_array(np.array(target, np.int64), name))
        node.input[1] = name
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]  # so that 0 copies
        del node.attribute[:]
        node.attribute.extend(kept)


def reshape_target(before: Sequence[Dimension] | None, after: Sequence[Dimension] | None) -> list[int] | None:
    """A constant that reshapes `before` to `after`: 0 copies the length at its place, one -1 is worked out."""
    if before is None or after is None:
        return None
    if 0 in after:
        return None
    copied = [axis < len(before) and before[axis] == length for axis, length in enumerate(after)]
    target = [
        length if isinstance(length, int) else 0 if copy else -1 for length, copy in zip(after, copied, strict=True)
    ]
    return target if target.count(-1) <= 1 else None


def drop_unread(graph: GraphProto) -> None:
    """Take out operators, constants and shapes that nothing reads any more."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update(read_names(node))
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(nodes)
    made = {name for node in kept for name in node.output}
    for field, is_kept in ((graph.initializer, needed), (graph.value_info, made)):
        entries = [entry for entry in field if entry.name in is_kept]
        del field[:]
        field.extend(entries)


def known_shapes(graph: GraphProto) -> dict[str, list[Dimension]]:
    """Shapes of the tensors whose lengths are all written down, as numbers or names."""
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dimensions = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(entry.WhichOneof("value") for entry in dimensions):
            found[value.name] = [entry.dim_param or entry.dim_value for entry in dimensions]
    return found
