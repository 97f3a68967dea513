"""One vector of many tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenPool(nn.Module):
    """Weighted mean of tokens; one linear layer gives the logarithm of each token's weight.

    Starts as the plain mean over the valid tokens.

    Args:
        width: of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """[B, L, width] tokens -> [B, width].

        Args:
            tokens: what is pooled.
            valid: [B, L] bool; other tokens get no weight. The first always takes part, so that a text of
                nothing but padding stays finite.
        """
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        scores = self.score(tokens)[..., 0].float().masked_fill(~(valid | first), -torch.inf)
        weights = scores.softmax(1).to(tokens.dtype)
        pooled: Tensor = weights[:, None] @ tokens
        return pooled[:, 0]
