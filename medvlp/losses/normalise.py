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
        factor = _inverse_length(tensor, epsilon)
        unit: Tensor = tensor * factor
        context.save_for_backward(unit, factor)
        return unit

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit, factor = context.saved_tensors
        along = torch.linalg.vecdot(gradient, unit)[..., None]
        return torch.addcmul(gradient, unit, along, value=-1.0).mul_(factor), None


def paired_cosine(tensor: Tensor, target: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Cosine of each vector with the one at its place among targets, in float32 or better.

    Args:
        tensor: [..., D] vectors.
        target: [..., D] vectors, which get no gradient.
        epsilon: vectors no longer than this have cosine 0 with everything, and zero gradient.

    Returns:
        [...] in [-1, 1].
    """
    cosine: Tensor = _PairedCosine.apply(at_least_float32(tensor), at_least_float32(target.detach()), epsilon)
    return cosine


class _PairedCosine(torch.autograd.Function):
    """By hand: no unit vectors are written, neither here nor for the backward pass."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, target: Tensor, epsilon: float) -> Tensor:
        factor, other = _inverse_length(tensor, epsilon), _inverse_length(target, epsilon)
        cosine: Tensor = torch.linalg.vecdot(tensor, target)[..., None] * factor * other
        context.save_for_backward(tensor, target, factor, other, cosine)
        return cosine[..., 0]

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tensor, target, factor, other, cosine = context.saved_tensors
        along = gradient[..., None] * factor
        towards: Tensor = target * (along * other)
        return towards.addcmul_(tensor, along * cosine * factor, value=-1.0), None, None


def _inverse_length(tensor: Tensor, epsilon: float) -> Tensor:
    """[..., 1], 0 of vectors no longer than `epsilon`; NaN stays NaN."""
    length = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    inverse: Tensor = length.reciprocal().masked_fill_(length <= epsilon, 0.0)
    return inverse
