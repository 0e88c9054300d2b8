"""Attention as one operator of ONNX Runtime's CPU: what an exporter spells out in a dozen becomes MultiHeadAttention.

Only for graphs that ONNX Runtime runs; TensorRT does not know the operator, `expand_attention` writes it out again.
Left alone: grouped, rotated or time-major heads, and scores to which more is added than one mask.

The mask always goes in as `attention_bias`, zeros where the model has none. Without any, ONNX Runtime takes flash
attention, whose blocks follow the size of the L2 cache (contrib_ops/cpu/bert/multihead_attention.cc): its bits would
be those of one machine, and not those of the whole graph. With it, every row and head is one GEMM, softmax, GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper, parser

from offramp.bundle import Dimension
from offramp.export.graph import GraphView
from offramp.export.score_head import PREFIX
from offramp.export.simplify import drop_unread, known_shapes

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"
_NAME = f"{PREFIX}{OPERATOR}/"  # so start the names of the nodes that are made here
_SPLIT, _SWAP, _SPLIT_AND_SWAP = [0, 2, 1, 3], [0, 1, 3, 2], [0, 2, 3, 1]  # of (rows, tokens, heads, width)
# What the operator computes, as far as it is used here: no bias of its own, no padding mask.
_STANDARD = """
<domain: "com.microsoft", opset_import: ["" : OPSET]>
MultiHeadAttention <num_heads, scale> (query, key, value, bias, padding, mask) => (output)
{
    heads = Constant <value_int: int = @num_heads> ()
    factor = Constant <value_float: float = @scale> ()
    copied = Constant <value_ints = [0, 0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_alone = Reshape (heads, rest)
    apart = Concat <axis = 0> (copied, heads_alone, rest)
    together = Concat <axis = 0> (copied, rest)
    query_heads = Reshape (query, apart)
    key_heads = Reshape (key, apart)
    value_heads = Reshape (value, apart)
    queries = Transpose <perm = [0, 2, 1, 3]> (query_heads)
    keys = Transpose <perm = [0, 2, 3, 1]> (key_heads)
    values = Transpose <perm = [0, 2, 1, 3]> (value_heads)
    products = MatMul (queries, keys)
    scaled = Mul (products, factor)
    scores = Add (scaled, mask)
    weights = Softmax <axis = -1> (scores)
    weighted = MatMul (weights, values)
    context = Transpose <perm = [0, 2, 1, 3]> (weighted)
    output = Reshape (context, together)
}
"""


def fused_from_segment(model: ModelProto) -> ModelProto:
    """`model` with its attentions fused; itself if it has none."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy if fuse_attention(copy) else model


def fuse_attention(model: ModelProto) -> int:
    """Rewrite `model` in place and return how many attentions became one operator each.

    Reads shapes off the value_info, so call it before anything clears that; what it does not touch (all MatMuls with
    weights) may be quantized before or after.
    """
    finder, constants = _Finder(GraphView(model)), _Constants()
    found = {match.output: match for match in finder.matches()}
    masks: dict[tuple[str, Dimension, Dimension], str] = {}
    nodes: list[NodeProto] = []
    for node in finder.view.nodes:
        match = found.get(node.output[0])
        if match is None:
            nodes.append(node)
            continue
        key = (match.mask, match.tokens, match.keys)
        if key not in masks:
            masked = match if match.mask else replace(match, mask=constants.name(np.zeros((1, 1, 1, 1), np.float32)))
            made = _mask_nodes(masked, finder.shapes.get(match.mask, ()), constants, finder.view.opset)
            masks[key] = made[-1].output[0] if made else match.mask
            nodes += made
        nodes += _fused_nodes(match, masks[key], constants)
    if found:
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.arrays.items())
        _replace_nodes(model, nodes)
        drop_unread(model.graph)
        if all(entry.domain != DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return len(found)


def expand_attention(model: ModelProto) -> ModelProto:
    """`model` with attentions as `fuse_attention` writes them in standard operators again; itself if it has none.

    Attentions that came with the model, in whatever form, stay: then so do all.
    """
    found = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    if not found or not all(node.name.startswith(_NAME) for node in found):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.functions.append(parser.parse_function(_STANDARD.replace("OPSET", str(GraphView(model).opset))))
    expanded: ModelProto = inliner.inline_local_functions(copy)
    if all(node.domain != DOMAIN for node in expanded.graph.node):
        kept = [entry for entry in expanded.opset_import if entry.domain != DOMAIN]
        del expanded.opset_import[:]
        expanded.opset_import.extend(kept)
    return expanded


@dataclass(frozen=True)
class _Attention:
    """One attention: tensors of shape (rows, tokens or keys, heads x width), the mask, and what they make."""

    query: str
    key: str
    value: str
    mask: str  # broadcasts to (rows, heads, tokens, keys)
    scale: float
    heads: int
    tokens: Dimension
    keys: Dimension
    guarded: bool  # a query that may look at no key gets 0, not NaN
    output: str


@dataclass(frozen=True)
class _Heads:
    """A tensor (rows, length, heads x width) that is split into heads."""

    source: str
    rows: Dimension
    length: Dimension
    heads: Dimension
    width: Dimension


@dataclass(frozen=True)
class _Finder:
    """Finds attentions in a graph: from each Softmax on to the joined heads and back to what was split into heads."""

    view: GraphView

    @cached_property
    def shapes(self) -> dict[str, list[Dimension]]:
        constants = {name: list(tensor.dims) for name, tensor in self.view.initializers.items()}
        return constants | known_shapes(self.view.model.graph)

    @cached_property
    def floats(self) -> frozenset[str]:
        """Tensors known to be float32, the one type that the CPU has the operator for."""
        graph = self.view.model.graph
        values = (*graph.input, *graph.output, *graph.value_info)
        found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        constants = self.view.initializers.values()
        return frozenset(found | {tensor.name for tensor in constants if tensor.data_type == TensorProto.FLOAT})

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node, names in zip(self.view.nodes, self.view.reads, strict=True):
            for name in names:
                found.setdefault(name, []).append(node)
        return found

    def matches(self) -> Iterator[_Attention]:
        default = -1 if self.view.opset >= 13 else 1
        for node in self.view.nodes:
            if node.op_type == "Softmax" and _attribute(node, "axis", default) in (-1, 3):
                match = self._match(node)
                if match is not None:
                    yield match

    def _match(self, softmax: NodeProto) -> _Attention | None:
        ahead, scores = self._context(softmax), self._scores(softmax.input[0])
        if ahead is None or scores is None:
            return None
        product, guarded, output = ahead
        mask, scale, matmul = scores
        query, factor = self._scaled(matmul.input[0])
        key, other = self._scaled(matmul.input[1])
        split = self._split(query), self._split_keys(key), self._split(product.input[1])
        if None in split:
            return None
        q, k, v = (heads for heads in split if heads is not None)
        match = _Attention(
            query=q.source,
            key=k.source,
            value=v.source,
            mask=mask,
            scale=float(np.float32(scale * factor * other)),
            heads=int(q.heads),
            tokens=q.length,
            keys=k.length,
            guarded=guarded,
            output=output,
        )
        is_whole = (
            (q.rows, q.heads, q.width) == (k.rows, k.heads, k.width)
            and (k.rows, k.heads, k.length) == (v.rows, v.heads, v.length)
            and self._joins(product.output[0], output, v)
            and self._fits(match, q.rows)
        )
        return match if is_whole else None

    def _context(self, softmax: NodeProto) -> tuple[NodeProto, bool, str] | None:
        """The product with the values, whether NaN is made 0 before it, and the joined heads after it."""
        weights, guarded = softmax.output[0], False
        for node in self.readers.get(weights, []):
            if node.op_type == "Where" and node.input[2] == weights and self._constant(node.input[1]) == 0:
                asked = self._made_by(node.input[0], "IsNaN")
                if asked is not None and asked.input[0] == weights and len(self.readers[weights]) == 2:
                    weights, guarded = node.output[0], True
        if softmax.output[0] in self.view.output_names:
            return None
        product = self._only_reader(weights, "MatMul")
        if product is None or product.input[0] != weights or product.input[1] == weights:
            return None
        turned = self._only_reader(product.output[0], "Transpose")
        if turned is None or _attribute(turned, "perm", None) != _SPLIT:
            return None
        joined = self._only_reader(turned.output[0], "Reshape")
        return None if joined is None else (product, guarded, joined.output[0])

    def _scores(self, name: str) -> tuple[str, np.float32, NodeProto] | None:
        """The mask that was added, the scale, and the product of queries and keys, that no one else reads."""
        added = self._made_by(name, "Add")
        choices = [(name, "")] if added is None else [tuple(added.input), tuple(reversed(added.input))]
        for choice, mask in choices:
            source, scale = self._scaled(choice)
            product = self._made_by(source, "MatMul")
            alone = all(self._only_reader(tensor) for tensor in {name, choice, source})
            if product is not None and alone:
                return mask, scale, product
        return None

    def _scaled(self, name: str) -> tuple[str, np.float32]:
        """What `name` is a multiple of, and the factor."""
        for operator in ("Mul", "Div"):
            node = self._made_by(name, operator)
            if node is None:
                continue
            left, right = (self._constant(operand) for operand in node.input)
            if right is not None and left is None:
                return node.input[0], right if operator == "Mul" else np.float32(1) / right
            if left is not None and right is None and operator == "Mul":
                return node.input[1], left
        return name, np.float32(1)

    def _split(self, name: str, perm: Sequence[int] = _SPLIT) -> _Heads | None:
        """The tensor whose heads `name` holds apart, (rows, heads, length, width) or as `perm` puts that."""
        turned = self._made_by(name, "Transpose")
        if turned is None or _attribute(turned, "perm", None) != list(perm):
            return None
        parted = self._made_by(turned.input[0], "Reshape")
        if parted is None or parted.input[0] not in self.floats:
            return None
        before, after = self.shapes.get(parted.input[0], []), self.shapes.get(parted.output[0], [])
        if len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
            return None
        return _Heads(parted.input[0], *after) if all(isinstance(length, int) for length in after[2:]) else None

    def _split_keys(self, name: str) -> _Heads | None:
        """The same for the keys, whose last two axes are swapped: at once, or afterwards in one of two ways."""
        if swapped := self._made_by(name, "Transpose"):
            if _attribute(swapped, "perm", None) == _SWAP:
                return self._split(swapped.input[0])
            return self._split(name, _SPLIT_AND_SWAP)
        unfolded = self._made_by(name, "Reshape")  # as torch writes it: rows and heads in one axis meanwhile
        swapped = self._made_by(unfolded.input[0], "Transpose") if unfolded else None
        folded = self._made_by(swapped.input[0], "Reshape") if swapped else None
        if swapped is None or folded is None or _attribute(swapped, "perm", None) != [0, 2, 1]:
            return None
        before, meanwhile, after = (self.shapes.get(at) for at in (folded.input[0], folded.output[0], name))
        if before is None or meanwhile is None or after is None or len(meanwhile) != 3:
            return None
        is_swap = len(before) == 4 and before[2:] == meanwhile[1:] and after == [before[at] for at in _SWAP]
        return self._split(folded.input[0]) if is_swap else None

    def _joins(self, heads: str, output: str, value: _Heads) -> bool:
        """Does `output` have the heads side by side again, (rows, tokens, heads x width)?"""
        before, after = self.shapes.get(heads), self.shapes.get(output)
        if before is None or after is None or len(before) != 4:
            return False
        return after == [before[0], before[2], int(value.heads) * int(value.width)]

    def _fits(self, match: _Attention, rows: Dimension) -> bool:
        """Does the mask broadcast to the scores without making them larger?"""
        if not match.mask:
            return True
        shape = self.shapes.get(match.mask)
        if shape is None or match.mask not in self.floats or len(shape) > 4:
            return False
        wanted = (rows, match.heads, match.tokens, match.keys)[4 - len(shape) :]
        return all(length in (1, most) for length, most in zip(shape, wanted, strict=True))

    def _made_by(self, name: str, operator: str) -> NodeProto | None:
        index = self.view.producer.get(name)
        node = None if index is None else self.view.nodes[index]
        return node if node is not None and node.op_type == operator and not node.domain else None

    def _only_reader(self, name: str, operator: str = "") -> NodeProto | None:
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.view.output_names:
            return None
        return readers[0] if operator in ("", readers[0].op_type) and not readers[0].domain else None

    def _constant(self, name: str) -> np.float32 | None:
        """The value of a constant with one element."""
        tensor = self.view.initializers.get(name)
        if tensor is None and (node := self._made_by(name, "Constant")) is not None:
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        array = None if tensor is None else numpy_helper.to_array(tensor)
        return np.float32(array.item()) if array is not None and array.size == 1 and array.dtype == np.float32 else None


def _mask_nodes(match: _Attention, shape: Sequence[Dimension], constants: _Constants, opset: int) -> list[NodeProto]:
    """Stretch the mask to (rows or 1, heads or 1, tokens, keys), as the operator wants it; the last output has that."""
    lengths = (match.tokens, match.keys)
    stem = f"{PREFIX}mask/{match.output}"
    if len(shape) == 4 and tuple(shape[2:]) == lengths:
        return []
    nodes: list[NodeProto] = []
    parts: dict[Dimension, str] = {}
    for tensor, length in zip((match.query, match.key), lengths, strict=True):
        if isinstance(length, int):
            parts[length] = constants.name(np.array([length], np.int64))
        elif length not in parts:
            parts[length] = f"{stem}/{length}"
            nodes += _length_nodes(tensor, parts[length], constants, opset)
    operands = [constants.name(np.array([1, 1], np.int64)), *(parts[length] for length in lengths)]
    nodes.append(helper.make_node("Concat", operands, [f"{stem}/shape"], f"{stem}/Concat", axis=0))
    nodes.append(helper.make_node("Expand", [match.mask, f"{stem}/shape"], [stem], f"{stem}/Expand"))
    return nodes


def _length_nodes(tensor: str, length: str, constants: _Constants, opset: int) -> list[NodeProto]:
    """The length of axis 1 of `tensor` as (1,)."""
    if opset >= 15:  # Shape of some axes
        return [helper.make_node("Shape", [tensor], [length], length, start=1, end=2)]
    shape, axis = f"{length}/shape", constants.name(np.array([1], np.int64))
    return [
        helper.make_node("Shape", [tensor], [shape], shape),
        helper.make_node("Gather", [shape, axis], [length], length, axis=0),
    ]


def _fused_nodes(match: _Attention, mask: str, constants: _Constants) -> list[NodeProto]:
    result = f"{PREFIX}attention/{match.output}" if match.guarded else match.output
    fused = helper.make_node(
        OPERATOR,
        [match.query, match.key, match.value, "", "", mask],
        [result],
        f"{_NAME}{match.output}",
        domain=DOMAIN,
        num_heads=match.heads,
        scale=match.scale,
    )
    if not match.guarded:
        return [fused]
    # All weights of a query are NaN or none is, and then so is all that it gets: the guard may follow.
    asked, zero = f"{result}/is_nan", constants.name(np.zeros((), np.float32))
    return [
        fused,
        helper.make_node("IsNaN", [result], [asked], asked),
        helper.make_node("Where", [asked, zero, result], [match.output], f"{result}/Where"),
    ]


@dataclass(frozen=True)
class _Constants:
    """Constants that the rewriting adds, each once."""

    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def name(self, array: NDArray[np.generic]) -> str:
        text = "x".join(map(str, array.shape)) + "_" + "_".join(map(str, array.ravel().tolist()))
        name = f"{PREFIX}attention/{array.dtype}_{text}"
        self.arrays[name] = array
        return name


def _replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]  # deletion voids the originals
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _attribute(node: NodeProto, name: str, default: object) -> object:
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)
