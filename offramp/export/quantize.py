"""Lower segment graphs to INT8 for ONNX Runtime's CPU kernels: static scales, so a row's answer is its own.

Products with constant weights (MatMul, Gemm) take 8-bit activations, unsigned, one scale per tensor, and 8-bit
weights, signed, one scale per column; all else stays in FP32, the score head, the exit heads and every input and output
among it. The ranges are those of the inputs that the segment really gets. An activation whose rounding shows at the
segment's outputs is levelled first, and its products stay in FP32 where that does not help either.

Written as QuantizeLinear and com.microsoft.MatMulIntegerToFloat, what ONNX Runtime itself makes of QuantizeLinear,
DequantizeLinear and MatMul, because that operator takes the bias along: 8 to 11 % faster (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from offramp.export.chain import Arrays, open_session
from offramp.export.choices import choices_of, taking_choices, telling_choices
from offramp.export.graph import GraphView
from offramp.export.score_head import PREFIX
from offramp.export.verify import relative_error

Treatment = Literal["fp32", "plain", "levelled"]
Progress = Callable[[str], None]

# Below this many weights a product in FP32 is faster than quantizing its input (128 x 128 on one core): exit heads.
_MIN_WEIGHTS = 128 * 128
# Error at the segment's outputs, RMS of the difference ÷ RMS, of one activation quantized alone. On the demo model
# those of plain activations are 0.001 to 0.022, those with a channel of outliers 0.033 to 0.069, and levelled 0.014 to
# 0.058 (docs/tolerances.md).
_LEVEL_ABOVE = 0.03
_FP32_ABOVE = 0.1
_LEVEL_QUANTILE = 0.95  # of the channels' magnitudes: what is larger is divided down to this
_TRIED_BATCHES = 4  # on which errors are measured
_STEPS = 255  # of an unsigned activation
_LIMIT = 127  # of a weight; -128 is not used, so that negating weights negates products


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with constant weights (K, N), and the Add of its bias if that can go along."""

    node: int
    activation: str
    weights: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    output: str
    bias_node: int = -1


@dataclass(frozen=True)
class Range:
    """What an activation was seen to be, per channel of its last axis."""

    low: NDArray[np.float32]  # (K,)
    high: NDArray[np.float32]  # (K,)

    @property
    def divisors(self) -> NDArray[np.float32]:
        """What to divide channels by, 1 for most, so that none is larger than most are."""
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        usual = max(float(np.quantile(largest, _LEVEL_QUANTILE)), 1e-12)
        return np.maximum(1, largest / usual).astype(np.float32)

    def levelled(self) -> Range:
        return Range(self.low / self.divisors, self.high / self.divisors)


@dataclass(frozen=True)
class Quantized:
    """A lowered segment, and what was done about each activation that a product with constant weights reads."""

    model: ModelProto
    treatments: dict[str, Treatment]
    errors: dict[str, float]  # at the segment's outputs, each activation quantized alone as well as it can be

    @property
    def unusual(self) -> dict[str, str]:
        """The activations that were levelled or stay in FP32."""
        return {name: treatment for name, treatment in self.treatments.items() if treatment != "plain"}


def int8_from_segment(model: ModelProto, feeds: Sequence[Arrays], progress: Progress = lambda _: None) -> Quantized:
    """`model` with its large products in INT8; `feeds` are complete inputs of the segment, from real data."""
    products = products_from_graph(model)
    activations = tuple(dict.fromkeys(product.activation for product in products))
    if not activations:
        return Quantized(model, {}, {})
    ranges = _ranges(model, activations, feeds)
    trial = _Trial.of(model, products, ranges, feeds[:_TRIED_BATCHES])
    treatments: dict[str, Treatment] = {}
    errors = {}
    for count, name in enumerate(activations, start=1):
        treatments[name], errors[name] = trial.treatment(name)
        progress(
            f"segment {model.graph.name[-2:]}, activation {count} of {len(activations)}: "
            f"{treatments[name]}, error {errors[name]:.3f}"
        )
    return Quantized(_quantized(model, products, ranges, treatments), treatments, errors)


