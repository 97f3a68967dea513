"""Precision and length of embeddings before a loss."""

import torch
from torch import Tensor


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
    tensor = at_least_float32(tensor)
    length = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    short = length <= epsilon  # NaN stays NaN
    return tensor * torch.where(short, 0.0, 1.0 / torch.where(short, 1.0, length))
