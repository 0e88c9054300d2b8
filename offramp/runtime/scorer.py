"""Scores texts with a decoder whose positions leave at exits: how likely each token was, given those before it.

A row is a token position. Positions that left keep their hidden state, of which deeper layers still make keys and
values (CALM, arXiv 2207.07061, section 3.3); queries, FFNs and heads run for the others only. Texts are read in chunks,
the past of which is kept as in generation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import LEARNED, SCORES, load_manifest, read_file, read_policy
from offramp.errors import OptionError
from offramp.policy import Policy, PolicyState, joined
from offramp.runtime.decoder import Chunk, Decoder, open_decoder
from offramp.runtime.engine import SegmentOutput
from offramp.runtime.text import Detokenizer, checked_tokens
from offramp.scores import log_probabilities

_HEAD_ROWS = 128  # positions that a head answers at once: their logits over a vocabulary of 49,152 take 25 MB
_USUAL_CHUNK = 128
_MAX_PROB = SCORES.index("max_prob")


@dataclass(frozen=True)
class Scored:
    """One text of T tokens; the first one is given, so T - 1 were predicted."""

    tokens: NDArray[np.int64]  # (T,)
    log_probs: NDArray[np.float32]  # (T - 1,) natural logarithm of each token's probability at the exit it came from
    exit_index: NDArray[np.int64]  # (T - 1,)


@dataclass(frozen=True)
class Said:
    """What every exit says about every position of a text, at full depth."""

    tokens: NDArray[np.int64]  # (T,)
    log_probs: NDArray[np.float32]  # (T - 1, E) of the token that comes next
    prediction: NDArray[np.int64]  # (T - 1, E)
    scores: NDArray[np.float32]  # (T - 1, E, 3)
    learned: NDArray[np.float32]  # (T - 1, E) NaN for exits without


def perplexity(texts: Iterable[Scored]) -> float:
    """exp of the mean negative log probability of all predicted tokens; NaN where there are none."""
    log_probs = np.concatenate([text.log_probs for text in texts] or [np.empty(0, np.float32)]).astype(np.float64)
    return float(np.exp(-log_probs.mean())) if len(log_probs) else float("nan")


class _Positions(NamedTuple):
    """P positions of a chunk."""

    row: NDArray[np.int64]
    place: NDArray[np.int64]  # in the chunk
    target: NDArray[np.int64]  # the token that comes next

    def kept(self, keep: NDArray[Any]) -> _Positions:
        return _Positions(self.row[keep], self.place[keep], self.target[keep])


class _Part(NamedTuple):
    """One chunk of some texts, brought through the first segment."""

    numbers: list[int]  # of the texts, in the slots from 0 on
    start: int  # of the chunk in them
    goes_on: list[bool]  # is there another chunk of this text?
    chunk: Chunk
    positions: _Positions

    @property
    def is_last(self) -> bool:
        """Whether no text goes on after it."""
        return not any(self.goes_on)


class Scorer:
    """A decoder's bundle, ready to score; one call at a time."""

    def __init__(
        self, decoder: Decoder, policy: Policy, tokenizer: bytes = b"", chunk: int = _USUAL_CHUNK, threads: int = 0
    ) -> None:
        """`threads` take the logarithms of probabilities (0: one per core).

        Raises OptionError when the policy is for another model.
        """
        policy.check_model(decoder.manifest)
        if chunk < 1:
            raise OptionError(f"scoring: got a chunk of {chunk} positions, expected 1 or more")
        self.decoder, self.policy = decoder, policy
        self._chunk = min(chunk, decoder.max_chunk)
        self._text = Detokenizer(tokenizer, decoder.manifest.name)
        self._final = decoder.num_exits - 1
        self._inverse = policy.inverse_temperatures(decoder.num_exits)
        self._threads = threads or os.cpu_count() or 1
        self._workers = ThreadPoolExecutor(self._threads, "offramp-scoring")

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        policy: Policy | None = None,
        precision: str = "fp32",
        threads: int = 0,
        max_batch: int = 0,
        chunk: int = _USUAL_CHUNK,
    ) -> Scorer:
        """A scorer over the bundle in directory `bundle`; `policy=None` takes the bundle's own.

        `max_batch` texts are scored together (0: 8), `chunk` positions of each at a time.
        Raises OptionError, BundleError (CorruptError, VersionError) or BackendError.
        """
        path = Path(bundle)
        manifest = load_manifest(path)
        chosen = Policy.from_json(read_policy(path, manifest)) if policy is None else policy
        tokenizer = read_file(path, manifest.text.tokenizer) if manifest.text else b""
        return cls(open_decoder(path, manifest, precision, threads, max_batch), chosen, tokenizer, chunk, threads)

    def score(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[Scored]:
        """Score every text, strings or token ids, in their order. Raises InputError, BackendError."""
        found = [
            Scored(np.array(ids, np.int64), np.zeros(len(ids) - 1, np.float32), np.zeros(len(ids) - 1, np.int64))
            for ids in checked_tokens(texts, self._text, self.decoder.manifest)
        ]
        for part in self._parts([text.tokens for text in found]):
            for index, positions, log_probs in self._answers(part):
                for row in np.unique(positions.row).tolist():
                    own = positions.row == row
                    at = part.start + positions.place[own]
                    found[part.numbers[row]].log_probs[at] = log_probs[own]
                    found[part.numbers[row]].exit_index[at] = index
        return found

    def said(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[Said]:
        """What every exit says about every position of every text, at full depth. Raises as `score`."""
        exits = self.decoder.num_exits
        found = [
            Said(
                np.array(ids, np.int64),
                np.zeros((len(ids) - 1, exits), np.float32),
                np.zeros((len(ids) - 1, exits), np.int64),
                np.zeros((len(ids) - 1, exits, len(SCORES)), np.float32),
                np.full((len(ids) - 1, exits), np.nan, np.float32),
            )
            for ids in checked_tokens(texts, self._text, self.decoder.manifest)
        ]
        for part in self._parts([text.tokens for text in found]):
            chunk = part.chunk
            for index in range(exits):
                if index:
                    chunk = self.decoder.advance(index, 0, part.chunk.counts, is_last=part.is_last)
                self._note(found, part, index, chunk)
        return found

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises InputError when the bundle has no tokenizer."""
        return self._text.encode(text)

    def close(self) -> None:
        """Let go of everything."""
        self._workers.shutdown()
        self.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _parts(self, texts: Sequence[NDArray[np.int64]]) -> Iterator[_Part]:
        """Chunk after chunk of as many texts as there are slots, longest first, so that those that end are the last."""
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        for first in range(0, len(order), self.decoder.slots):
            numbers = order[first : first + self.decoder.slots]
            self.decoder.restart()
            start = 0
            while numbers := [number for number in numbers if len(texts[number]) - 1 > start]:
                end = start + self._chunk
                new = [texts[number][start : min(end, len(texts[number]) - 1)].tolist() for number in numbers]
                counts = np.array([len(tokens) for tokens in new])
                row = np.repeat(np.arange(len(new)), counts)
                place = np.concatenate([np.arange(count) for count in counts])
                target = np.concatenate([texts[number][start + 1 : end + 1] for number in numbers])
                goes_on = [len(texts[number]) - 1 > end for number in numbers]
                chunk = self.decoder.read(0, new, is_last=not any(goes_on))
                yield _Part(numbers, start, goes_on, chunk, _Positions(row, place, target))
                start = end

    def _answers(self, part: _Part) -> Iterator[tuple[int, _Positions, NDArray[np.float32]]]:
        """Exit, positions that it answered, and log probabilities of what came next: every position once."""
        chunk, live = part.chunk, part.positions
        state: PolicyState | None = None
        for index in range(self._final + 1):
            if index:
                chunk = self._advance(index, part, live)
            hidden = chunk.hidden[live.row, live.place]  # (P, d)
            learned = None if chunk.learned is None else chunk.learned[live.row, live.place]
            leaves, log_probs, state = self._leavers(index, hidden, learned, live.target, state)
            if leaves.any():
                yield index, live.kept(leaves), log_probs
            live = live.kept(~leaves)
            state = state.rows(~leaves) if state else None
            if not len(live.row) and part.is_last:
                return

    def _advance(self, index: int, part: _Part, live: _Positions) -> Chunk:
        """Bring the chunk through a segment, `live` positions really; texts that are over and answered stay behind."""
        if len(live.row) == len(part.positions.row):
            return self.decoder.advance(index, 0, part.chunk.counts, is_last=part.is_last)
        numbers = np.bincount(live.row, minlength=len(part.numbers))
        active = [places.tolist() for places in np.split(live.place, np.cumsum(numbers)[:-1])]
        needed = [bool(places) or more for places, more in zip(active, part.goes_on, strict=True)]
        counts = [count if is_needed else 0 for count, is_needed in zip(part.chunk.counts, needed, strict=True)]
        return self.decoder.advance(index, 0, counts, active, is_last=part.is_last)

    def _leavers(
        self,
        index: int,
        hidden: NDArray[np.float32],
        learned: NDArray[np.float32] | None,
        target: NDArray[np.int64],
        state: PolicyState | None,
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], PolicyState | None]:
        """Which of P positions leave an exit (P,), their log probabilities, and what the policy remembers of all P."""
        asked = "everyone" if index == self._final else self.policy.asks(index)
        leaves = np.zeros(len(hidden), np.bool_)
        if asked == "everyone":
            leaves[:] = True
        if asked == LEARNED:
            assert learned is not None, "the policy was checked"
            leaves, _, state = self.policy.decide(index, SegmentOutput.of_gate(learned), state)
        log_probs, states = [np.empty(0, np.float32)], []
        chosen = np.arange(len(hidden)) if asked == "answers" else leaves.nonzero()[0]
        for start in range(0, len(chosen), _HEAD_ROWS):
            some = chosen[start : start + _HEAD_ROWS]
            if asked == "answers":
                told = None if learned is None else learned[some]
                out = self.decoder.answer(index, hidden[some], told, self._inverse[index], self.policy.scores_read)
                leaves[some], _, after = self.policy.decide(index, out, state.rows(some) if state else None)
                found = log_probabilities(out.logits, target[some], self._inverse[index], out.scores[:, _MAX_PROB])
                log_probs.append(found[leaves[some]])
                states.append(after)
            else:
                log_probs += self._log_probabilities(index, hidden[some], target[some])
        return leaves, np.concatenate(log_probs), joined(states) if states else state

    def _log_probabilities(
        self, index: int, hidden: NDArray[np.float32], target: NDArray[np.int64]
    ) -> Iterator[NDArray[np.float32]]:
        """Those of the targets of P positions, a part per thread: numpy alone would leave all cores but one idle."""
        parts = np.array_split(self.decoder.logits(index, hidden), self._threads)
        inverse = [self._inverse[index]] * len(parts)
        return self._workers.map(log_probabilities, parts, np.array_split(target, self._threads), inverse)

    def _note(self, found: list[Said], part: _Part, index: int, chunk: Chunk) -> None:
        """Write down what an exit says about all positions of a chunk."""
        row, place, target = part.positions
        for start in range(0, len(row), _HEAD_ROWS):
            some = slice(start, start + _HEAD_ROWS)
            learned = None if chunk.learned is None else chunk.learned[row[some], place[some]]
            out = self.decoder.answer(index, chunk.hidden[row[some], place[some]], learned, self._inverse[index])
            log_probs = log_probabilities(out.logits, target[some], self._inverse[index], out.scores[:, _MAX_PROB])
            for slot in np.unique(row[some]).tolist():
                own = row[some] == slot
                text, at = found[part.numbers[slot]], part.start + place[some][own]
                text.log_probs[at, index], text.prediction[at, index] = log_probs[own], out.prediction[own]
                text.scores[at, index] = out.scores[own]
                if learned is not None:
                    text.learned[at, index] = learned[own]
