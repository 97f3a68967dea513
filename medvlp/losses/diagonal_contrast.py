"""Which context belongs to which token: InfoNCE inside a sample, both directions at the cost of one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def diagonal_contrast(tokens: Tensor, context: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    """Sum of both directions of InfoNCE, for every token of every sample.

    Args:
        tokens, context: [B, N, D], rows no longer than 1; context i belongs to token i.
        valid: [B, N] bool, the candidates of each other; every token is its own candidate. None: all are.
        temperature: positive.

    Returns:
        [B, N]: -log softmax over the contexts of token i, plus -log softmax over the tokens of context i.
    """
    # Similarities span at most 2 / temperature: below this limit no row of exponentials can underflow.
    limit = -0.5 * math.log(torch.finfo(tokens.dtype).tiny)
    if 2 / temperature < limit:
        loss: Tensor = _SharedExponentials.apply(tokens, context, valid, temperature)
        return loss
    logits = tokens @ context.transpose(1, 2) / temperature
    if valid is not None:
        pairs = valid[:, :, None] & valid[:, None, :]
        # Every token keeps itself, so that rows of padding are 0 instead of infinite.
        itself = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~(pairs | itself), -torch.inf)
    own = logits.diagonal(dim1=1, dim2=2)
    return (logits.logsumexp(2) - own) + (logits.logsumexp(1) - own)


class _SharedExponentials(torch.autograd.Function):
    """Rows and columns share exp(logit - 1 / temperature).

    Autograd over two logsumexp would compute the [B, N, N] exponentials four times; they are most of the
    cost beside the products.
    """

    @staticmethod
    def forward(
        context_: Any, tokens: Tensor, context: Tensor, valid: Tensor | None, temperature: float
    ) -> Tensor:
        scaled = tokens / temperature
        shift = scaled.new_full((1, 1, 1), -1 / temperature)
        exponentials = torch.baddbmm(shift, scaled, context.transpose(1, 2)).exp_()
        if valid is not None:
            exponentials *= valid[:, :, None]
            exponentials *= valid[:, None, :]
        own = exponentials.diagonal(dim1=1, dim2=2)
        rows, columns = exponentials.sum(2), exponentials.sum(1)
        if valid is not None:
            own, rows, columns = (values.where(valid, 1.0) for values in (own, rows, columns))
        context_.save_for_backward(scaled, context, valid, exponentials, rows, columns)
        context_.temperature = temperature
        # Quotients: a sum is never below its own part, so that not even rounding makes the loss negative.
        return -(own / rows).log() - (own / columns).log()

    @staticmethod
    def backward(context_: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scaled, context, valid, exponentials, rows, columns = context_.saved_tensors
        if valid is not None:
            gradient = gradient.where(valid, 0.0)
        to_logits = exponentials * (gradient / rows)[:, :, None]
        to_logits.addcmul_(exponentials, (gradient / columns)[:, None, :])
        own = -2 * gradient[:, :, None]
        to_tokens = torch.baddbmm(own * context, to_logits, context) / context_.temperature
        return to_tokens, torch.baddbmm(own * scaled, to_logits.transpose(1, 2), scaled), None, None
