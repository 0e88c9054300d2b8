"""From text to the model's inputs, with the tokenizer of the bundle. The `tokenizers` package is optional."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import DimensionSpec, Manifest, TextSpec
from offramp.errors import BackendError, BundleError, InputError

_PADDING_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")  # BERT; RoBERTa and T5; GPT-2 family


class TextEncoder:
    """A tokenizer, parsed when first needed: opening a bundle for arrays does not pay for it."""

    def __init__(self, content: bytes, spec: TextSpec, manifest: Manifest) -> None:
        """`content` is the verified tokenizer file of the bundle."""
        self._content = content
        self._spec = spec
        self._num_min = _minimum_length(spec, manifest)

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """N texts to ids and mask, (N, T) int64, T that of the longest; longer ones are truncated.

        Raises InputError for anything but texts, and for a text of no tokens.
        """
        _check_texts(texts)
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        for position, ids in enumerate(tokens):
            if not ids:
                raise InputError(
                    f"text {position} ({texts[position]!r}) has no tokens for this tokenizer, expected at "
                    f"least one; leave out blank texts"
                )
        lengths = np.array([len(ids) for ids in tokens], np.int64)  # (N,)
        width = max(self._num_min, int(lengths.max(initial=0)))
        padded = np.full((len(tokens), width), self._padding_id, np.int64)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids)] = ids
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        return {self._spec.ids: padded, self._spec.mask: mask}

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _parsed(self._content, self._spec.tokenizer.path)
        tokenizer.no_padding()
        tokenizer.enable_truncation(self._spec.max_length)
        return tokenizer

    @cached_property
    def _padding_id(self) -> int:
        found = (self._tokenizer.token_to_id(token) for token in _PADDING_TOKENS)
        return next((int(token_id) for token_id in found if token_id is not None), 0)


class Detokenizer:
    """Texts to token ids and back, for a decoder: no padding, no truncation."""

    def __init__(self, content: bytes, bundle: str = "") -> None:
        """`content` is the verified tokenizer file of `bundle`, empty when it has none.

        Raises BackendError, BundleError.
        """
        self._bundle = bundle
        self._tokenizer = _parsed(content, "tokenizer.json") if content else None
        if self._tokenizer is not None:
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()

    @property
    def is_there(self) -> bool:
        """Has the bundle a tokenizer?"""
        return self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`. Raises InputError without a tokenizer."""
        ids: list[int] = self._checked().encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens. Raises InputError without a tokenizer."""
        text: str = self._checked().decode(list(tokens))
        return text

    def _checked(self) -> Any:
        if self._tokenizer is None:
            raise InputError(f"bundle {self._bundle!r} has no tokenizer: pass and take token ids")
        return self._tokenizer


def checked_tokens(texts: Sequence[Any], text: Detokenizer, manifest: Manifest) -> list[list[int]]:
    """Token ids of texts for a decoder, strings or token ids already. Raises InputError."""
    if isinstance(texts, str):
        raise InputError("prompts: got one str, expected a list of them; pass `[prompt]`")
    assert manifest.decoder is not None, "a decoder"
    vocabulary, most = manifest.exits[0].num_classes, manifest.decoder.max_positions
    found = []
    for number, given in enumerate(texts):
        tokens = text.encode(given) if isinstance(given, str) else [int(token) for token in given]
        if not 1 <= len(tokens) <= most or not all(0 <= token < vocabulary for token in tokens):
            raise InputError(
                f"prompt {number}: got {len(tokens)} tokens, expected 1 to {most}, each from 0 to {vocabulary - 1}"
            )
        found.append(tokens)
    return found


def _parsed(content: bytes, path: str) -> Any:
    """The tokenizer in `content`, the file `path` of the bundle. Raises BackendError, BundleError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise BackendError(
            "reading and writing text needs the `tokenizers` package, which is not installed here; run "
            "`pip install 'offramp[text]'`, or pass arrays to `Runner.run`"
        ) from exc
    try:
        return Tokenizer.from_buffer(content)
    except Exception as exc:  # tokenizers raises plain Exception
        raise BundleError(f"parsing {path}: {exc}; export the bundle again with the tokenizer of the model") from exc


def _minimum_length(spec: TextSpec, manifest: Manifest) -> int:
    """The shortest sequence the bundle takes; shorter texts are padded to it."""
    for tensor in manifest.inputs:
        if tensor.name == spec.ids and len(tensor.shape) == 2:
            length = tensor.shape[1]
            known = manifest.dimensions.get(str(length), DimensionSpec(1, spec.max_length)).min
            return length if isinstance(length, int) else known
    raise BundleError(
        f"bundle {manifest.name!r}: its tokenizer fills {spec.ids!r}, which is no input of shape "
        f"(rows, length); export the bundle again"
    )


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise InputError("texts: got one str, expected a list of them; pass `[text]`")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {position}: got {type(text).__name__}, expected str; decode bytes first")
