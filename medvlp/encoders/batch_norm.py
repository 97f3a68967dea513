"""Batch normalisation over all ranks and over the valid positions only."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.distributed import gather_with_gradient, world_size
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
        if use_batch:
            mean, variance = self._batch_statistics(values, mask)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, variance = self.running_mean.to(values.dtype), self.running_var.to(values.dtype)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight.to(values.dtype)
        shape = (1, -1, *([1] * (input.ndim - 2)))
        output = (values - mean.view(shape)) * scale.view(shape)
        if self.affine:
            output = output + self.bias.to(values.dtype).view(shape)
        return output.to(input.dtype)

    def _batch_statistics(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean [C] and biased variance [C] over the valid positions; moves the running averages."""
        rows = values.movedim(1, -1).reshape(-1, values.shape[1])
        valid = torch.ones_like(rows[:, :1]) if mask is None else mask.reshape(-1, 1).to(rows.dtype)
        count = valid.sum()
        mean = (rows * valid).sum(0) / count.clamp(min=1)
        squares = ((rows - mean).square() * valid).sum(0)
        if self.synchronise and world_size() > 1:
            count, mean, squares = _merge_ranks(count, mean, squares)
        if self.training and self.running_mean is not None:
            self._move_running_averages(count, mean, squares)
        return mean, squares / count.clamp(min=1)

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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _merge_ranks(count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the union of all ranks' rows from each rank's (count, mean [C], centred squares [C])."""
    packed = gather_with_gradient(torch.cat([count[None], mean, squares])[None])
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
