"""Choices inside a segment: which tokens stay when a pruning keeps the most important ones.

Where two are about as important, it turns on the last bit which one stays, and everything behind is shifted by a
place. So when another precision of a segment is compared with FP32, both are given the choices of FP32; what other
choices do to the answers is seen end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from offramp.export.chain import Chain, open_session
from offramp.export.graph import GraphView

_PLACES = 1  # of TopK's outputs: values, places


def choices_of(model: ModelProto) -> tuple[str, ...]:
    """The tensors of `model` that say which places a TopK has chosen, where something reads them."""
    read = {name for names in GraphView(model).reads for name in names}
    made = (node.output[_PLACES] for node in model.graph.node if node.op_type == "TopK" and len(node.output) > _PLACES)
    return tuple(name for name in made if name in read)


def telling_choices(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """`model` with the choices `names` as further outputs."""
    told = ModelProto()
    told.CopyFrom(model)
    told.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return told


def taking_choices(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """`model` with the choices `names` as further inputs; its nodes stay where they are."""
    taking = ModelProto()
    taking.CopyFrom(model)
    for node in taking.graph.node:
        for place, name in enumerate(node.output):
            if name in names:
                node.output[place] = f"{name}/unread"
    kept = [value for value in taking.graph.value_info if value.name not in names]
    del taking.graph.value_info[:]
    taking.graph.value_info.extend(kept)
    taking.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names)
    return taking


def with_same_choices(fp32: Chain, lowered: Chain) -> tuple[Chain, Chain, list[tuple[str, ...]]]:
    """Both chains, to be run by segments, and the choices in each: outputs of the first, inputs of the second."""
    tell, take, choices = list(fp32.sessions), list(lowered.sessions), []
    for index, (one, other) in enumerate(zip(fp32.models, lowered.models, strict=True)):
        names = tuple(name for name in choices_of(one) if name in choices_of(other))
        choices.append(names)
        if names:
            tell[index], take[index] = (
                open_session(change(model, names))
                for change, model in ((telling_choices, one), (taking_choices, other))
            )
    return replace(fp32, sessions=tell), replace(lowered, sessions=take), choices
