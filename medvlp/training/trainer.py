"""The training loop. It knows no method, no task, no logger and no file."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from medvlp.data.batch import Batch, join
from medvlp.losses.contrastive import accuracies_read
from medvlp.methods.base import Progress, is_metric
from medvlp.prototypes.table import PrototypeTable
from medvlp.training.accumulation import exact_passes
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.consensus import Consensus
from medvlp.training.engine import Engine
from medvlp.training.hangs import Watchdog
from medvlp.training.interrupts import Interrupts
from medvlp.training.on_device import on_device
from medvlp.training.prototype_refresh import PrototypeRefresh
from medvlp.training.schedule import Schedule
from medvlp.training.step_guard import StepGuard


class Trainer:
    """Trains an objective from a finished step to the last one.

    Args:
        engine: DeepSpeed around the objective.
        batches: this rank's micro-batches, from the first one of the next step on.
        schedule: learning rate and optimiser phase of every step.
        steps_per_epoch: steps after which a new epoch begins.
        callbacks: called in order after every step.
        guard: what keeps bad steps from changing anything.
        watchdog: is told where this rank is.
        log_every: steps between those at which metrics are read.
        step: finished steps.
        refresh: the callback that has the table of the prototype service; None: there is no service.
        agree_every: steps between agreements of the ranks (see `Consensus`); the last step has one.
    """

    def __init__(
        self,
        engine: Engine,
        batches: Iterator[Batch],
        schedule: Schedule,
        steps_per_epoch: int,
        callbacks: Sequence[Callback],
        guard: StepGuard,
        watchdog: Watchdog,
        log_every: int = 1,
        step: int = 0,
        refresh: PrototypeRefresh | None = None,
        agree_every: int = 1,
    ):
        self.engine = engine
        self.batches = on_device(batches, engine.device)
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.callbacks = callbacks
        self.guard = guard
        self.watchdog = watchdog
        self.log_every = log_every
        self.step = step
        self.refresh = refresh
        self.agree_every = agree_every

    def train(self, interrupts: Interrupts) -> None:
        """Run until the last step, or until the ranks agree on an interrupt."""
        self.engine.objective.train()
        consensus = Consensus(interrupts, self.callbacks, self.agree_every, self._mark_agreement)
        try:
            for callback in self.callbacks:
                callback.on_start(self.step)
            while self.step < self.schedule.steps and not any(of.finished for of in self.callbacks):
                with accuracies_read(self._is_logged()):
                    record = self._train_step()
                record.finished = self.step == self.schedule.steps
                stops = consensus.reach(self.step, record.finished)
                record.last = stops or record.finished
                for callback in self.callbacks:
                    self.watchdog.mark(f"the callback {callback.name!r}", record.step - 1)
                    callback.on_step(record)
                self.watchdog.first_step_is_done()
                if record.last:
                    break
            if self.step < self.schedule.steps and interrupts.stopped_by is None:
                consensus.reach(self.step, last=True)  # ended early: a request to stop may be on its way
        finally:
            self.watchdog.mark("the end")
            self.watchdog.last_step_is_done()
            for callback in reversed(self.callbacks):
                callback.on_end()

    def _mark_agreement(self) -> None:
        self.watchdog.mark("the agreement on going on", self.step - 1)

    def _is_logged(self) -> bool:
        """Whether the metrics of the next step are read."""
        return (self.step + 1) % self.log_every == 0 or self.step + 1 == self.schedule.steps

    def _train_step(self) -> StepRecord:
        started = time.perf_counter()
        epoch, learning_rate = self.step // self.steps_per_epoch, float(self.schedule.rates[self.step])
        logged = self._is_logged()
        if self.schedule.restarts_at(self.step):
            self.engine.restart_optimizer()
        phase = int(self.schedule.phases[self.step])
        self.engine.objective.on_progress(Progress(epoch, self.step, self.schedule.steps, phase))
        self.engine.set_learning_rate(learning_rate)
        clusters = "without clusters" if self._clusters is None else "with clusters"
        self.guard.expect(f"phase {phase}, {clusters}, {self.engine.objective.loss_variant}")
        self.guard.begin()
        passes = self._exact_passes() if self.engine.exact else self._plain_passes()
        if not self.engine.applied:
            self.guard.undo()
        self.step += 1
        return StepRecord(
            step=self.step,
            epoch=epoch,
            last=False,
            applied=self.engine.applied,
            logged=logged,
            losses=passes.losses,
            keys=passes.keys,
            learning_rate=learning_rate,
            samples=self.engine.sizes.global_batch,
            skipped=passes.skipped,
            seconds=time.perf_counter() - started,
            data_seconds=passes.waited,
            engine=self.engine,
        )

    def _plain_passes(self) -> "_Passes":
        """Each micro-batch has a loss of its own; their gradients are averaged."""
        passes, accumulation = _Passes(), self.engine.sizes.accumulation
        found: dict[str, list[torch.Tensor]] = {}
        for number in range(1, accumulation + 1):
            batch, there = self._load(passes)
            output = self.engine.forward(there, self._clusters)
            for name, value in output.named.items():
                found.setdefault(name, []).append(value.detach().float())
            loss = output.loss
            if number == accumulation:
                passes.losses = {name: mean_of(name, values) for name, values in found.items()}
                loss = loss * self.guard.allowance(passes.losses["loss"])
            self.engine.backward(loss)
            self.engine.step()
            for callback in self.callbacks:
                callback.on_micro_batch(batch, output, self.step)
        return passes

    def _exact_passes(self) -> "_Passes":
        """One loss of all micro-batches together."""
        passes = _Passes()
        parts = [self._load(passes) for _ in range(self.engine.sizes.accumulation)]
        # Joined where they go: what the host joins is not pinned, and its copy would be waited for.
        there = join([part for _, part in parts])
        output = exact_passes(self.engine, there, self._clusters, self.guard)
        batch = there if self.engine.device.type == "cpu" else join([part for part, _ in parts])
        passes.losses = {name: value.detach().float() for name, value in output.named.items()}
        self.engine.step()
        for callback in self.callbacks:
            callback.on_micro_batch(batch, output, self.step)
        return passes

    @property
    def _clusters(self) -> PrototypeTable | None:
        return None if self.refresh is None else self.refresh.table

    def _load(self, passes: "_Passes") -> tuple[Batch, Batch]:
        """This rank's next micro-batch, on the host and on the device."""
        self.watchdog.mark("loading data", self.step)
        asked = time.perf_counter()
        batch, there = next(self.batches)
        passes.waited += time.perf_counter() - asked
        self.watchdog.mark("forward and backward", self.step)
        passes.keys += batch.keys
        passes.skipped += batch.skipped
        return batch, there


def mean_of(term: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the micro-batches that have the term, 0-d."""
    stacked = torch.stack([*values])
    return stacked.nanmean() if is_metric(term) else stacked.mean()


@dataclass
class _Passes:
    """What `StepRecord` says of the passes of a step."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    skipped: int = 0
    waited: float = 0.0
