"""Records the trace of a decoder: what every exit says at every position of some texts, and what a token costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.errors import DataError
from offramp.runtime.decoder import Decoder
from offramp.runtime.scorer import Scorer
from offramp.trace import Trace

_PAST, _ROUNDS = 64, 15  # positions before the tokens that are timed, and how many of these
_BACKEND = "onnxruntime"


class TokenCosts(NamedTuple):
    """Median milliseconds of one token of one text, with a short past."""

    segments_ms: NDArray[np.float64]  # (E,) gates included
    heads_ms: NDArray[np.float64]  # (E,) with scores where there is no gate

    def by_exit(self, has_gates: bool) -> NDArray[np.float64]:
        """(E,): what segment k adds to a token that comes so far.

        With gates a token meets one head only, wherever it leaves, counted in the first segment. Without them every
        exit is asked by its head.
        """
        if not has_gates:
            return self.segments_ms + self.heads_ms
        costs = self.segments_ms.copy()
        costs[0] += self.heads_ms.mean()
        return costs


def record_texts(scorer: Scorer, texts: Sequence[Any], precision: str) -> Trace:
    """The trace of `texts`, strings or token ids: a row per predicted token, labelled with what came.

    Costs are of one token in generation. Nothing else should run meanwhile. Raises InputError, DataError.
    """
    said = [text for text in scorer.said(texts) if len(text.tokens) > 1]
    if not said:
        raise DataError(f"recording a trace: got {len(texts)} texts without a second token, expected one at least")
    manifest, exits = scorer.decoder.manifest, scorer.decoder.num_exits
    learned = np.concatenate([text.learned for text in said])
    is_gated = [bool(spec.learned) for spec in manifest.exits]
    rows = len(learned)
    return Trace(
        logits=np.empty((rows, exits, 0), np.float32),
        scores=np.concatenate([text.scores for text in said]),
        predictions=np.concatenate([text.prediction for text in said]),
        temperatures=np.asarray(scorer.policy.temperatures or (1.0,) * exits, np.float64),
        labels=np.concatenate([text.tokens[1:] for text in said]),
        costs_ms=measure_token_costs(scorer.decoder).by_exit(all(is_gated[:-1])),
        fingerprint=manifest.fingerprint,
        backend=_BACKEND,
        precision=precision,
        learned=learned if any(is_gated) else np.empty((0, 0), np.float32),
        lengths=np.concatenate([np.full(len(text.tokens) - 1, len(text.tokens)) for text in said]),
        files=tuple(segment.graphs[precision].sha256 for segment in manifest.segments),
    )


def measure_token_costs(decoder: Decoder, rounds: int = _ROUNDS, past: int = _PAST) -> TokenCosts:
    """Time single tokens of one text through every segment and head; what the decoder holds in slot 0 is lost."""
    past = max(1, min(past, decoder.spec.max_positions - rounds, decoder.max_chunk))
    rounds = min(rounds, decoder.spec.max_positions - past)
    exits, inverse = decoder.num_exits, np.float32(1)
    is_gated = [bool(spec.learned) for spec in decoder.manifest.exits[:-1]] + [True]  # nothing asks the final one
    times = np.zeros((rounds, 2, exits))
    decoder.clear(0)
    for turn in range(-1, rounds):
        tokens = [0] * (past if turn < 0 else 1)
        for index in range(exits):
            start = time.perf_counter()
            chunk = decoder.advance(index, 0, [len(tokens)]) if index else decoder.read(0, [tokens])
            between = time.perf_counter()
            if is_gated[index]:
                decoder.logits(index, chunk.hidden[:, -1]).argmax()
            else:
                decoder.answer(index, chunk.hidden[:, -1], None, inverse)
            if turn >= 0:
                times[turn, :, index] = between - start, time.perf_counter() - between
    segments, heads = np.median(times, axis=0)
    decoder.clear(0)
    return TokenCosts(1e3 * segments, 1e3 * heads)
