"""The same weights in PyTorch, as early exits are usually run: eagerly, the decision in Python, one .item() an exit.

`row_by_row` answers every row alone; `leave_together` runs the batch until every row is sure at the same exit, which
is what the published code of EAT and earlyon's batched mode do. `uncut` has no exits; `compiled` is that under
torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from subject import Inputs, rows_of
from torch import Tensor, nn

from offramp.models.encoder import EarlyExitEncoder
from offramp.policy import Policy

Answer = Callable[[Inputs], tuple[np.ndarray, np.ndarray]]  # inputs -> prediction (N,), exit_index (N,)


def exits_of(model: EarlyExitEncoder, input_ids: Tensor, attention_mask: Tensor) -> Iterator[Tensor]:
    """The logits (N, C) of each exit in turn; no layer runs before somebody asks for an exit behind it."""
    for head, (hidden, tokens) in zip(model.heads, model.states(input_ids, attention_mask), strict=False):
        yield head(hidden, tokens)


def row_by_row(model: EarlyExitEncoder, policy: Policy) -> Answer:
    """Every row alone, without its padding."""
    together = leave_together(model, policy)

    def answer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        rows = rows_of(inputs) if len(inputs["input_ids"]) > 1 else [inputs]
        found = [together(row) for row in rows]
        return np.concatenate([row[0] for row in found]), np.concatenate([row[1] for row in found])

    return answer


def leave_together(model: EarlyExitEncoder, policy: Policy) -> Answer:
    """The batch as a whole, at the first exit where all of its rows are sure."""
    final = len(model.config.exits) - 1
    limits = [*(policy.limits or [None] * final), None]
    inverse = policy.inverse_temperatures(final + 1).tolist()

    @torch.inference_mode()
    def answer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
        for k, logits in enumerate(exits_of(model, ids, mask)):
            limit = limits[k]
            if k == final or (limit is not None and is_sure(policy.score, logits * inverse[k], limit).all().item()):
                return logits.argmax(1).numpy(), np.full(len(ids), k)
        raise AssertionError("the final exit answers")

    return answer


def is_sure(score: str, scaled: Tensor, limit: float) -> Tensor:
    """Which rows of `scaled` (N, C), logits times inverse temperature, pass `limit`: (N,) bool."""
    probability = scaled.softmax(1)
    if score == "max_prob":
        return probability.amax(1) >= limit
    if score == "margin":
        first, second = probability.topk(2, dim=1).values.unbind(1)
        return first - second >= limit
    entropy = -(probability * scaled.log_softmax(1)).sum(1) / np.log(scaled.shape[1])
    return entropy <= limit


class Uncut(nn.Module):
    """The final exit only: the other heads are not computed."""

    def __init__(self, model: EarlyExitEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        *_, (hidden, tokens) = self.model.states(input_ids, attention_mask)
        logits: Tensor = self.model.heads[-1](hidden, tokens)
        return logits


def uncut(module: Any, final: int) -> Answer:
    """The answers of `module`, an Uncut or a compiled one, all at exit `final`."""

    @torch.inference_mode()
    def answer(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        logits = module(torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"]))
        return logits.argmax(1).numpy(), np.full(len(logits), final)

    return answer


def compiled(model: EarlyExitEncoder, samples: list[Inputs]) -> Answer:
    """`uncut` under torch.compile with dynamic shapes, compiled for every shape in `samples` before anybody times it.

    Raises whatever the compiler raises: it needs a C++ compiler.
    """
    torch._dynamo.reset()
    answer = uncut(torch.compile(Uncut(model), dynamic=True), len(model.config.exits) - 1)
    for inputs in samples:
        answer(inputs)
    return answer
