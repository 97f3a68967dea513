"""Later phases of a run, tried before the first step: one that does not fit the GPU is found at the start."""

import dataclasses
import logging
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.base import Progress
from medvlp.prototypes.usage import uncounted
from medvlp.runs.randomness import random_state, restore_random_state
from medvlp.training.accumulation import whole_loss
from medvlp.training.device_memory import naming_memory
from medvlp.training.engine import Engine
from medvlp.training.schedule import Schedule
from medvlp.training.step_guard import StepGuard

logger = logging.getLogger(__name__)


def rehearse_phases(
    engine: Engine, schedule: Schedule, guard: StepGuard, batches: Iterator[Batch], config: Config, step: int
) -> Iterator[Batch]:
    """Forward and backward of every phase after that of `step`, with reports of the greatest length.

    PRIOR's last phase needs half as much memory again as its first, and begins days later. Leaves no trace:
    buffers and random states are put back, gradients are dropped, and the batch it uses is given out again.

    Args:
        engine, schedule, guard, config: of the run. step: finished steps.
        batches: of the run.

    Returns:
        the same batches.

    Raises:
        DeviceMemoryError: a phase does not fit.
    """
    wanted = engine.device.type == "cuda" if config.train.rehearse is None else config.train.rehearse
    later = schedule.phases > schedule.phases[min(step, schedule.steps - 1)]
    if not wanted or not later.any():
        return batches
    first = next(batches)
    batch = _longest(first, config.data.max_tokens).to(engine.device)
    random = random_state()
    parameters = [p for p in engine.objective.parameters() if p.requires_grad]
    engine.objective.train()
    for phase in np.unique(schedule.phases[later]).tolist():
        begin = int(np.argmax(schedule.phases == phase))
        engine.objective.on_progress(Progress(0, begin, schedule.steps, phase))
        guard.begin()
        part = f"rehearsal of phase {phase + 1}"
        with naming_memory(part, config, engine.sizes.micro_batch), uncounted(engine.objective):
            # Not through DeepSpeed: gradients that are returned start no reduction and stay in no buffer.
            loss = engine.objective(batch, None).loss
            torch.autograd.grad(loss, parameters, allow_unused=True)
            if engine.exact:  # heads and losses see all micro-batches at once
                loss, encodings = whole_loss(engine, batch)
                torch.autograd.grad(loss, [*encodings, *parameters], allow_unused=True)
        guard.undo()
    restore_random_state(random)
    if engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        logger.info("all phases fit the GPU: at most %.1f GiB with reports of full length", peak)
    return chain([first], batches)


def _longest(batch: Batch, length: int) -> Batch:
    """The batch with its reports padded to `length` tokens, the most that a report may have."""
    # Padding counts as if it were read, so that no group of `text.length_groups` is shorter.
    text = dataclasses.replace(batch.text.padded(length), lengths=(length,) * len(batch.keys))
    return dataclasses.replace(batch, text=text)
