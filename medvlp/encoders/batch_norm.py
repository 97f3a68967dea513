"""Batch normalisation over all ranks and over the valid positions only."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medvlp.distributed import gather_rows, sum_over_ranks, world_size
from medvlp.losses.normalise import at_least_float32


class GlobalBatchNorm(nn.SyncBatchNorm):
    """Batch norm whose statistics are those of the valid positions of all ranks' batches together.

    Statistics, normalisation and running averages are float32 whatever the parameters' type is. Without a
    mask torch's kernels run, on one rank and (SyncBatchNorm) on several with CUDA; elsewhere (gloo, masked
    tokens) the statistics of every rank are merged by Chan's formula, for which torch has no layer.

    One valid position, or none at all, gives variance 0 and a finite result (torch's layers raise); the
    running variance learns from two on.
    With gradient checkpointing the running averages move twice a step, as torch's layers do.

    Args:
        features: number of channels.
        affine: learn scale and shift.
        synchronise: false keeps the statistics of this rank alone.
        eps, momentum: as in `torch.nn.BatchNorm1d`.
    """

    def __init__(
        self,
        features: int,
        affine: bool = True,
        synchronise: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(features, eps, momentum, affine, track_running_stats)
        self.synchronise = synchronise
        # timm's BatchNormAct2d carries its dropout and activation; identities otherwise.
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise over every dimension but the channels.

        Args:
            input: [B, C] or [B, C, ...].
            mask: valid positions [B, ...] (the shape of `input` without channels), bool; None: all valid.
                Invalid positions are normalised too but do not count.

        Returns:
            A tensor of the input's shape and type.
        """
        use_batch = self.training or self.running_mean is None
        shared = self.synchronise and world_size() > 1
        if mask is None and not (use_batch and shared) and input.numel() > input.shape[1]:
            output = self._one_rank(input)
        elif mask is None and use_batch and shared and input.is_cuda:
            output = self._several_gpus(input)
        else:
            output = self._any_ranks(input, mask, use_batch)
        result: Tensor = self.act(self.drop(output))
        return result

    def _one_rank(self, input: Tensor) -> Tensor:
        """torch's fused kernel: running averages, or the statistics of this rank's positions."""
        weight, bias = (
            None if value is None else at_least_float32(value) for value in (self.weight, self.bias)
        )
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        use_batch = self.training or self.running_mean is None
        averages = (self.running_mean, self.running_var)
        return F.batch_norm(input, *averages, weight, bias, use_batch, momentum or 0.0, self.eps)

    # Not compiled: collectives inside a graph have to be torch's own functional ones.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _several_gpus(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def _any_ranks(self, input: Tensor, mask: Tensor | None, use_batch: bool) -> Tensor:
        values = at_least_float32(input)
        weight, bias = (
            None if value is None else value.to(values.dtype) for value in (self.weight, self.bias)
        )
        if use_batch:
            return self._by_batch(values, mask, weight, bias).to(input.dtype)
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = torch.rsqrt(self.running_var.to(values.dtype) + self.eps)
        scale = scale if weight is None else scale * weight
        shape = (1, -1, *([1] * (input.ndim - 2)))
        output = (values - self.running_mean.to(values.dtype).view(shape)) * scale.view(shape)
        return (output if bias is None else output + bias.view(shape)).to(input.dtype)

    def _by_batch(
        self, values: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Normalise by the statistics of the valid positions; moves the running averages."""
        moved = values.movedim(1, -1)
        rows = moved.reshape(-1, values.shape[1])
        valid = torch.ones_like(rows[:, :1]) if mask is None else mask.reshape(-1, 1).to(rows.dtype)
        normalise = _across_ranks if self.synchronise and world_size() > 1 else _NormaliseRows.apply
        output, count, mean, squares = normalise(rows, valid, weight, bias, self.eps)
        if self.training and self.running_mean is not None:
            self._move_running_averages(count, mean, squares)
        result: Tensor = output.view(moved.shape).movedim(-1, 1)
        # Where channels are not last, in memory as it came.
        return result.contiguous() if values.is_contiguous() else result

    @torch.no_grad()
    def _move_running_averages(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        # No valid position anywhere says nothing about the data, and a single one nothing about its spread:
        # the averages stay. With a variance of 0, learned so, an evaluation would see 300 times the values.
        unbiased = squares / (count - 1).clamp(min=1)
        for average, value, fewest in ((self.running_mean, mean, 1), (self.running_var, unbiased, 2)):
            average.add_(momentum * (count >= fewest) * (value - average).to(average.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the running averages in float32 when the module becomes half precision.

        A bfloat16 average cannot move by less than 1/256 of itself, so it would stop following the data.
        """
        kept = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in zip(("running_mean", "running_var"), kept, strict=True):
            changed = getattr(self, name)
            if value is not None and changed.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(changed.device).float())
        return self


class _NormaliseRows(torch.autograd.Function):
    """By hand: autograd goes through memory nearly three times as often, and keeps as many copies."""

    @staticmethod
    def forward(
        context: Any,
        rows: Tensor,
        valid: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        shared: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, C] rows normalised, and count, mean [C] and centred squares [C] of the valid ones ([N, 1])."""
        count, centred = valid.sum(), rows * valid
        mean = centred.sum(0) / count.clamp(min=1)
        torch.sub(rows, mean, out=centred)
        output = centred.square()
        squares = output.mul_(valid).sum(0)
        if shared:
            count, merged, squares = _merge_ranks(count, mean, squares)
            centred -= merged - mean
            mean = merged
        spread = torch.rsqrt(squares / count.clamp(min=1) + eps)
        scale = spread if weight is None else spread * weight
        torch.mul(centred, scale, out=output)
        context.save_for_backward(centred, valid, spread, scale, count)
        context.shared, context.affine = shared, weight is not None
        context.mark_non_differentiable(count, mean, squares)
        return output if bias is None else output.add_(bias), count, mean, squares

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *nothing: Tensor) -> tuple[Tensor | None, ...]:
        centred, valid, spread, scale, count = context.saved_tensors
        result = gradient * centred
        own = torch.stack([gradient.sum(0), result.sum(0)])
        # Every rank's rows move the statistics that normalise those of all.
        total, along = (sum_over_ranks(own) if context.shared else own) * (scale / count.clamp(min=1))
        torch.mul(centred, -along * spread.square(), out=result)
        result.sub_(total).mul_(valid).addcmul_(gradient, scale)
        affine = (own[1] * spread, own[0]) if context.affine else (None, None)
        return result, None, *affine, None, None


# Not compiled: collectives inside a graph have to be torch's own functional ones.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _across_ranks(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _NormaliseRows.apply(*arguments, True)
    return result


def _merge_ranks(count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the union of all ranks' rows from each rank's (count, mean [C], centred squares [C])."""
    packed = gather_rows(torch.cat([count[None], mean, squares])[None])
    counts, means, all_squares = packed[:, :1], packed[:, 1 : 1 + len(mean)], packed[:, 1 + len(mean) :]
    total = counts.sum()
    merged = (counts * means).sum(0) / total.clamp(min=1)
    merged_squares = (all_squares + counts * (means - merged).square()).sum(0)
    return total, merged, merged_squares


def convert_batch_norms(module: nn.Module, synchronise: bool = True) -> nn.Module:
    """Replace every torch or timm batch norm in `module` by `GlobalBatchNorm`, weights and names kept.

    Args:
        module: any module; changed in place.
        synchronise: statistics over all ranks (true) or over each rank alone.

    Returns:
        The module itself, or its replacement if it is a batch norm.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, GlobalBatchNorm):
        layer = GlobalBatchNorm(
            module.num_features,
            module.affine,
            synchronise,
            module.eps,
            module.momentum,
            module.track_running_stats,
        )
        layer.load_state_dict(module.state_dict(), strict=False)
        for parameter, source in zip(layer.parameters(), module.parameters(), strict=False):
            parameter.requires_grad_(source.requires_grad)
        layer.drop, layer.act = getattr(module, "drop", layer.drop), getattr(module, "act", layer.act)
        layer.train(module.training)
        return layer
    for name, child in module.named_children():
        replacement = convert_batch_norms(child, synchronise)
        if replacement is not child:
            setattr(module, name, replacement)
    return module
