"""The resolvent of a ResNet-BK block: is it the dense inverse's, what does it cost over N, and what do experts cost?

Physics: a position needs about a dozen floating-point operations per sweep, and 24 sweeps reach float32 (the
contraction is a bit per sweep, models/resolvent.py); a sweep is five elementwise operators over all positions. So up to
some hundred positions the launches of 120 operators are all there is, and beyond the time grows with N. Compared with:
`scan`, ONNX's Scan, one step of the recurrence per position; and `maps`, a parallel scan of the 2 x 2 maps
L -> 1 / (a - L) by doubling (after 5 doublings a position knows the 32 before it, which is more than float32 tells
apart): fewer operators, but products of 4 x 4 real matrices at every position.

Experts: all four for every position (`dense`: two products), against gathering the positions of each expert and
scattering what it says (`routed`: a dozen operators per expert, a quarter of the arithmetic).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from machine import describe_machine
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.resolvent import causal_resolvent, resolvent_diagonal
from offramp.models.resolvent_block import Experts, largest
from offramp.runtime.onnxruntime_engine import open_session

LENGTHS = (1, 8, 128, 512, 2048, 8192)
DENSE = (1, 2, 17, 128, 512)
WIDTH, INNER, EXPERTS = 128, 256, 4
RESULT = Path(__file__).parent / "results" / "resolvent.json"


class Sweeps(nn.Module):
    """What a block does: potential (1, N) and the L before it (1, 2) to (1, N, 2)."""

    def forward(self, potential: Tensor, before: Tensor) -> Tensor:
        return causal_resolvent(potential, before)


class Maps(nn.Module):
    """The same by doubling: the map of 32 positions at each, then applied to what is before them."""

    def forward(self, potential: Tensor, before: Tensor) -> Tensor:
        real, length = potential - 2.0, potential.shape[1]
        scale = 1 / (real * real + 1).sqrt()  # so that products of 32 stay in float32's range
        parts = torch.zeros(3, 4, 4)  # 1, Re(a), Im(a) -> [[0, 1], [-1, a]] with complex numbers as 2 x 2 matrices
        parts[0, 0, 2] = parts[0, 1, 3] = parts[1, 2, 2] = parts[1, 3, 3] = parts[2, 3, 2] = 1
        parts[0, 2, 0] = parts[0, 3, 1] = parts[2, 2, 3] = -1
        maps = torch.stack([scale, real * scale, -scale], -1) @ parts.view(3, 16)
        maps = maps.view(1, -1, 4, 4)
        for doubling in range(5):
            nothing = torch.eye(4).expand(1, 2**doubling, 4, 4)
            maps = maps @ torch.cat([nothing, maps], 1)[:, :length]
        start = torch.cat([before, torch.ones(1, 1), torch.zeros(1, 1)], 1)[:, None, :, None]
        above, below = (maps @ start)[..., 0].chunk(2, -1)
        x, y, u, v = *above.unbind(-1), *below.unbind(-1)
        return torch.stack([x * u + y * v, y * u - x * v], -1) / (below * below).sum(-1, keepdim=True)


def exported(module: nn.Module) -> bytes:
    """The module as an ONNX file, any number of positions."""
    dynamic = ({1: torch.export.Dim.DYNAMIC}, None)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), (torch.randn(1, 40), torch.zeros(1, 2)), dynamo=True, opset_version=20,
            dynamic_shapes=dynamic, verbose=False, input_names=["potential", "before"], output_names=["left"],
        )  # fmt: skip
        assert program is not None
        program.save(str(Path(folder) / "model.onnx"))
        return (Path(folder) / "model.onnx").read_bytes()


def scan_graph() -> bytes:
    """The recurrence as one Scan over potential (1, N): L (2,) -> (a - L)* / |a - L|²."""
    shift, signs = np.array([-2.0, -1.0], np.float32), np.array([1.0, -1.0], np.float32)
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["one", "real"], ["place"]),
            helper.make_node("Add", ["place", "shift"], ["a"]),
            helper.make_node("Sub", ["a", "state"], ["d"]),
            helper.make_node("Mul", ["d", "signs"], ["conjugate"]),
            helper.make_node("ReduceSumSquare", ["d"], ["size"], keepdims=1),
            helper.make_node("Div", ["conjugate", "size"], ["next"]),
            helper.make_node("Identity", ["next"], ["out"]),
        ],
        "step",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name, size in (("state", 2), ("one", 1))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("next", "out")],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("shift", shift), ("signs", signs), ("real", np.array([1.0, 0.0], np.float32)))
        ],
    )
    nodes = [
        helper.make_node("Reshape", ["potential", "column"], ["steps"]),
        helper.make_node("Reshape", ["before", "pair"], ["first"]),
        helper.make_node("Scan", ["first", "steps"], ["last", "found"], body=body, num_scan_inputs=1),
        helper.make_node("Unsqueeze", ["found", "axis"], ["left"]),
    ]
    constants = {"column": [-1, 1], "pair": [2], "axis": [0]}
    return _model(nodes, {"potential": [1, "n"], "before": [1, 2]}, "left", [1, "n", 2], constants)


class Routed(nn.Module):
    """Each expert for the positions that ask it, gathered and scattered."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        states, parts = hidden.flatten(0, 1), self.experts  # (P, d)
        weights = largest(parts.router(states).softmax(-1), parts.top_k)  # (P, E)
        said = torch.zeros_like(states)
        for expert in range(EXPERTS):
            rows = slice(expert * INNER, (expert + 1) * INNER)
            asking = weights[:, expert].nonzero()[:, 0]
            inner = functional.gelu(functional.linear(states[asking], parts.up.weight[rows], parts.up.bias[rows]))
            weighed = functional.linear(inner, parts.down.weight[:, rows]) * weights[asking, expert][:, None]
            said = said.index_add(0, asking, weighed)
        return said.view_as(hidden)


