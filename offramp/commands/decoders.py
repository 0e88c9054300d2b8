"""export and generate for decoders: from a Llama-like model, or one that was trained here, to a bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from offramp.bundle import Manifest
from offramp.errors import DataError, OptionError
from offramp.export.export_bundle import ExportOptions, Progress

if TYPE_CHECKING:
    from offramp.models.decoder import EarlyExitDecoder

CONFIG, TRAINED_FORMAT = "config.json", "offramp-decoder"

_TEXTS, _TOKENS = 4, 48  # real texts that the segments are verified on, and the tokens of each at most
_FEWEST_TOKENS = 16  # a chunk of several positions with a past, and then some
_VERIFYING = (  # when the caller has no text of their own: enough to compare two implementations with
    "The harbour lay quiet in the early morning, and only the gulls were busy along the empty quays, where nets hung "
    "out to dry and the boats of the fishermen knocked softly against the stones, waiting for the tide to turn again.",
    "To sort a list of numbers, one can compare neighbours and exchange them where they stand in the wrong order; this "
    "is repeated until nothing changes any more. It is easy to write and slow to run: it takes quadratic time.",
    "Question: How many sides has a hexagon, and how large is the sum of its angles? Answer: A hexagon has six sides, "
    "and since it can be divided into four triangles of 180 degrees each, the sum of its angles is 720 degrees.",
    "Dear Sir, I thank you for your letter of the third of May, in which you ask whether the house by the river is "
    "still to let. It is, and I should be glad to show it to you on any day of next week that suits you and yours.",
)


def is_decoder(path: Path) -> bool:
    """Is this a .gguf file, a directory of `transformers` with a model that generates, or one that was trained here?"""
    if path.suffix == ".gguf" or is_trained(path):
        return True
    config = path / CONFIG
    return config.is_file() and "ForCausalLM" in config.read_text(errors="replace")


def is_trained(path: Path) -> bool:
    """Is this a directory that `offramp train hierarchical-lm-…` wrote?"""
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == TRAINED_FORMAT


def export_llama(
    path: Path,
    output: Path,
    layers: Sequence[int],
    options: ExportOptions,
    progress: Progress,
    texts: Sequence[str] = (),
) -> Manifest:
    """Export the Llama-like model at `path` with exits after these numbers of layers (the last layer is added).

    Raises OptionError, DataError, ModelError, CaptureError, CutError, ParityError or StorageError.
    """
    from offramp.export.export_decoder import check_lowerings
    from offramp.models.llama import decoder_from_llama, load_llama

    check_lowerings(options)
    progress("loading")
    model, tokenizer = load_llama(path)
    total = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    if any(not 0 < layer <= total for layer in layers):
        raise OptionError(f"--layers {','.join(map(str, layers))}: the model has {total} layers; expected 1 to {total}")
    tokens = tokens_to_verify([tokenizer.encode(text) for text in (texts or _VERIFYING)[:_TEXTS]])
    stop = {tokenizer.eos_token_id, *as_list(model.config.eos_token_id)} - {None}  # type: ignore[union-attr, arg-type]
    decoder = decoder_from_llama(model, tuple(sorted({*layers, total})))
    about = _About(model_name(path), tokens, tokenizer.backend_tokenizer.to_str().encode(), tuple(sorted(stop)))
    return _export(decoder, about, output, options, progress)


def export_trained(
    path: Path, output: Path, layers: Sequence[int], options: ExportOptions, progress: Progress
) -> Manifest:
    """Export what `offramp train hierarchical-lm-…` left at `path`. Raises as `export_llama` does."""
    from tokenizers import Tokenizer

    from offramp.commands.hierarchical import load_trained
    from offramp.export.export_decoder import check_lowerings

    if layers:
        raise OptionError(f"--layers {','.join(map(str, layers))}: {path} has the exits that it was trained with")
    check_lowerings(options)
    progress("loading")
    trained = load_trained(path)
    tokenizer = Tokenizer.from_str(trained.tokenizer.decode())
    tokens = tokens_to_verify([tokenizer.encode(text).ids for text in _VERIFYING])
    about = _About(trained.name, tokens, trained.tokenizer, trained.stop_tokens)
    return _export(trained.decoder, about, output, options, progress)


class _About(NamedTuple):
    """What a bundle says of a decoder beside its graphs, and the tokens that these are verified on."""

    name: str
    tokens: list[list[int]]
    tokenizer: bytes
    stop_tokens: tuple[int, ...]


def _export(
    decoder: EarlyExitDecoder, about: _About, output: Path, options: ExportOptions, progress: Progress
) -> Manifest:
    from offramp.export.decoder_source import source_from_decoder
    from offramp.export.export_decoder import export_decoder

    progress(f"capturing {decoder.config.layers} layers with exits after {', '.join(map(str, decoder.config.exits))}")
    source = source_from_decoder(about.name, decoder, about.tokens)
    spec = replace(source.decoder, stop_tokens=about.stop_tokens)
    return export_decoder(replace(source, decoder=spec, tokenizer=about.tokenizer), output, options, progress)


def is_language_model(path: Path) -> bool:
    """Is this a checkpoint of `offramp train` with a language model?"""
    from offramp.models.checkpoint import is_checkpoint, load_config
    from offramp.models.kinds import KINDS

    kind = KINDS.get(load_config(path).get("kind", "")) if path.is_dir() and is_checkpoint(path) else None
    return kind is not None and kind.is_language_model


def export_language_model(
    path: Path, output: Path, options: ExportOptions, progress: Progress, texts: Sequence[str] = ()
) -> Manifest:
    """Export the checkpoint at `path`; verified on `texts`, or on those that training left beside it.

    Raises as `export_llama`.
    """
    from tokenizers import Tokenizer

    from offramp.commands.sources import calibration_texts
    from offramp.export.export_decoder import check_lowerings
    from offramp.models.checkpoint import load_checkpoint
    from offramp.models.corpora import END_OF_TEXT
    from offramp.models.language_model import LanguageModel

    check_lowerings(options)
    progress("loading")
    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint.model, LanguageModel) and checkpoint.tokenizer_path is not None  # noqa: PT018
    content = checkpoint.tokenizer_path.read_bytes()
    tokenizer = Tokenizer.from_buffer(content)
    chosen = list(texts or calibration_texts(path, ""))[:_TEXTS]
    tokens = tokens_to_verify([tokenizer.encode(text).ids for text in chosen])
    stop = tokenizer.token_to_id(END_OF_TEXT)
    about = _About(model_name(path), tokens, content, () if stop is None else (stop,))
    return _export(checkpoint.model.decoder, about, output, options, progress)


def model_name(path: Path) -> str:
    """What the bundle of the model at `path` is called: without the ending of a file, with all of a directory."""
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def tokens_to_verify(encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first tokens of every text, as many of each. Raises DataError when a text is too short."""
    common = min(_TOKENS, *map(len, encoded)) if encoded else 0
    if len(encoded) < 2 or common < _FEWEST_TOKENS:
        raise DataError(
            f"texts to verify a decoder with: got {len(encoded)}, the shortest of {common} tokens; expected 2 or more "
            f"of {_FEWEST_TOKENS} tokens or more each"
        )
    return [list(tokens[:common]) for tokens in encoded]


def as_list(value: int | Sequence[int] | None) -> Sequence[int]:
    """What a config has as a number, as several, or not at all."""
    return [value] if isinstance(value, int) else (value or [])
