"""GlobalBatchNorm against torch's layers, over ranks, with masks and in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from medvlp.distributed import rank
from medvlp.encoders.batch_norm import GlobalBatchNorm, convert_batch_norms


def pair(features: int = 4) -> tuple[GlobalBatchNorm, nn.BatchNorm1d]:
    torch.manual_seed(0)
    ours, reference = GlobalBatchNorm(features), nn.BatchNorm1d(features)
    nn.init.uniform_(ours.weight)
    nn.init.uniform_(ours.bias)
    reference.load_state_dict(ours.state_dict())
    return ours, reference


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    ours, reference = pair()
    for step in range(3):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 3 + 1
        one, other = values.clone().requires_grad_(), values.clone().requires_grad_()
        torch.testing.assert_close(ours(one), reference(other))
        ours(one).square().sum().backward()
        reference(other).square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_var, reference.running_var)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    assert ours.num_batches_tracked == reference.num_batches_tracked
    ours.eval(), reference.eval()
    torch.testing.assert_close(ours(values), reference(values))


def on_ranks(values: np.ndarray, mask: np.ndarray | None, edges: list[int], convolution: bool) -> tuple:
    own = slice(edges[rank()], edges[rank() + 1])
    inputs = torch.from_numpy(values[own]).requires_grad_()
    norm = GlobalBatchNorm(values.shape[1]).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
    valid = None if mask is None else torch.from_numpy(mask[own])
    output = norm(inputs, valid)
    weights = torch.arange(values[0].size, dtype=torch.float64).reshape(values[0].shape)
    (output * weights).square().sum().backward()
    averages = norm.running_mean.numpy(), norm.running_var.numpy()
    learned = torch.stack([norm.weight.grad, norm.bias.grad]).numpy()
    return output.detach().numpy(), inputs.grad.numpy(), *averages, learned


@pytest.mark.dist
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_with_unequal_rows_equal_one_process(gloo_pool, masked: bool) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(8, 3, 5)) + np.arange(8)[:, None, None]
    mask = generator.random((8, 5)) < 0.5 if masked else None
    if masked:
        mask[6:] = False  # the last rank has no valid position at all
    expected = on_ranks(values, mask, [0, 8], False)
    results = gloo_pool(2).run(on_ranks, values, mask, [0, 6, 8], False)
    np.testing.assert_allclose(np.concatenate([r[0] for r in results]), expected[0], atol=1e-10)
    np.testing.assert_allclose(np.concatenate([r[1] for r in results]), expected[1], rtol=1e-8, atol=1e-6)
    for result in results:
        np.testing.assert_allclose(result[2], expected[2], atol=1e-12)
        np.testing.assert_allclose(result[3], expected[3], atol=1e-12)
    np.testing.assert_allclose(sum(r[4] for r in results), expected[4], rtol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 4)])
def test_gradients_with_a_mask_are_those_of_the_formula(shape: tuple[int, ...], affine: bool) -> None:
    """Against finite differences; invalid positions are normalised too, but do not count."""
    generator = torch.Generator().manual_seed(0)
    norm = GlobalBatchNorm(3, affine).double()
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) + 2).requires_grad_()
    mask = torch.rand((shape[0], *shape[2:]), generator=generator) < 0.6
    learned = tuple(norm.parameters())

    def run(values: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        given = dict(zip(("weight", "bias"), parameters, strict=False))
        return torch.func.functional_call(norm, given, (values, mask))

    assert torch.autograd.gradcheck(run, (values, *learned))
    assert run(values, *learned).is_contiguous()


def test_large_offset_keeps_precision() -> None:
    values = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) + 3000
    output = GlobalBatchNorm(2)(values)
    torch.testing.assert_close(output.std(0, unbiased=False), torch.ones(2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("valid", [0, 1])
def test_almost_nothing_valid_is_finite(valid: int) -> None:
    norm = GlobalBatchNorm(3)
    values = torch.randn(1, 3, 4, requires_grad=True)
    mask = torch.arange(4)[None] < valid
    output = norm(values, mask)
    output.sum().backward()
    assert output.isfinite().all()
    assert values.grad.isfinite().all()
    assert norm.running_var.isfinite().all()
    if valid == 0:
        assert torch.equal(norm.running_mean, torch.zeros(3))


def test_half_precision_keeps_statistics_in_float32() -> None:
    norm = GlobalBatchNorm(3).to(torch.bfloat16)
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        output = norm(torch.randn(32, 3, generator=generator).add(5).to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, torch.full((3,), 5.0), rtol=0.03, atol=0)
    assert norm.double().running_mean.dtype == torch.float64


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])
def test_conversion_changes_no_output_and_no_name(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    images = torch.randn(4, 3, 64, 64)
    names = list(model.state_dict())
    expected_eval = model.eval()(images)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected_train = model(images)
    model.load_state_dict(state)
    assert convert_batch_norms(model) is model
    assert list(model.state_dict()) == names
    assert not any(type(m).__name__ in ("BatchNorm2d", "BatchNormAct2d") for m in model.modules())
    torch.testing.assert_close(model(images), expected_train, rtol=1e-3, atol=1e-4)
    model.load_state_dict(state)
    torch.testing.assert_close(model.eval()(images), expected_eval, rtol=1e-3, atol=1e-4)


def test_torchs_layer_for_several_gpus_stays_out_of_compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its collectives are none of those that a graph may hold."""
    compiling: list[bool] = []

    def forward(self: nn.Module, input: torch.Tensor) -> torch.Tensor:
        compiling.append(torch.compiler.is_compiling())
        return input

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    norm, values = GlobalBatchNorm(3), torch.ones(4, 3)
    compiled = torch.compile(lambda given: norm._several_gpus(given * 2) + 1, backend="eager")
    assert compiled(values).equal(torch.full((4, 3), 3.0))
    assert compiling == [False]


def test_a_single_position_teaches_a_mean_and_no_spread() -> None:
    """As in a head at one image a step, pooled to one place; learned, a variance of 0 blew up evaluations."""
    torch.manual_seed(0)
    norm = GlobalBatchNorm(2)
    for _ in range(200):
        norm(torch.randn(1, 2, 1, 1) + 3)
    assert norm.running_var.tolist() == [1, 1]
    assert (norm.running_mean - 3).abs().max() < 1
    assert norm.eval()(torch.randn(1, 2, 1, 1) + 3).abs().max() < 10