def exported_experts(module: nn.Module) -> bytes:
    """Experts as an ONNX file, any number of positions."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), (torch.randn(1, 40, WIDTH),), dynamo=True, opset_version=20, verbose=False,
            dynamic_shapes=({1: torch.export.Dim.DYNAMIC},), input_names=["x"], output_names=["y"],
        )  # fmt: skip
        assert program is not None
        program.save(str(Path(folder) / "model.onnx"))
        return (Path(folder) / "model.onnx").read_bytes()


def _model(nodes: list[Any], inputs: dict[str, Any], output: str, shape: list[Any], constants: dict[str, Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def against_dense() -> dict[str, float]:
    """Largest difference of any position from a dense float64 inverse: two-sided, and the causal one's last entries."""
    worst = {"two_sided": 0.0, "causal": 0.0}
    for n in DENSE:
        potential = torch.from_numpy(np.random.default_rng(n).normal(0, 2, (2, n)))
        both, left = (torch.view_as_complex(f(potential).contiguous()) for f in (resolvent_diagonal, causal_resolvent))
        for row in range(2):
            matrix = np.diag(potential[row].numpy() - 2 - 1j) + np.eye(n, k=1) + np.eye(n, k=-1)
            wanted = np.diag(np.linalg.inv(matrix))
            worst["two_sided"] = max(worst["two_sided"], float(np.abs(both[row].numpy() - wanted).max()))
            for end in {1, n // 3 + 1, n}:
                last = np.linalg.inv(matrix[:end, :end])[-1, -1]
                worst["causal"] = max(worst["causal"], abs(complex(left[row, end - 1]) - last))
    return worst


def median_us(run: Callable[[], Any], seconds: float) -> float:
    """Median microseconds of a call, over `seconds` or 5 calls at least."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e6 * float(np.median(times)), 1)


def over_lengths(seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds by way and N; all ways agree with torch."""
    sessions = {
        "sweeps": open_session(exported(Sweeps()), 1, "sweeps"),
        "maps": open_session(exported(Maps()), 1, "maps"),
        "scan": open_session(scan_graph(), 1, "scan"),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in (*sessions, "torch")}
    for n in LENGTHS:
        potential = np.random.default_rng(n).normal(0, 1, (1, n)).astype(np.float32)
        feed = {"potential": potential, "before": np.array([[-0.3, 0.4]], np.float32)}
        given = torch.from_numpy(potential), torch.from_numpy(feed["before"])
        wanted = causal_resolvent(*given).numpy()
        for name, session in sessions.items():
            np.testing.assert_allclose(session.run(["left"], feed)[0], wanted, atol=1e-5)
            found[name][str(n)] = median_us(functools.partial(session.run, ["left"], feed), seconds)
        found["torch"][str(n)] = median_us(functools.partial(causal_resolvent, *given), seconds)
    return found


def over_experts(seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of four experts by way and number of positions."""
    torch.manual_seed(0)
    experts = Experts(WIDTH, INNER, EXPERTS, 1).eval()
    nn.init.normal_(experts.router.weight)
    ways = {"dense": experts, "routed": Routed(experts)}
    sessions = {name: open_session(exported_experts(module), 1, name) for name, module in ways.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for positions in (1, 8, 32, 128, 512):
        feed = {"x": np.random.default_rng(0).normal(0, 1, (1, positions, WIDTH)).astype(np.float32)}
        wanted = experts(torch.from_numpy(feed["x"])).numpy()
        for name, session in sessions.items():
            np.testing.assert_allclose(session.run(["y"], feed)[0], wanted, atol=1e-4)
            run = functools.partial(session.run, ["y"], feed)
            found[name][str(positions)] = median_us(run, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time per figure; writes no result")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    seconds = 0.05 if options.quick else 0.5
    with torch.no_grad():
        times = over_lengths(seconds)
        result = {
            "machine": describe_machine(),
            "threads": 1,
            "apart_from_dense_inverse": against_dense(),
            "us_by_positions": times,
            "us_per_position_8192_over_512": {
                name: round(found["8192"] / 16 / found["512"], 3) for name, found in times.items()
            },
            "experts_us_by_positions": over_experts(seconds),
        }
    if not options.quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
