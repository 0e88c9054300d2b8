"""Lengths that a graph works out of other lengths are read off a tensor that has them, wherever there is one already.

An exporter writes every length as arithmetic on the inputs' (how many tokens two prunings leave: a dozen operators).
After a cut that arithmetic would need the inputs again, in each segment; and TensorRT would check it against the shape
of the carry, whose profile knows nothing of it. Lengths of the inputs themselves are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from offramp.bundle import ROWS
from offramp.export.graph import GraphView
from offramp.export.probe import Law, Probe, TensorFacts
from offramp.export.score_head import PREFIX
from offramp.export.segment_graph import laws_taken
from offramp.export.simplify import drop_unread

_MIN_OPSET = 15  # Shape of some axes
_SMALL = 16  # elements of a tensor that may be part of a length's arithmetic

_Values = list[NDArray[np.generic]]  # of one tensor, at each probed size


def with_lengths_read(view: GraphView, probe: Probe, symbols: frozenset[str]) -> tuple[GraphView, Probe]:
    """`view` and `probe` with every length beyond `symbols`, the inputs' dimensions, read off the latest tensor."""
    values = _values(view, probe) if view.opset >= _MIN_OPSET else {}
    lengths = dict(_lengths(probe, values, symbols))
    if not lengths:
        return view, probe
    rewriter = _Rewriter(view, probe, lengths, frozenset(values))
    for index in range(len(view.nodes)):
        rewriter.write(index)
    model = ModelProto()
    model.CopyFrom(view.model)
    del model.graph.node[:]
    model.graph.node.extend(rewriter.nodes)
    drop_unread(model.graph)
    return GraphView(model), replace(probe, tensors={**probe.tensors, **rewriter.facts})


class _Rewriter:
    """Writes the nodes of a graph again, the arithmetic of lengths as late as it is needed."""

    def __init__(self, view: GraphView, probe: Probe, lengths: Mapping[str, Law], late: frozenset[str]) -> None:
        self.view, self.probe, self.lengths, self.late = view, probe, lengths, late
        self.nodes: list[NodeProto] = []
        self.facts: dict[str, TensorFacts] = {}  # of the tensors that are new
        self._wanted = set(lengths.values())
        self._latest: dict[Law, tuple[str, int]] = {}  # a tensor, and its axis of that law
        self._written: set[int] = set()

    def write(self, index: int, *, needed: bool = False) -> None:
        """Write node `index` with what it needs, unless that is done or nobody needs it yet."""
        node = self.view.nodes[index]
        if index in self._written or (not needed and node.output[0] in self.late):
            return
        self._written.add(index)
        copy = NodeProto()
        copy.CopyFrom(node)
        for name in self.view.reads[index]:  # of subgraphs, too
            if name in self.late and not self._is_read_off(copy, name):
                self.write(self.view.producer[name], needed=True)
        for position, name in enumerate(copy.input):
            if self._is_read_off(copy, name):
                copy.input[position] = self._reading(name)
        self.nodes.append(copy)
        for name in (name for name in node.output if _is_readable(self.view, self.probe, name)):
            laws = self.probe.tensors[name].laws
            self._latest |= {law: (name, axis) for axis, law in enumerate(laws) if law in self._wanted}

    def _is_read_off(self, node: NodeProto, name: str) -> bool:
        return name in node.input and name in self.lengths and self.lengths[name] in self._latest

    def _reading(self, length: str) -> str:
        """The length that `length` is, as (1,) or as a number, read off the latest tensor that has it."""
        tensor, axis = self._latest[self.lengths[length]]
        stem = f"{PREFIX}length/{tensor}/{axis}"
        made = [helper.make_node("Shape", [tensor], [stem], stem, start=axis, end=axis + 1)]
        facts = self.probe.tensors[length]
        if not facts.laws:
            made.append(helper.make_node("Squeeze", [stem], [f"{stem}/number"], f"{stem}/number"))
        for node in made:
            if node.output[0] not in self.facts:
                self.nodes.append(node)
                one = ((1,) * len(self.lengths[length]),)
                self.facts[node.output[0]] = replace(facts, laws=() if node.op_type == "Squeeze" else one)
        return str(made[-1].output[0])


def _is_readable(view: GraphView, probe: Probe, name: str) -> bool:
    """Is it a tensor of data, whose shape probing knows?"""
    known = name in probe.tensors and probe.tensors[name].dtype != "none"
    return known and name in view.data_valued and name not in view.data_shaped


def _lengths(probe: Probe, values: Mapping[str, _Values], symbols: frozenset[str]) -> Iterator[tuple[str, Law]]:
    """Tensors that hold one length that is worked out, and its law: those of dimensions that no input has."""
    inputs = {law for law, symbol in probe.symbols.items() if symbol in symbols or symbol == ROWS}
    for name, found in values.items():
        law = tuple(int(value.reshape(-1)[0]) for value in found if value.size == 1)
        if len(law) == len(found) and law in probe.symbols and law not in inputs:
            yield name, law


def _values(view: GraphView, probe: Probe) -> dict[str, _Values]:
    """The values, at each probed size, of the small integers that follow from shapes alone."""
    num_sizes = len(next(iter(probe.symbols)))
    constants = {name: tensor for name, tensor in view.initializers.items() if np.prod(tensor.dims) <= _SMALL}
    found: dict[str, _Values] = {}
    for node in view.nodes:
        if node.op_type == "Shape" and node.input[0] in probe.tensors:
            facts = probe.tensors[node.input[0]]
            if facts.dtype != "none" and node.input[0] not in view.data_shaped:
                laws = laws_taken(probe, node)
                found[node.output[0]] = [np.array([law[at] for law in laws], np.int64) for at in range(num_sizes)]
        elif any(name in found for name in node.input) and all(
            name in found or name in constants for name in node.input
        ):
            values = _evaluated(node, found, constants, num_sizes)
            if values is not None:
                found[node.output[0]] = values
    return {name: values for name, values in found.items() if name in probe.tensors}


def _evaluated(
    node: NodeProto, found: dict[str, _Values], constants: Mapping[str, TensorProto], num_sizes: int
) -> _Values | None:
    """What `node` makes at each size; None where that is not one small tensor of integers."""
    if node.domain or len(node.output) != 1 or any(attribute.HasField("g") for attribute in node.attribute):
        return None
    evaluator = ReferenceEvaluator(node)
    values: _Values = []
    fixed: dict[str, NDArray[np.generic]] = {
        name: numpy_helper.to_array(constants[name]) for name in node.input if name not in found
    }
    for at in range(num_sizes):
        feeds: dict[str, NDArray[np.generic]] = fixed | {name: found[name][at] for name in node.input if name in found}
        made: Any = evaluator.run(None, feeds)  # a list; its stub says a dict, too
        values.append(np.asarray(made[0]))
    small = all(value.size <= _SMALL and value.dtype == np.int64 for value in values)
    return values if small else None
