"""What carrying a tensor and running an operator again cost, in nanoseconds: the prices of the minimum cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from offramp.export.graph import GraphView, inner_graphs
from offramp.export.mincut import CutProblem
from offramp.export.probe import Probe

# Operators that hold a learned layer when one of their inputs is a weight; a learned layer is never run twice.
_LEARNED = frozenset(
    {
        *("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "Attention"),
        *("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DeformConv", "MultiHeadAttention"),
    }
)
_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Attention"})  # work = 2 x outputs x inner length


@dataclass(frozen=True)
class CostModel:
    """Prices on ONNX Runtime's CPU provider, measured by bench/cut_costs.py (bench/results/cut_costs.json)."""

    rows: int = 1  # the batch that prices are for: a gateway answers one request at a time
    carry_ns: float = 3_700  # one tensor more at a boundary: its gather, its way out to numpy and in again
    carry_ns_per_kib: float = 160  # of such a tensor: written, gathered, read again from cold memory
    launch_ns: float = 1_600  # one small operator more
    ns_per_kib: float = 12  # read or written by an operator
    ns_per_kflop: float = 13  # small matrix products

    def problem(self, view: GraphView, probe: Probe, reads: Sequence[Sequence[str]]) -> CutProblem:
        """The cut problem of `view` when node i really needs the data of the tensors `reads[i]`."""
        computed, makes, rerun = [], [], []
        for index, node in enumerate(view.nodes):
            made = tuple(name for name in node.output if name in probe.tensors)
            computed.append(tuple(name for name in reads[index] if name in probe.tensors))
            makes.append(made)
            rerun.append(self._rerun_ns(probe, node, made, not view.data_valued.isdisjoint(made)))
        return CutProblem(computed, makes, {name: self._carry_ns(probe, name) for name in probe.tensors}, rerun)

    def _carry_ns(self, probe: Probe, name: str) -> int | None:
        facts = probe.tensors[name]
        if facts.row_axis is None:
            return None
        kib = self.rows * facts.bytes_per_row / 1024
        turned_ns = 2 * (self.launch_ns + 2 * self.ns_per_kib * kib) if facts.row_axis else 0  # to the front, and back
        return round(self.carry_ns + self.carry_ns_per_kib * kib + turned_ns)

    def _rerun_ns(self, probe: Probe, node: NodeProto, made: tuple[str, ...], depends_on_data: bool) -> int | None:
        has_weight = any(name and name not in probe.tensors for name in node.input)
        is_learned = has_weight and node.op_type in _LEARNED
        if depends_on_data and (is_learned or any(inner_graphs(node))):  # a loop may hold learned layers
            return None
        moved = sum(probe.tensors[name].bytes_per_row for name in (*node.input, *made) if name in probe.tensors)
        return round(self.launch_ns + self.rows * (self.ns_per_kib * moved / 1024 + self._product_ns(probe, node)))

    def _product_ns(self, probe: Probe, node: NodeProto) -> float:
        """Arithmetic of one row of a matrix product of two computed tensors, as far as shapes tell."""
        if node.op_type not in _PRODUCTS or node.input[0] not in probe.tensors:
            return 0.0
        left, out = probe.tensors[node.input[0]], probe.tensors[node.output[0]]
        inner = left.laws[-1][0] if left.laws else 1
        return self.ns_per_kflop * 2 * out.bytes_per_row / 4 * inner / 1000
