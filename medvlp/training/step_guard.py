"""Keeps a bad step from leaving a trace: decided on the device, without waiting for it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvlp import distributed

#: Accepted steps before a loss can be called a spike, and the memory of its running mean and variance.
WARMUP, WINDOW = 50, 100


class StepVerdict(NamedTuple):
    """What was seen in a step: this rank's loss, whether it is finite, whether that of all is a spike."""

    loss: float
    finite: bool
    spike: bool


class StepGuard:
    """Turns the loss of a bad step into NaN before its last backward pass.

    NaN gradients then reach every rank with the reduction, and every rank's optimiser refuses them: DeepSpeed
    at stages 1 to 3 and in 16 bit, `Engine.step` elsewhere. So all ranks skip alike, without a message
    between them. Buffers (batch-norm statistics), which the forward pass has already moved, are put back by
    `undo`.

    A spike is a mean loss over all ranks more than `sigma` standard deviations above the mean of the last
    accepted steps (exponential, about `WINDOW` of them) with the same loss: where a planned change makes it
    another quantity, the statistics begin anew. Looking for spikes costs one reduction of a number
    over ranks in each step, on the group of the gradients; with `sigma` 0 there is none.

    Args:
        method: owner of the buffers.
        sigma: standard deviations above which a loss is a spike; 0 looks only for NaN and infinity.
        device: of the loss.
    """

    def __init__(self, method: nn.Module, sigma: float, device: torch.device):
        self.sigma = sigma
        self._buffers = list(method.buffers())
        self._copies = [buffer.clone() for buffer in self._buffers]
        # Positions by type: torch copies a list of several types one tensor at a time.
        types = dict.fromkeys(buffer.dtype for buffer in self._buffers)
        self._alike = [[i for i, b in enumerate(self._buffers) if b.dtype == kind] for kind in types]
        self._mean = torch.zeros((), dtype=torch.float64, device=device)
        self._variance, self._count = self._mean.clone(), self._mean.clone()
        self._loss = self._spike = self._mean
        self._variant: str | None = None

    def expect(self, variant: str) -> None:
        """Which loss the coming steps take; that of another variant is another quantity."""
        if variant != self._variant:
            self._variant = variant
            for value in (self._mean, self._variance, self._count):
                value.zero_()

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the buffers; call it before the first forward pass of a step."""
        self._copy(self._buffers, self._copies)

    @torch.no_grad()
    def allowance(self, loss: Tensor) -> Tensor:
        """The factor on the loss of the last micro-batch: 1, or NaN when the step must not be made.

        Args:
            loss: 0-d mean loss of this rank's micro-batches of the step.

        Returns:
            0-d on the device. Infinite and NaN losses of one rank alone count, too.
        """
        self._loss = loss
        everywhere = loss.double()
        if self.sigma > 0:
            everywhere = distributed.sum_over_ranks(everywhere) / distributed.world_size()
            limit = self._mean + self.sigma * self._variance.sqrt()
            self._spike = (self._count >= WARMUP) & (everywhere > limit)
        bad = ~torch.isfinite(everywhere) | (self._spike > 0)
        if self.sigma > 0:
            self._learn(everywhere, bad)
        return torch.where(bad, torch.nan, torch.ones_like(loss))

    def _learn(self, loss: Tensor, bad: Tensor) -> None:
        rate = 1 / (self._count + 1).clamp(max=WINDOW)
        delta = torch.where(bad, 0.0, loss - self._mean)
        # Exponentially weighted mean and variance (West 1979); plain ones for the first `WINDOW` steps.
        variance = (1 - rate) * (self._variance + rate * delta**2)
        self._variance = torch.where(bad, self._variance, variance)
        self._mean = self._mean + rate * delta
        self._count = self._count + (~bad).double()

    @torch.no_grad()
    def undo(self) -> None:
        """Put the buffers back to what they were at `begin`."""
        self._copy(self._copies, self._buffers)

    def _copy(self, sources: list[Tensor], targets: list[Tensor]) -> None:
        for places in self._alike:  # one launch instead of one for each batch norm
            torch._foreach_copy_([targets[i] for i in places], [sources[i] for i in places])

    def verdict(self) -> StepVerdict:
        """What was seen in the last step (waits for the device)."""
        loss = float(self._loss)
        return StepVerdict(loss, bool(torch.isfinite(self._loss)), bool(self._spike))

    def state_dict(self) -> dict[str, Any]:
        """The statistics, the same on all ranks when spikes are looked for."""
        statistics = {"mean": self._mean, "variance": self._variance, "count": self._count}
        return statistics | {"variant": self._variant}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if state:
            self._mean, self._variance, self._count = (
                state[name].to(self._mean.device) for name in ("mean", "variance", "count")
            )
            self._variant = state.get("variant")