def products_from_graph(model: ModelProto) -> list[Product]:
    """The products with constant weights that are large enough to gain, in the order of the graph."""
    view = GraphView(model)
    given = {value.name for value in model.graph.input}
    constants = {
        name: tensor
        for name, tensor in view.initializers.items()
        if tensor.data_type == TensorProto.FLOAT and name not in given
    }
    found = []
    for index, node in enumerate(view.nodes):
        if node.op_type not in ("MatMul", "Gemm") or node.domain:
            continue
        left, right = node.input[:2]
        if left in constants or right not in constants or len(constants[right].dims) != 2:
            continue
        weights = numpy_helper.to_array(constants[right])
        if weights.size < _MIN_WEIGHTS or not np.isfinite(weights).all():
            continue
        made = _product_from_gemm if node.op_type == "Gemm" else _product_from_matmul
        product = made(view, Product(index, left, weights, None, node.output[0]), constants)
        if product is not None:
            found.append(product)
    return found


def _product_from_gemm(view: GraphView, product: Product, constants: Mapping[str, TensorProto]) -> Product | None:
    """`product` with the bias of its Gemm; None when the Gemm does more than a product and a bias per column."""
    node = view.nodes[product.node]
    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if options.get("transA", 0) or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
        return None
    if options.get("transB", 0):
        product = replace(product, weights=np.ascontiguousarray(product.weights.T))
    if len(node.input) < 3 or not node.input[2]:
        return product
    bias = _bias(constants.get(node.input[2]), product)
    return None if bias is None else replace(product, bias=bias)


def _product_from_matmul(view: GraphView, product: Product, constants: Mapping[str, TensorProto]) -> Product:
    """`product` with the Add of a constant per column that alone reads it, if there is one."""
    readers = [index for index, names in enumerate(view.reads) if product.output in names]
    if len(readers) != 1 or product.output in view.output_names:
        return product
    node = view.nodes[readers[0]]
    others = [name for name in node.input if name != product.output]
    if node.op_type != "Add" or node.domain or len(others) != 1:
        return product
    bias = _bias(constants.get(others[0]), product)
    return product if bias is None else replace(product, bias=bias, output=node.output[0], bias_node=readers[0])


def _bias(tensor: TensorProto | None, product: Product) -> NDArray[np.float32] | None:
    """`tensor` (N,) or (1, N) as (N,), None when it is something else."""
    columns = product.weights.shape[1]
    if tensor is None or list(tensor.dims) not in ([columns], [1, columns]):
        return None
    return numpy_helper.to_array(tensor).reshape(-1)


def _ranges(model: ModelProto, activations: Sequence[str], feeds: Sequence[Arrays]) -> dict[str, Range]:
    """What `activations` are on `feeds`, from the smallest to the largest.

    Percentiles did worse: the few largest values are a channel that the model reads (docs/log.md).
    """
    watched = ModelProto()
    watched.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    watched.graph.output.extend(ValueInfoProto(name=name) for name in activations if name not in outputs)
    session = open_session(watched)
    found: dict[str, Range] = {}
    for feed in feeds:
        for name, value in zip(activations, session.run(list(activations), feed), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            low, high = rows.min(0), rows.max(0)
            known = found.get(name, Range(low, high))
            found[name] = Range(np.minimum(known.low, low), np.maximum(known.high, high))
    return found


@dataclass(frozen=True)
class _Trial:
    """A segment in FP32 and what it answers, to measure what quantizing one activation changes."""

    model: ModelProto
    products: Sequence[Product]
    ranges: Mapping[str, Range]
    feeds: Sequence[Arrays]
    outputs: tuple[str, ...]
    expected: Sequence[Sequence[NDArray[np.generic]]]
    choices: tuple[str, ...]  # that `feeds` have, too: those made in FP32

    @classmethod
    def of(
        cls, model: ModelProto, products: Sequence[Product], ranges: Mapping[str, Range], feeds: Sequence[Arrays]
    ) -> _Trial:
        outputs = tuple(
            value.name
            for value in model.graph.output
            if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name != "scores"
        )
        choices = choices_of(model)
        session = open_session(telling_choices(model, choices))
        said = [session.run([*outputs, *choices], feed) for feed in feeds]
        count = len(outputs)
        given = [
            {**feed, **dict(zip(choices, values[count:], strict=True))}
            for feed, values in zip(feeds, said, strict=True)
        ]
        return cls(model, products, ranges, given, outputs, [values[:count] for values in said], choices)

    def treatment(self, activation: str) -> tuple[Treatment, float]:
        """The cheapest treatment of `activation` with an error that may be, and the error of quantizing it."""
        plain = self.error(activation, "plain")
        if plain <= _LEVEL_ABOVE:
            return "plain", plain
        levelled = self.error(activation, "levelled")
        best: tuple[Treatment, float] = ("levelled", levelled) if levelled < plain else ("plain", plain)
        return best if best[1] <= _FP32_ABOVE else ("fp32", best[1])

    def error(self, activation: str, treatment: Treatment) -> float:
        """The largest error of any output when `activation` alone is quantized."""
        lowered = _quantized(self.model, self.products, self.ranges, {activation: treatment})
        session = open_session(taking_choices(lowered, self.choices))
        got = [session.run(list(self.outputs), feed) for feed in self.feeds]
        pairs = zip(zip(*got, strict=True), zip(*self.expected, strict=True), strict=True)
        return max(relative_error(left, right) for left, right in pairs)


def _quantized(
    model: ModelProto, products: Sequence[Product], ranges: Mapping[str, Range], treatments: Mapping[str, Treatment]
) -> ModelProto:
    """`model` with the products of the activations in `treatments` quantized, those to stay in FP32 left out."""
    chosen = [product for product in products if treatments.get(product.activation, "fp32") != "fp32"]
    at = {product.node: product for product in chosen}
    dropped = {product.bias_node for product in chosen}
    lowered = ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    constants: dict[str, NDArray[np.generic]] = {}
    nodes: list[NodeProto] = []
    done: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if index not in at:
            nodes += [node] if index not in dropped else []
            continue
        product = at[index]
        levelled = treatments[product.activation] == "levelled"
        if product.activation not in done:
            done.add(product.activation)
            nodes += _activation_nodes(product.activation, ranges[product.activation], levelled, constants)
        weights = product.weights * ranges[product.activation].divisors[:, None] if levelled else product.weights
        nodes.append(_product_node(node, product, weights, constants))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in GraphView(lowered).reads for name in node}
    made = {name for node in nodes for name in node.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    values = [value for value in graph.value_info if value.name in made]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in constants.items())])
    graph.value_info.extend(values)
    if not any(entry.domain == "com.microsoft" for entry in lowered.opset_import):
        lowered.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.checker.check_model(lowered)
    return lowered


