"""Parity of a decoder: segments and separate heads against its whole graph, on real inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import HIDDEN, LEARNED, DecoderSpec, ExitSpec
from offramp.export.chain import Arrays, Chain
from offramp.export.verify import Parity, Tolerance

# Fusions on one side of a cut and products of other shapes add in another order; docs/tolerances.md.
DECODER_TOLERANCE = Tolerance(1e-3, 1e-3)


class DecoderParts(NamedTuple):
    """What runs a decoder, exit by exit."""

    chain: Chain
    heads: Sequence[Any]  # sessions
    exits: Sequence[ExitSpec]
    states: Sequence[Sequence[str]]  # outputs of each segment
    spec: DecoderSpec


class Given(NamedTuple):
    """What a segment was given, and the hidden states (P, d) that its head was."""

    feed: Arrays
    hidden: NDArray[np.generic]


def verify_decoder(parity: Parity, parts: DecoderParts, whole: Any, batch: Arrays) -> list[Given]:
    """Compare segments and heads with `whole`, the session of the whole graph, on the inputs of `batch`.

    Logits and gates are compared where positions are active, states everywhere.
    """
    names = [output.name for output in whole.get_outputs()]
    expected = dict(zip(names, whole.run(names, batch), strict=True))
    rows = np.arange(len(batch[parts.spec.past_length]))
    given = []
    for index, (feed, out) in enumerate(parts.chain.run(batch, lambda _, __: rows)):
        exit_spec = parts.exits[index]
        places = active_places(parts.spec, batch, index)
        given.append(Given(feed, out[HIDDEN][places]))
        logits = run_head(parts.heads[index], given[-1].hidden)
        pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
            f"logits of exit {exit_spec.name}": (logits, expected[exit_spec.name][places])
        }
        if LEARNED in out:
            wanted = expected[exit_spec.learned][places]
            pairs[f"gate of exit {exit_spec.name}"] = out[LEARNED][places], wanted
        pairs |= {f"state {name}": (out[name], expected[name]) for name in parts.states[index]}
        for where, (got, wanted) in pairs.items():
            parity.chain.update(got, wanted, DECODER_TOLERANCE, where)
            parity.chain_bit_equal &= np.array_equal(got, wanted)
    return given


def active_places(spec: DecoderSpec, batch: Arrays, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and position of what is active in segment `index`: two arrays."""
    rows, length = batch[spec.input_ids].shape
    active = batch[spec.active[index - 1]] if index else np.tile(np.arange(length), (rows, 1))
    return np.repeat(np.arange(rows), active.shape[1]), active.reshape(-1).astype(np.int64)


def run_head(session: Any, hidden: NDArray[np.generic]) -> NDArray[np.float32]:
    """The logits (P, C) that a head gives to states (P, d)."""
    logits: NDArray[np.float32] = session.run(None, {HIDDEN: hidden})[0]
    return logits
