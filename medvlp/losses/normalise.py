"""Precision and length of embeddings before a loss."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are: all losses compute in float32 or better."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def unit_norm(tensor: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Scale vectors to length 1, in float32 or better.

    Args:
        tensor: [..., D] vectors.
        epsilon: vectors no longer than this become zero vectors with zero gradient
            (`torch.nn.functional.normalize` would pass on 1e12 times the incoming gradient).

    Returns:
        [..., D] unit vectors.
    """
    scaled: Tensor = _UnitNorm.apply(at_least_float32(tensor), epsilon)
    return scaled


class _UnitNorm(torch.autograd.Function):
    """By hand: autograd goes through memory twice as often, and these are most of what a loss reads."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
        factor = length.reciprocal().masked_fill_(length <= epsilon, 0.0)  # NaN stays NaN
        unit: Tensor = tensor * factor
        context.save_for_backward(unit, factor)
        return unit

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit, factor = context.saved_tensors
        along = torch.linalg.vecdot(gradient, unit)[..., None]
        return torch.addcmul(gradient, unit, along, value=-1.0).mul_(factor), None
