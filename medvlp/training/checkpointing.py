"""The run's side of checkpoints: when to save, what a run's state is, and whether one fits this run."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.training import checkpoint
from medvlp.training.batch_plan import BatchPlan
from medvlp.training.callbacks import BaseCallback, Callback, StepRecord
from medvlp.training.engine import Engine
from medvlp.training.errors import CheckpointError
from medvlp.training.manifest import Manifest
from medvlp.training.randomness import random_state, restore_random_state
from medvlp.training.run_folder import config_hash, library_versions
from medvlp.training.state_files import StateFile, read_state

logger = logging.getLogger(__name__)

_REMEDY = "Resume with the config it was made with (config.yaml in the run folder), or choose a new run.dir"


def check_fits(manifest: Manifest, config: Config, plan: BatchPlan) -> None:
    """Refuse a checkpoint this run cannot continue exactly.

    Raises:
        CheckpointError: world size, ZeRO stage, precision, global batch or optimizer differ.
    """
    differences = [
        f"{name} was {then} and is {now}"
        for name, then, now in [
            ("the number of ranks", manifest.world_size, plan.world_size),
            ("zero.stage", manifest.zero_stage, config.zero.stage),
            ("precision", manifest.precision, config.precision),
            ("train.global_batch", manifest.global_batch, plan.global_batch),
            ("optimizer.name", manifest.optimizer or config.optimizer.name, config.optimizer.name),
        ]
        if then != now
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} in {config.run.dir} does not fit: "
            f"{'; '.join(differences)}. Resuming with another layout (elastic resume) is not there yet: "
            "use the old values, or a new run.dir"
        )


def check_weights(folder: Path, method: nn.Module) -> None:
    """Refuse a checkpoint whose weights have other names or shapes than the method's; reads only the header.

    Raises:
        CheckpointError: they differ, with the first difference.
    """
    with safetensors.safe_open(folder / checkpoint.WEIGHTS, framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    now = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder} is of another model: {name} is {_shape(saved.get(name))} there and "
                f"{_shape(now.get(name))} in this config. {_REMEDY}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


class CheckpointCallback(BaseCallback):
    """Saves every `checkpoint.every_steps` steps and after the last step.

    Args:
        config: the run's config.
        engine: what holds the weights and optimiser state.
        callbacks: those with state; this one is not among them.
        wandb_run_id: stored for the next start.
    """

    name = "checkpoint"

    def __init__(
        self, config: Config, engine: Engine, callbacks: list[Callback], wandb_run_id: str | None = None
    ):
        self.config = config
        self.engine = engine
        self.callbacks = callbacks
        self.wandb_run_id = wandb_run_id
        self.folder = Path(config.run.dir) / "checkpoints"

    def on_step(self, record: StepRecord) -> None:
        """Save when it is time."""
        every = self.config.checkpoint.every_steps
        if record.last or (every > 0 and record.step % every == 0):
            self.save(record.step, record.epoch)

    def save(self, step: int, epoch: int) -> Path:
        """Write a checkpoint; all ranks call this together.

        Raises:
            CheckpointError: the disk refused.
        """
        started = time.perf_counter()
        partial = checkpoint.prepare(self.folder, step)
        entries = checkpoint.write(partial, self._collect(partial))
        manifest = Manifest(
            step=step,
            epoch=epoch,
            world_size=distributed.world_size(),
            zero_stage=self.engine.zero_stage,
            precision=self.config.precision,
            global_batch=self.engine.plan.global_batch,
            optimizer=self.config.optimizer.name,
            config_hash=config_hash(self.config),
            wandb_run_id=self.wandb_run_id,
            versions=library_versions(),
            files=dict(sorted(entries.items())),
        )
        final = checkpoint.commit(partial, manifest, self.config.checkpoint)
        size = sum(entry["bytes"] for entry in entries.values()) / 1e6
        logger.info("checkpoint %s: %.1f MB in %.1f s", final.name, size, time.perf_counter() - started)
        return final

    def _collect(self, folder: Path) -> list[StateFile]:
        files = self.engine.collect_state(folder)
        weights: dict[str, Tensor] = self.engine.full_weights()
        if distributed.is_main():
            files.append(StateFile(folder / checkpoint.WEIGHTS, weights))
        state: dict[str, Any] = {
            "random": random_state(),
            "callbacks": {callback.name: callback.state_dict() for callback in self.callbacks},
        }
        files.append(StateFile(folder / _rank_file(distributed.rank()), state))
        return files

    def load(self, folder: Path) -> None:
        """Restore this rank's engine and callbacks from a verified checkpoint; a collective.

        Raises:
            CheckpointError: it is not of this config (other parts frozen, other parameter groups).
        """
        try:
            self.engine.load_state(folder)
        except (RuntimeError, KeyError, ValueError, IndexError, AssertionError, AttributeError) as error:
            if isinstance(error, RuntimeError) and distributed.is_lost_peer(error):
                raise
            text = " ".join(str(error).split())[:200]
            reason = f"it holds no {text}" if isinstance(error, KeyError) else text
            raise CheckpointError(f"{folder} does not fit this config ({reason}). {_REMEDY}") from error
        state = read_state(folder / _rank_file(distributed.rank()))
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))


def restore_randomness(folder: Path) -> None:
    """Put this rank's random generators back, last before the first step: set-up draws from them."""
    restore_random_state(read_state(folder / _rank_file(distributed.rank()))["random"])


def _rank_file(rank: int) -> str:
    return f"ranks/rank-{rank:05d}.pt"