def _activation_nodes(
    activation: str, seen: Range, levelled: bool, constants: dict[str, NDArray[np.generic]]
) -> list[NodeProto]:
    """`activation` as unsigned bytes; its scale and zero point are constants. 0 is always exact: padding is 0."""
    name, source, nodes = f"{PREFIX}int8/{activation}", activation, []
    if levelled:
        constants[f"{name}/factors"] = 1 / seen.divisors
        source = f"{name}/levelled"
        nodes.append(helper.make_node("Mul", [activation, f"{name}/factors"], [source], f"{name}/Mul"))
        seen = seen.levelled()
    low, high = min(0.0, float(seen.low.min())), max(0.0, float(seen.high.max()))
    scale = np.float32((high - low) / _STEPS or 1.0)
    constants[f"{name}/scale"] = np.asarray(scale)
    constants[f"{name}/zero"] = np.asarray(np.clip(np.rint(-low / scale), 0, _STEPS), np.uint8)
    operands = [source, f"{name}/scale", f"{name}/zero"]
    nodes.append(helper.make_node("QuantizeLinear", operands, [f"{name}/bytes"], f"{name}/QuantizeLinear"))
    return nodes


def _product_node(
    node: NodeProto, product: Product, weights: NDArray[np.float32], constants: dict[str, NDArray[np.generic]]
) -> NodeProto:
    """`product` with bytes for its activation and its weights (K, N), and its result in FP32."""
    given, name = f"{PREFIX}int8/{product.activation}", f"{PREFIX}int8/{product.output}"
    largest = np.abs(weights).max(0)  # (N,)
    scales = np.where(largest > 0, largest / _LIMIT, 1).astype(np.float32)
    constants[f"{name}/weights"] = np.clip(np.rint(weights / scales), -_LIMIT, _LIMIT).astype(np.int8)
    constants[f"{name}/scales"] = scales
    constants[f"{name}/zeros"] = np.zeros(len(scales), np.int8)
    operands = [f"{given}/bytes", f"{name}/weights", f"{given}/scale", f"{name}/scales", f"{given}/zero"]
    operands.append(f"{name}/zeros")
    if product.bias is not None:
        constants[f"{name}/bias"] = product.bias
        operands.append(f"{name}/bias")
    return helper.make_node(
        "MatMulIntegerToFloat",
        operands,
        [product.output],
        f"{PREFIX}int8/{node.name or product.output}",
        domain="com.microsoft",
    )
