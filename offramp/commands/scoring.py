"""Scores a file of texts with a decoder's bundle: perplexity, and where positions left."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.commands.dataset import ROTTEN_TOMATOES, arrays_from_npz
from offramp.errors import DataError
from offramp.runtime.scorer import Scored, Scorer, perplexity

_TOKENS = "input_ids"  # of an .npz: (texts, tokens)
_TEXTS_AT_ONCE = 64  # sorted by length among themselves: little padding, bounded memory


@dataclass(frozen=True)
class ScoreReport:
    """What scoring found. Per exit: the share of positions that left there, and perplexity over those."""

    perplexity: float
    num_texts: int
    num_tokens: int  # predicted ones
    mean_depth: float  # in segments
    exit_shares: tuple[float, ...]
    exit_perplexities: tuple[float | None, ...]  # None where nobody left

    def lines(self) -> Iterator[str]:
        """The report as lines of text."""
        yield f"perplexity {self.perplexity:.4f} on {self.num_tokens} tokens of {self.num_texts} texts"
        yield f"mean depth {self.mean_depth:.3f} segments"
        for index, (share, found) in enumerate(zip(self.exit_shares, self.exit_perplexities, strict=True)):
            yield f"exit {index}: {share:.1%} of the tokens" + ("" if found is None else f", perplexity {found:.4f}")


def score_texts(scorer: Scorer, data: str, limit: int = 0) -> ScoreReport:
    """Score the texts of `data`, the first `limit` of them (0: all). Raises DataError, InputError."""
    found: list[Scored] = []
    texts = windows(scorer, texts_to_score(data, limit))
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        found += scorer.score(texts[start : start + _TEXTS_AT_ONCE])
    exits = np.concatenate([text.exit_index for text in found])
    if not len(exits):
        raise DataError(f"scoring {data}: got {len(found)} texts of one token or none; expected two tokens or more")
    log_probs = np.concatenate([text.log_probs for text in found]).astype(np.float64)
    number = scorer.decoder.num_exits
    left = [log_probs[exits == index] for index in range(number)]
    return ScoreReport(
        perplexity(found),
        len(found),
        len(exits),
        float(exits.mean()) + 1,
        tuple((np.bincount(exits, minlength=number) / len(exits)).tolist()),
        tuple(float(np.exp(-some.mean())) if len(some) else None for some in left),
    )


def texts_to_score(data: str, limit: int = 0) -> list[Any]:
    """Texts of a file (.txt: one per line; .csv, .jsonl) or of stdin (-), or token ids of an .npz. Raises DataError."""
    found: Sequence[Any]
    if data == ROTTEN_TOMATOES:
        from offramp.models.data import load_rotten_tomatoes

        found = [example.text for example in load_rotten_tomatoes().validation]
    elif data == "-":
        found = [line.rstrip("\n") for line in sys.stdin]
    elif data.endswith(".npz"):
        arrays = arrays_from_npz(Path(data))
        if _TOKENS not in arrays or arrays[_TOKENS].ndim != 2:
            raise DataError(f"{data} holds {', '.join(arrays)}; expected {_TOKENS} (texts, tokens)")
        found = arrays[_TOKENS].tolist()
    else:
        from offramp.models.data import checked_text, records_from

        found = [checked_text(record, Path(data), number) for number, record in enumerate(records_from(Path(data)), 1)]
    texts = [text for text in found if len(text)]
    if not texts:
        raise DataError(f"{data}: got no texts, expected at least one")
    return texts[:limit] if limit else texts


def windows(scorer: Scorer, texts: Sequence[Any]) -> list[list[int]]:
    """Token ids of all texts; one longer than the bundle allows becomes several, each scored for itself."""
    most = scorer.decoder.spec.max_positions
    pieces = []
    for text in texts:
        tokens = scorer.encode(text) if isinstance(text, str) else list(text)
        pieces += [tokens[start : start + most] for start in range(0, len(tokens), most)]
    return pieces
