"""The run's side of checkpoints: when to save, what a run's state is, and taking it up again."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.runs import checkpoint_files, optimizer_files
from medvlp.runs.agreement import together
from medvlp.runs.checkpoint import REMEDY, Checkpoint
from medvlp.runs.checkpoint_writer import CheckpointWriter
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import FORMAT, WEIGHTS, Manifest, rank_file
from medvlp.runs.randomness import random_state
from medvlp.runs.run_folder import config_hash, library_versions
from medvlp.runs.state_files import StateFile
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.engine import Engine

logger = logging.getLogger(__name__)


class CheckpointCallback(Callback):
    """Saves every `checkpoint.every_steps` steps, every `every_minutes` minutes, and after the last step.

    Args:
        config: the run's config.
        engine: what holds the weights and optimiser state.
        callbacks: those with state; this one is not among them.
        wandb_run_id: stored for the next start.
        identity: what the run is made from and draws (`Manifest.identity`), stored in every manifest.
        metrics: gives the metrics that hold for a step, for `keep_best`.
        log: takes the seconds the loop stood still for a save.

    Attributes:
        alive: called with a place and the finished steps while the ranks wait for a slow disk, so that nobody
            takes them for dead.
    """

    name = "checkpoint"

    def __init__(
        self,
        config: Config,
        engine: Engine,
        callbacks: list[Callback],
        wandb_run_id: str | None = None,
        identity: Mapping[str, str] | None = None,
        metrics: Callable[[int], Mapping[str, float]] = lambda step: {},
        log: Callable[[dict[str, float]], None] = lambda metrics: None,
    ):
        self.config = config
        self.engine = engine
        self.callbacks = callbacks
        self.wandb_run_id = wandb_run_id
        self.metrics, self.log = metrics, log
        self.alive: Callable[[str, int], None] = lambda place, step: None
        self.folder = Path(config.run.dir) / "checkpoints"
        self._writer = CheckpointWriter(self.folder, config.checkpoint)
        self._copies = HostCopies(engine.device)
        self._last = time.monotonic()
        self._description: dict[str, Any] = {
            "config_hash": config_hash(config),
            "versions": library_versions(),
            "identity": dict(identity or {}),
        }

    def on_start(self, step: int) -> None:
        """Clean up behind a killed start; the clock of `every_minutes` starts."""
        self._writer.clear()
        self._last = time.monotonic()

    def on_step(self, record: StepRecord) -> None:
        """Finish what was written meanwhile; save when it is time; after the last step wait for the disk."""
        self._writer.poll()
        every = self.config.checkpoint.every_steps
        due = record.last or record.save or (every > 0 and record.step % every == 0)
        if due or self._minutes_are_over():
            self.save(record.step, record.epoch)
        if record.last:
            self._writer.wait(self.alive)

    def on_end(self) -> None:
        """After an error a checkpoint on its way stays unfinished: the other ranks may be gone."""
        self._writer.abandon()

    def _minutes_are_over(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        if minutes == 0:
            return False
        over = distributed.is_main() and time.monotonic() - self._last >= 60 * minutes
        return bool(distributed.greatest_over_ranks([float(over)])[0])

    def save(self, step: int, epoch: int) -> None:
        """Copy the state and start to write it; all ranks call this together.

        Waits for the last checkpoint first, and with `asynchronous: false` for this one too.

        Raises:
            CheckpointError: the disk refused this or the last one.
        """
        started = self._last = time.monotonic()
        self._writer.wait(self.alive)
        waited = time.monotonic() - started
        files = self._collect(checkpoint_files.partial_folder(self.folder, step))
        self._writer.start(files, self._manifest(step, epoch))
        if not self.config.checkpoint.asynchronous:
            self._writer.wait(self.alive)
        stall = time.monotonic() - started
        wait_seconds, stall_seconds = distributed.greatest_over_ranks([waited, stall])
        self.log({"checkpoint/wait_seconds": wait_seconds, "checkpoint/stall_seconds": stall_seconds})

    def _manifest(self, step: int, epoch: int) -> Manifest:
        metrics = dict(self.metrics(step))
        best = self.config.checkpoint.keep_best
        if best is not None and metrics and best not in metrics and distributed.is_main():
            logger.warning(
                "checkpoint.keep_best=%s has not been logged yet; logged so far: %s", best, ", ".join(metrics)
            )
        return Manifest(
            step=step,
            epoch=epoch,
            world_size=distributed.world_size(),
            zero_stage=self.engine.zero_stage,
            precision=self.config.precision,
            global_batch=self.engine.sizes.global_batch,
            optimizer=self.config.optimizer.name,
            wandb_run_id=self.wandb_run_id,
            metrics=metrics,
            format=FORMAT,
            **self._description,
        )

    def _collect(self, folder: Path) -> list[StateFile]:
        """Copies of this rank's state in host memory, as files to be written."""
        rank = distributed.rank()
        weights = {}
        for name, whole in self.engine.whole_parameters():
            if rank == 0:
                weights[name] = self._copies.copy(f"weights/{name}", whole, torch.float32)
        buffers = self._copies.copy_tree("buffers", self.engine.buffers())
        tensors, starts = self.engine.optimizer_state()
        state = {
            "random": random_state(),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
            "engine": self.engine.counters(),
            "buffers": {} if rank == 0 else buffers,
        }
        files = [
            StateFile(
                folder / optimizer_files.file_name(rank),
                {name: self._copies.copy(f"optimizer/{name}", tensor) for name, tensor in tensors.items()},
                {"starts": json.dumps(starts)},
            ),
            StateFile(folder / rank_file(rank), self._copies.copy_tree("rank", state)),
        ]
        if rank == 0:
            files.append(StateFile(folder / WEIGHTS, weights | buffers))
        self._copies.finish()
        return files

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore this rank's optimiser, buffers and callbacks from a checkpoint of any layout.

        All ranks call this together. The method must have had its weights (`Checkpoint.weights_into`) when
        the engine was made.

        Raises:
            AgreedError: on all ranks: one of them cannot read its part, or it is not of this config (other
                parts frozen, another bank size).
        """
        together(partial(self._load, checkpoint))

    def _load(self, checkpoint: Checkpoint) -> None:
        """See `load`; no collective."""
        saved, rank = checkpoint.world_size, distributed.rank()
        state = checkpoint.state_for(rank)
        _check_trained(checkpoint.folder, state["engine"]["trainable"], self.engine.objective)
        self.engine.load_state(checkpoint.weights, checkpoint.optimizer(), state["engine"])
        if rank < saved:
            for name, buffer in self.engine.buffers().items():
                if name in state["buffers"]:
                    buffer.copy_(state["buffers"][name])
        try:
            if saved == distributed.world_size():
                for callback in self.callbacks:
                    callback.load_state_dict(state["callbacks"].get(callback.name, {}))
            else:
                every = checkpoint.callback_states()
                for callback in self.callbacks:
                    callback.load_states([states.get(callback.name, {}) for states in every])
        except (RuntimeError, KeyError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{checkpoint.folder} does not fit this config ({text}). {REMEDY}"
            ) from error


def _check_trained(folder: Path, saved: list[str], method: nn.Module) -> None:
    """Refuse a checkpoint of a run that trained other parameters: some would go on without their moments."""
    now = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    for name in sorted(now ^ set(saved)):
        then, today = ("frozen", "trained") if name in now else ("trained", "frozen")
        raise CheckpointError(
            f"{folder} does not fit this config: {name} was {then} there and is {today} here. {REMEDY}"
        )


class HostCopies:
    """Buffers that are allocated at the first save and used again at every later one.

    Args:
        device: where the state lies; for CUDA the buffers are pinned, so that copying runs at full speed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, place: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy a tensor of any device; complete after `finish`.

        Args:
            place: name of the buffer; what it held before is overwritten.
            tensor: any shape and layout.
            dtype: of the copy; default: the tensor's own.

        Returns:
            The contiguous buffer on the CPU.
        """
        dtype = dtype or tensor.dtype
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != dtype:
            buffer = torch.empty(tensor.shape, dtype=dtype, pin_memory=self._device.type == "cuda")
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def copy_tree(self, place: str, value: Any) -> Any:
        """Copy lists, tuples and dicts with the tensors in them; other values are taken as they are."""
        if isinstance(value, Tensor):
            return self.copy(place, value)
        if isinstance(value, dict):
            return {name: self.copy_tree(f"{place}/{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy_tree(f"{place}/{i}", item) for i, item in enumerate(value))
        return value

    def finish(self) -> None:
        """Wait until all copies are complete."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
