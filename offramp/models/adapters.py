"""What makes an exit of a frozen decoder say what the final exit says: a vocabulary of its own, and its beginnings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The logit of a token that an exit does not know: finite for FP16, and no probability at all beside real ones.
UNKNOWN_LOGIT = -1e4


class DraftVocabulary(nn.Module):
    """Logits over all tokens from those over the few that an exit knows.

    A head of 8,192 tokens reads a sixth of the weights of one of 49,152; what an exit proposes is verified or weighed
    by its threshold, so tokens that it cannot say cost speed and not correctness (arXiv 2502.14856 does the same).
    """

    column: Tensor  # (V,): where a token's logit is; `known` for those that have none

    def __init__(self, vocabulary: int, known: int) -> None:
        super().__init__()
        self.register_buffer("column", torch.arange(vocabulary).clamp(max=known))

    def forward(self, logits: Tensor) -> Tensor:
        """From (…, known) to (…, V)."""
        padded = nn.functional.pad(logits, (0, 1), value=UNKNOWN_LOGIT)
        return padded[..., self.column]

    @property
    def tokens(self) -> Tensor:
        """The tokens that the exit knows, in the order of its head's rows."""
        known = int(self.column.max())
        return self.column.argsort(stable=True)[:known]

    def set_tokens(self, tokens: Tensor) -> None:
        """Know these; row i of the head is `tokens[i]`."""
        self.column.fill_(len(tokens))
        self.column[tokens] = torch.arange(len(tokens))
