"""The prices of the minimum cut (offramp/export/costs.py) on this machine: of carrying a tensor, of an operator.

Physics: all of them are what one call more or one kilobyte more costs on ONNX Runtime's CPU provider. A small
operator is nearly all launch: look-up, output allocation, shape checks; 0.3 us when it was just run, several us
when the weights of a layer have gone through the caches since. A tensor that crosses a boundary is a gather, an
output wrapped as a numpy array, and a numpy array wrapped as an input. A byte moved is memory traffic, about
10 GB/s and core. A small matrix product does 10 to 50 GFLOP/s.

Measured: each price is a difference of two calls that differ in nothing else, divided by how much they differ by;
interleaved, medians, one thread, with as many bytes read before each call as a pass through MiniLM-L6 reads: that is
where a segment's small operators stand. `warm` gives the same without that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import onnxruntime
from machine import describe_machine
from onnx import NodeProto, TensorProto, helper

from offramp.export.costs import CostModel
from offramp.runtime.timing import interleaved_ms

SMALL = (1, 24)  # a mask of a usual sentence
WIDE = (1, 128, 384)  # MiniLM's hidden state at its longest: 192 KiB
HEADS = (1, 12, 24, 32)  # queries of a usual sentence
MORE = 16  # operators or tensors that the longer call of a pair has more
_FLOPS = 2 * 12 * 24 * 32 * 32  # of one product in `products`

_SWEPT_BYTES = 42 * 2**20  # weights of MiniLM-L6's layers in FP32
# Different kinds, because their code has to come into the caches too.
_KINDS = ["Add", "Mul", "Sub", "Div", "Max", "Min", "PRelu", "Pow"]

Call = Callable[[], object]
Shapes = dict[str, tuple[int, ...]]


def open_session(nodes: list[NodeProto], inputs: Shapes, outputs: list[str]) -> onnxruntime.InferenceSession:
    """A session on one thread; an input called rows is int64, all others are float32."""
    kinds = {name: TensorProto.INT64 if name == "rows" else TensorProto.FLOAT for name in inputs}
    graph = helper.make_graph(
        nodes,
        "priced",
        [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def filled(shapes: Shapes) -> dict[str, np.ndarray]:
    """Inputs for `open_session`; values small enough that a chain of operators stays finite."""
    return {
        name: np.zeros(shape, np.int64) if name == "rows" else np.full(shape, 0.03, np.float32)
        for name, shape in shapes.items()
    }


def operators(kinds: list[str], count: int, shape: tuple[int, ...], other: tuple[int, ...]) -> Call:
    """`count` operators in a row, of the kinds `kinds` in turn, each on the result before it and on one input."""
    nodes = [
        helper.make_node(kinds[step % len(kinds)], [f"x{step}", "other"], [f"x{step + 1}"]) for step in range(count)
    ]
    inputs = {"x0": shape, "other": other}
    session, feed = open_session(nodes, inputs, [f"x{count}"]), filled(inputs)
    return lambda: session.run(None, feed)


def boundary(num_carried: int, shape: tuple[int, ...]) -> Call:
    """Two sessions, the first one making MORE tensors and handing on `num_carried`, at least 1.

    Both sessions run the same operators whatever `num_carried`, but for its gathers.
    """
    made = [f"x{i}" for i in range(MORE)]
    before = [helper.make_node("Add", ["x", "x" if i == 0 else made[i - 1]], [name]) for i, name in enumerate(made)]
    carried = made[-num_carried:]
    gathers = [helper.make_node("Gather", [name, "rows"], [f"{name}_rows"], axis=0) for name in carried]
    sums = [
        helper.make_node("Add", [f"{carried[i % num_carried]}_rows", f"y{i}" if i else "y"], [f"y{i + 1}"])
        for i in range(MORE)
    ]
    rows: Shapes = {"rows": (1,)}
    first = open_session(before, {"x": shape}, carried)
    second = open_session([*gathers, *sums], {name: shape for name in carried} | rows | {"y": shape}, [f"y{MORE}"])
    start, fixed = filled({"x": shape}), filled(rows | {"y": shape})

    def run() -> object:
        return second.run(None, fixed | dict(zip(carried, first.run(carried, start), strict=True)))

    return run


def make_calls() -> dict[str, Call]:
    """Everything that is timed, by name."""
    return {
        "1 carried": boundary(1, SMALL),
        "more carried": boundary(MORE, SMALL),
        "1 carried, wide": boundary(1, WIDE),
        "more carried, wide": boundary(MORE, WIDE),
        "1 operator": operators(_KINDS, 1, SMALL, SMALL),
        "more operators": operators(_KINDS, 1 + MORE, SMALL, SMALL),
        "1 operator, wide": operators(["Add"], 1, WIDE, WIDE),
        "more operators, wide": operators(["Add"], 1 + MORE, WIDE, WIDE),
        "1 product": operators(["MatMul"], 1, HEADS, (1, 12, 32, 32)),
        "more products": operators(["MatMul"], 1 + MORE, HEADS, (1, 12, 32, 32)),
    }


def prices_from_medians(median_ns: dict[str, float]) -> dict[str, float]:
    """Prices as costs.CostModel has them."""
    kib = float(np.prod(WIDE)) * 4 / 1024
    carry_ns = (median_ns["more carried"] - median_ns["1 carried"]) / (MORE - 1)
    wide_carry_ns = (median_ns["more carried, wide"] - median_ns["1 carried, wide"]) / (MORE - 1)
    launch_ns = (median_ns["more operators"] - median_ns["1 operator"]) / MORE
    wide_launch_ns = (median_ns["more operators, wide"] - median_ns["1 operator, wide"]) / MORE
    product_ns = (median_ns["more products"] - median_ns["1 product"]) / MORE
    return {
        "carry_ns": carry_ns,
        "launch_ns": launch_ns,
        "ns_per_kib": (wide_launch_ns - launch_ns) / (3 * kib),  # two tensors read, one written
        "carry_ns_per_kib": (wide_carry_ns - carry_ns) / kib,
        "ns_per_kflop": (product_ns - launch_ns) / (_FLOPS / 1000),
    }


def measure_ns(repetitions: int, swept_bytes: int) -> dict[str, float]:
    """Median nanoseconds of every call, each after a sweep through `swept_bytes` of memory."""
    memory = np.ones(swept_bytes // 8)
    callables: dict[str, Call] = {}
    for name, call in make_calls().items():
        callables |= {f"sweep before {name}": memory.sum, name: call}
    times_ms = interleaved_ms(callables, repetitions, warmup=5)
    return {name: float(np.median(times)) * 1e6 for name, times in times_ms.items() if not name.startswith("sweep")}


def main() -> None:
    """Print progress to stderr, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows the script, no result")
    options = parser.parse_args()
    machine = describe_machine()
    repetitions = 3 if options.quick else options.repetitions
    prices: dict[str, dict[str, float]] = {}
    for name, swept_bytes in (("measured", _SWEPT_BYTES), ("warm", 0)):
        median_ns = measure_ns(repetitions, swept_bytes)
        for call, value in median_ns.items():
            print(f"{name}, {call}: {value / 1e3:.1f} us", file=sys.stderr)
        prices[name] = {price: round(value, 1) for price, value in prices_from_medians(median_ns).items()}
    used = asdict(CostModel())
    summary = {
        "bench": "cut_costs",
        "machine": machine,
        **prices,
        "used": {name: used[name] for name in prices["measured"] if name in used},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
