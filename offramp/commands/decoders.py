"""export and generate for decoders: from a Llama-like model, or one that was trained here, to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from offramp.bundle import Manifest
from offramp.errors import DataError, OptionError
from offramp.export.export_bundle import ExportOptions, Progress

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
    """Is this a .gguf file, or a directory of `transformers` with a model that generates?"""
    if path.suffix == ".gguf":
        return True
    config = path / "config.json"
    return config.is_file() and "ForCausalLM" in config.read_text(errors="replace")


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
    from dataclasses import replace

    from offramp.export.decoder_source import source_from_decoder
    from offramp.export.export_decoder import check_lowerings, export_decoder
    from offramp.models.llama import decoder_from_llama, load_llama

    check_lowerings(options)
    progress("loading")
    model, tokenizer = load_llama(path)
    total = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    if any(not 0 < layer <= total for layer in layers):
        raise OptionError(f"--layers {','.join(map(str, layers))}: the model has {total} layers; expected 1 to {total}")
    exits = tuple(sorted({*layers, total}))
    tokens = tokens_to_verify([tokenizer.encode(text) for text in (texts or _VERIFYING)[:_TEXTS]])
    progress(f"capturing {total} layers with exits after {', '.join(map(str, exits))}")
    source = source_from_decoder(model_name(path), decoder_from_llama(model, exits), tokens)
    stop = {tokenizer.eos_token_id, *_as_list(model.config.eos_token_id)} - {None}  # type: ignore[union-attr, arg-type]
    source = replace(
        source,
        decoder=replace(source.decoder, stop_tokens=tuple(sorted(stop))),
        tokenizer=tokenizer.backend_tokenizer.to_str().encode(),
    )
    return export_decoder(source, output, options, progress)


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
    from dataclasses import replace

    from tokenizers import Tokenizer

    from offramp.commands.sources import calibration_texts
    from offramp.export.decoder_source import DecoderLimits, source_from_decoder
    from offramp.export.export_decoder import check_lowerings, export_decoder
    from offramp.models.checkpoint import load_checkpoint
    from offramp.models.corpora import END_OF_TEXT
    from offramp.models.language_model import LanguageModel

    check_lowerings(options)
    progress("loading")
    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint.model, LanguageModel) and checkpoint.tokenizer_path is not None  # noqa: PT018
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    chosen = list(texts or calibration_texts(path, ""))[:_TEXTS]
    tokens = tokens_to_verify([tokenizer.encode(text).ids for text in chosen])
    progress("capturing")
    limits = DecoderLimits(positions=checkpoint.config.max_positions)
    source = source_from_decoder(model_name(path), checkpoint.model.decoder, tokens, limits)
    stop = tokenizer.token_to_id(END_OF_TEXT)
    source = replace(
        source,
        decoder=replace(source.decoder, stop_tokens=() if stop is None else (stop,)),
        tokenizer=checkpoint.tokenizer_path.read_bytes(),
    )
    return export_decoder(source, output, options, progress)


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


def _as_list(value: int | Sequence[int] | None) -> Sequence[int]:
    return [value] if isinstance(value, int) else (value or [])
