"""Exact accumulation: one loss over all micro-batches of a step, with the activations of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from medvlp.config import Config
from medvlp.data.batch import Batch, join
from medvlp.data.batch_sizes import BatchSizes
from medvlp.methods.base import DividedMethod, Method, Objective, StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.randomness import random_state, restore_random_state

if TYPE_CHECKING:
    from medvlp.training.engine import Engine
    from medvlp.training.step_guard import StepGuard


def accumulates_exactly(objective: Objective, config: Config, sizes: BatchSizes) -> bool:
    """Whether the steps of a run go through `exact_passes`."""
    asked = config.train.accumulate == "exact" and sizes.accumulation > 1
    return asked and isinstance(objective, DividedMethod)


def what_differs(objective: Objective, config: Config, sizes: BatchSizes) -> str | None:
    """One line on what of a run's loss still depends on the micro-batch; None: nothing does.

    Heads of downstream tasks have losses of single samples, which accumulate plainly.
    """
    if sizes.accumulation == 1 or not isinstance(objective, Method):
        return None
    if config.train.accumulate == "plain":
        return (
            f"train.accumulate=plain: each of {sizes.accumulation} micro-batches is contrasted by itself "
            f"({sizes.micro_batch * sizes.world_size} of {sizes.global_batch} samples)"
        )
    if not isinstance(objective, DividedMethod):
        return (
            f"train.accumulate=exact: {type(objective).__name__} is no DividedMethod, so each of "
            f"{sizes.accumulation} micro-batches has a loss of its own, as with plain"
        )
    kind = nn.modules.batchnorm._BatchNorm
    norms = sum(
        isinstance(part, kind) and part.training for of in objective.encoders for part in of.modules()
    )
    if not norms:
        return None
    return (
        f"train.accumulate=exact: {norms} batch norms inside the encoders take their statistics from one "
        f"micro-batch ({sizes.micro_batch * sizes.world_size} of {sizes.global_batch} samples); everything "
        "after the encoders sees them all"
    )


def exact_passes(
    engine: Engine, batch: Batch, clusters: PrototypeTable | None, guard: StepGuard
) -> StepOutput:
    """Gradients of the loss of this rank's whole batch, in the memory of a micro-batch and all encodings.

    GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"):
    the encoders run without gradient over all micro-batches; heads and losses run once, on all encodings;
    then the encoders run again, micro-batch by micro-batch and with the random draws of the first time, and
    hand on the gradients that the losses have left at their encodings.

    Args:
        engine: of a `DividedMethod`.
        batch: all samples of this rank's step, on the device.
        clusters: see `Objective.forward`.
        guard: has begun the step.
    """
    size = engine.sizes.micro_batch
    micro_batches = [batch.rows(start, start + size) for start in range(0, len(batch.keys), size)]
    states: list[Any] = []
    encodings = Encodings(len(batch.keys))
    with torch.no_grad():
        for part in micro_batches:
            states.append(random_state())
            encodings.add(engine.encode(part))
    guard.undo()  # the second pass moves the running averages of batch norms, like any other pass
    assert isinstance(engine.objective, DividedMethod)
    trained = any(p.requires_grad for encoder in engine.objective.encoders for p in encoder.parameters())
    engine.begin_backward(last=not trained)
    whole, leaves = encodings.joined(trained)
    output = engine.forward(batch, clusters, whole)
    engine.backward(output.loss * guard.allowance(output.loss.detach()))
    del whole
    if not trained:
        return output
    gradients = [leaf.grad for leaf in leaves]
    del leaves, encodings
    drawn = random_state()
    for number, (part, state) in enumerate(zip(micro_batches, states, strict=True), start=1):
        restore_random_state(state)
        engine.begin_backward(last=number == len(micro_batches))
        outputs = [value for value in tree_leaves(engine.encode(part)) if isinstance(value, Tensor)]
        rows = slice((number - 1) * size, number * size)
        pairs = [
            (value, gradient[rows])
            for value, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and value.requires_grad
        ]
        engine.backward_from([value for value, _ in pairs], [gradient for _, gradient in pairs])
    restore_random_state(drawn)
    return output


def whole_loss(engine: Engine, part: Batch) -> tuple[Tensor, list[Tensor]]:
    """The loss that `exact_passes` takes, of micro-batches like `part`: to try whether it fits the memory.

    Returns:
        the loss, and the encodings it has a gradient for.
    """
    times = engine.sizes.accumulation
    encodings = Encodings(times * len(part.keys))
    with torch.no_grad():
        encoded = engine.objective(part, encode_only=True)
    for _ in range(times):
        encodings.add(encoded)
    whole, leaves = encodings.joined(differentiable=True)
    loss: Tensor = engine.objective(join([part] * times), None, whole).loss
    return loss, [leaf for leaf in leaves if leaf.requires_grad]


def weighted_sum(tensors: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> Tensor:
    """A scalar whose backward pass brings each tensor its gradient, divided by `scale`."""
    products = [
        (value.float() * (gradient.float() / scale)).sum()
        for value, gradient in zip(tensors, gradients, strict=True)
    ]
    return torch.stack(products).sum()


class Encodings:
    """Encodings of the micro-batches of a step, each written to its place in those of the whole batch.

    Args:
        samples: of the whole batch.
    """

    def __init__(self, samples: int) -> None:
        self.samples, self.filled = samples, 0
        self.values: list[Any] = []
        self.structure: Any = None

    def add(self, encodings: Any) -> None:
        """Take the encodings of the next micro-batch (see `DividedMethod.encode`)."""
        values, self.structure = tree_flatten(encodings)
        if not self.values:
            self.values = [
                value.new_empty((self.samples, *value.shape[1:])) if isinstance(value, Tensor) else value
                for value in values
            ]
        rows = 0
        for whole, value in zip(self.values, values, strict=True):
            if isinstance(value, Tensor):
                rows = len(value)
                whole[self.filled : self.filled + rows].copy_(value)
        self.filled += rows

    def joined(self, differentiable: bool) -> tuple[Any, list[Tensor]]:
        """Those of the whole batch, and the tensors among them, which can be made to get a gradient."""
        tensors = [value for value in self.values if isinstance(value, Tensor)]
        for value in tensors:
            value.requires_grad_(differentiable and value.is_floating_point())
        return tree_unflatten(self.values, self.structure), tensors
