"""Unit vectors and cosines of pairs beside torch's own, their gradients, and vectors without a direction."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.normalise import paired_cosine, unit_norm


def torch_cosine(tensor: Tensor, target: Tensor) -> Tensor:
    return F.cosine_similarity(tensor, target.detach(), dim=-1)


def gradient_of(function: Callable[[Tensor, Tensor], Tensor], tensor: Tensor, target: Tensor) -> Tensor:
    leaf = tensor.clone().requires_grad_()
    weights = torch.linspace(-1, 2, tensor[..., 0].numel(), dtype=tensor.dtype).view(tensor.shape[:-1])
    (weights * function(leaf, target)).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (0, 3)])
def test_cosines_and_their_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(paired_cosine(tensor, target), torch_cosine(tensor, target), atol=1e-12)
    own, theirs = (gradient_of(function, tensor, target) for function in (paired_cosine, torch_cosine))
    assert torch.allclose(own, theirs, atol=1e-12)


def test_a_target_gets_no_gradient() -> None:
    tensor, target = torch.ones(2, 3, requires_grad=True), torch.eye(2, 3, requires_grad=True)
    paired_cosine(tensor, target).sum().backward()  # type: ignore[no-untyped-call]
    assert tensor.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("which", ["tensor", "target"])
def test_a_vector_without_direction_has_cosine_and_gradient_zero(which: str) -> None:
    given = {"tensor": torch.ones(2, 3), "target": torch.ones(2, 3)}
    given[which][0] = 0
    assert paired_cosine(**given).tolist() == pytest.approx([0, 1])
    assert gradient_of(paired_cosine, **given)[0].tolist() == [0, 0, 0]


def test_nan_stays_nan() -> None:
    tensor = torch.tensor([[1.0, torch.nan], [1.0, 0.0]])
    assert paired_cosine(tensor, torch.ones(2, 2)).isnan().tolist() == [True, False]
    assert unit_norm(tensor).isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_gets_gradients_of_its_own_type(kind: torch.dtype) -> None:
    # In float16 the square of 300 is infinite.
    tensor, target = torch.full((2, 4), 300.0, dtype=kind, requires_grad=True), torch.ones(2, 4, dtype=kind)
    cosine = paired_cosine(tensor, target)
    assert cosine.dtype == torch.float32
    assert cosine.tolist() == pytest.approx([1, 1])
    cosine.sum().backward()  # type: ignore[no-untyped-call]
    assert tensor.grad is not None
    assert tensor.grad.dtype == kind
