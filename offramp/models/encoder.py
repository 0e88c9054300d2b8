"""A BERT encoder with a small classifier (exit head) after some of its layers.

The encoder is an ordinary `nn.Module`: nothing in the compiler knows it. The layers are those of
`transformers`; the loop over them is ours, so that a segment is a run of layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.utils import logging as transformers_logging

from offramp.errors import DataError, ModelError, OptionError
from offramp.models.heads import Pooling, Tokens, check_head_options, exit_head, mean_weights
from offramp.models.pruning import Pruning, Shortening, check_ratio, norm_importance, prune
from offramp.models.window_attention import Mask, run_layer, run_layer_and_listen, score_mask, window_mask


@dataclass(frozen=True)
class EncoderConfig:
    """Where the exits are, how they read the hidden state, and what makes the layers cheaper.

    `exits` are numbers of layers in increasing order, 0 being the embeddings; layers above the last one are
    dropped, so `(2,)` is a static model of 2 layers. `pooling` is what the final exit reads, `early_pooling`
    what the others do: a linear classifier on the mean or the first token, or a small network over every token
    and its neighbours ("window"). `dropout` holds for the layers and the exit heads. `pruning` says which tokens go
    on the way; an exit at a pruned layer reads what is left. With `window`, tokens look at that many neighbours and
    at [CLS] only; `in_blocks` computes that in blocks instead of under a mask: the same but for rounding, and faster
    for long texts (`window_attention.blocks_pay`). Raises OptionError.
    """

    exits: tuple[int, ...] = (0, 2, 4, 6)
    num_classes: int = 2
    pooling: Pooling = "mean"
    early_pooling: Pooling = "window"
    dropout: float = 0.1  # BERT's own (arXiv 1810.04805, appendix A.2)
    pruning: Pruning | None = None
    window: int = 0
    in_blocks: bool = False

    def __post_init__(self) -> None:
        check_head_options(self.exits, self.num_classes, (self.early_pooling, self.pooling), self.dropout)
        if self.window < 0 or self.window % 2:
            raise OptionError(f"window: got {self.window}, expected an even number of neighbours, 0 for all tokens")
        if self.in_blocks and not self.window:
            raise OptionError("in_blocks: got a window of 0, expected one of at least 2; dense attention has no blocks")

    def prunes_after(self, depth: int) -> bool:
        """Tell whether tokens go after `depth` layers; after the last one it would serve nobody."""
        return self.pruning is not None and depth in self.pruning.layers and depth < self.exits[-1]


class ExitAnswer(NamedTuple):
    """What an exit says that tells of its tokens: logits (N, C), and the share of tokens left, retention (N,)."""

    logits: Tensor
    retention: Tensor


class EarlyExitEncoder(nn.Module):
    """Encoder whose forward returns one (N, C) tensor of logits per exit, in order, the final exit last.

    It takes over the embeddings and the first layers of `bert` (shared, not copied). `pruning_ratio` is the share of
    tokens that goes at each pruning; training may change it between steps (a stage's `anneal`). With
    `reports_retention`, every exit is an ExitAnswer. Raises ModelError if `bert` has too few layers or is a decoder.
    """

    def __init__(self, bert: BertModel, config: EncoderConfig) -> None:
        super().__init__()
        check_bert(bert, config)
        # Fewer operators than "sdpa" when exported, which scales queries and keys separately.
        bert.set_attn_implementation("eager")
        self.config = config
        self.bert_config = bert.config
        self.bert_config.num_hidden_layers = config.exits[-1]
        self.embeddings = bert.embeddings
        self.layers = nn.ModuleList(list(bert.encoder.layer)[: config.exits[-1]])
        poolings = [config.early_pooling] * (len(config.exits) - 1) + [config.pooling]
        self.heads = nn.ModuleList(
            exit_head(self.bert_config.hidden_size, config.num_classes, pooling, config.dropout) for pooling in poolings
        )
        set_dropout(self, config.dropout)
        self.reports_retention = False
        self._pruning_ratio = config.pruning.ratio if config.pruning else 0.0

    @property
    def pruning_ratio(self) -> float:
        """Return the share of tokens that goes at each pruning; OptionError when set to what is none."""
        return self._pruning_ratio

    @pruning_ratio.setter
    def pruning_ratio(self, ratio: float) -> None:
        check_ratio(ratio)
        self._pruning_ratio = ratio

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor | ExitAnswer, ...]:
        """Classify N texts: input_ids and attention_mask (1 = token, 0 = padding) are (N, T) int64."""
        states = self.states(input_ids, attention_mask)
        answers: list[Tensor | ExitAnswer] = []
        for head, (hidden, tokens) in zip(self.heads, states, strict=True):
            logits = head(hidden, tokens)
            answers.append(ExitAnswer(logits, retention(attention_mask, tokens)) if self.reports_retention else logits)
        return tuple(answers)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[Tensor, Tokens]]:
        """Yield the hidden state (N, T, d) at each exit in turn; no layer runs before somebody asks beyond it."""
        dtype = self.embeddings.word_embeddings.weight.dtype
        kept = attention_mask[:, None, :].to(dtype)  # (N, 1, T) in {0, 1}
        mask = score_mask(kept, self.config.window, in_blocks=self.config.in_blocks)
        tokens = Tokens(kept, mean_weights(kept))
        hidden = embedded(self.embeddings, input_ids)  # (N, T, d)
        for depth in range(len(self.layers) + 1):
            if self.config.prunes_after(depth):
                hidden, kept = self._pruned(self.layers[depth - 1], hidden, kept, mask)
                mask = score_mask(kept, self.config.window, in_blocks=self.config.in_blocks)
                tokens = Tokens(kept, mean_weights(kept))
            elif depth > 0:
                hidden = run_layer(self.layers[depth - 1], hidden, mask)  # (N, T, d)
            if depth in self.config.exits:
                yield hidden, tokens

    def _pruned(self, layer: nn.Module, hidden: Tensor, kept: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Run a layer and drop tokens after it: (N, T, d), (N, 1, T) to (N, K, d), (N, 1, K)."""
        pruning = self.config.pruning
        assert pruning is not None
        if pruning.importance == "attention":
            whole = mask if isinstance(mask, Tensor) else window_mask(kept, self.config.window)
            hidden, importance = run_layer_and_listen(layer, hidden, kept, whole)
        else:
            hidden = run_layer(layer, hidden, mask)
            importance = norm_importance(hidden)
        how = Shortening(pruning, self._pruning_ratio, self.bert_config.max_position_embeddings)
        return prune(hidden, kept, importance, how)


def retention(attention_mask: Tensor, tokens: Tokens) -> Tensor:
    """Return the share of its tokens that each row still has: attention_mask (N, T), to (N,) in [0, 1]."""
    given = attention_mask.sum(dim=1).clamp(min=1)
    return tokens.kept[:, 0].sum(dim=1) / given


def embedded(embeddings: BertEmbeddings, input_ids: Tensor) -> Tensor:
    """Embed input_ids (N, T) to (N, T, d), every token of type 0.

    Calling `embeddings` would do the same in more operators: it gathers token types from a buffer of zeros.
    """
    length = input_ids.shape[1]
    by_place = embeddings.position_embeddings.weight[:length] + embeddings.token_type_embeddings.weight[0]  # (T, d)
    hidden: Tensor = embeddings.dropout(embeddings.LayerNorm(embeddings.word_embeddings(input_ids) + by_place))
    return hidden


def set_dropout(module: nn.Module, dropout: float) -> None:
    """Give every dropout inside `module` the same probability."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = dropout


def check_bert(bert: BertModel, config: EncoderConfig) -> None:
    """Raise ModelError unless `bert` is an encoder with a layer for every exit."""
    num_layers = bert.config.num_hidden_layers
    if num_layers < config.exits[-1]:
        raise ModelError(f"placing exits {config.exits}: the encoder has {num_layers} layers; name exits up to that")
    if bert.config.is_decoder or bert.config.add_cross_attention:
        raise ModelError(
            "placing exits: got a BERT decoder, expected an encoder; set is_decoder and add_cross_attention "
            "to false in its config.json"
        )


def encoder_from_pretrained(path: Path, config: EncoderConfig, seed: int = 0) -> EarlyExitEncoder:
    """Build an encoder from a BertModel directory (config.json and weights), exit heads drawn from `seed`.

    Nothing is downloaded. Raises DataError if the directory is not such a checkpoint, ModelError as
    EarlyExitEncoder does.
    """
    if seed < 0:
        raise OptionError(f"seed: got {seed}, expected an integer from 0")
    bert = load_bert(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EarlyExitEncoder(bert, config).eval()


def load_bert(path: Path) -> BertModel:
    """Load a BertModel directory without its pooler; raise DataError if it is not one."""
    cure = "expected a directory that BertModel.save_pretrained wrote (config.json, model.safetensors)"
    try:
        bert_config = BertConfig.from_pretrained(path, local_files_only=True)
        if bert_config.model_type != "bert":
            raise DataError(f"loading an encoder from {path}: got a {bert_config.model_type} model; {cure}")
        with quiet_transformers():
            loaded: Any = BertModel.from_pretrained(
                path,
                config=bert_config,
                add_pooling_layer=False,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
    except DataError:
        raise
    except Exception as exc:  # transformers raises OSError, ValueError, RuntimeError, safetensors' own and more
        raise DataError(f"loading an encoder from {path}: got {type(exc).__name__}: {exc}; {cure}") from exc
    bert: BertModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise DataError(f"loading an encoder from {path}: {len(missing)} weights missing ({missing[0]} …); {cure}")
    return bert


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bar and load report of transformers, and put its settings back."""
    verbosity = transformers_logging.get_verbosity()
    bars_were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_were_on:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
