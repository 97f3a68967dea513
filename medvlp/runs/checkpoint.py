"""A checkpoint to go on from or to read: found and verified, checked against a config, loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
from torch import nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch_sizes import BatchSizes
from medvlp.runs.errors import CheckpointError, UnreadableError
from medvlp.runs.manifest import FORMAT, WEIGHTS, Manifest, rank_file, step_folders
from medvlp.runs.optimizer_files import OptimizerFiles
from medvlp.runs.randomness import restore_random_state, seed_rank
from medvlp.runs.state_files import read_state

logger = logging.getLogger(__name__)

#: Closes a message about a checkpoint that does not fit the config.
REMEDY = "Use the config it was made with (config.yaml in the run folder), or choose a new run.dir"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest was read once, when the folder was verified."""

    folder: Path
    manifest: Manifest

    @classmethod
    def find(cls, run_dir: Path | str) -> Self | None:
        """The newest checkpoint of a run whose files are all there and undamaged; None without any.

        Damaged ones are skipped with a warning. In a process group all ranks call this together: each checks
        its share of the files, and all get the same answer.

        Raises:
            CheckpointError: there are checkpoints and none of them is good, or a newer one cannot be read
                now: passed over, it would be deleted as one that the run fell back behind.
        """
        checkpoints = Path(run_dir) / "checkpoints"
        names, refusal = distributed.broadcast_object(_names(checkpoints) if distributed.is_main() else None)
        if refusal:
            raise CheckpointError(
                f"{checkpoints} cannot be read now ({refusal}), so whether the run has a checkpoint cannot "
                "be told. Start again when it can be read; nothing was changed"
            )
        problems = []
        for name in reversed(names):
            found, problem = cls._verify_together(checkpoints / name)
            if found is not None:
                return found
            problems.append(problem)
            if distributed.is_main():
                logger.warning("checkpoint %s is not used: %s", name, problem)
        if problems:
            raise CheckpointError(
                f"{checkpoints} has {len(problems)} checkpoints and none is good ({problems[0]}). Bring one "
                "back from a copy, or start anew in another run.dir; nothing was changed"
            )
        return None

    @classmethod
    def _verify_together(cls, folder: Path) -> tuple[Self | None, str | None]:
        """The checkpoint where no rank finds fault with its share of the files, else the first fault.

        Raises:
            CheckpointError: no rank has found a fault, and one cannot read its share now.
        """
        manifest = problem = refusal = None
        try:
            manifest = Manifest.read(folder)
            share = list(manifest.files)[distributed.rank() :: distributed.world_size()]
            problem = manifest.problem(folder, share)
        except UnreadableError as error:
            refusal = str(error)
        except CheckpointError as error:
            problem = str(error)
        of_ranks = distributed.gather_objects((problem, refusal))
        problem = next((found for found, _ in of_ranks if found), None)
        refusal = next((found for _, found in of_ranks if found), None)
        if refusal and not problem:
            raise CheckpointError(
                f"whether {folder} is good cannot be told: {refusal}. Start again when it can be read, or "
                "move this folder away to go on from an older checkpoint; nothing was changed"
            )
        return (None, problem) if manifest is None or problem else (cls(folder, manifest), None)

    @classmethod
    def open(cls, folder: Path, names: Sequence[str] | None = None) -> Self:
        """One checkpoint, after a look at the files `names` of it (all by default). Needs no other rank.

        Raises:
            CheckpointError: no manifest, or not one of ours; a file is not in it, missing, damaged or cannot
                be read now.
        """
        manifest = Manifest.read(folder)
        names = list(manifest.files) if names is None else names
        for name in names:
            if name not in manifest.files:
                raise CheckpointError(f"the manifest of {folder} names no {name}; choose another checkpoint")
        if problem := manifest.problem(folder, names):
            raise CheckpointError(problem)
        return cls(folder, manifest)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def step(self) -> int:
        """Finished optimiser steps."""
        return self.manifest.step

    @property
    def world_size(self) -> int:
        """Number of ranks that saved it."""
        return self.manifest.world_size

    @property
    def weights(self) -> Path:
        """The file of the whole float32 weights."""
        return self.folder / WEIGHTS

    def check(self, config: Config, sizes: BatchSizes) -> None:
        """Refuse a checkpoint whose sequence of updates this run would not continue.

        World size and ZeRO stage are free to change.

        Raises:
            CheckpointError: precision, global batch or optimizer differ, or another version wrote it.
        """
        saved = self.manifest
        if saved.format != FORMAT:
            raise CheckpointError(
                f"the checkpoint of step {self.step} in {config.run.dir} has layout {saved.format}, this "
                f"version resumes from layout {FORMAT}; use the version that wrote it, or choose a new "
                "run.dir"
            )
        if not saved.optimizer and not self.step:
            raise CheckpointError(
                f"{config.run.dir} holds imported weights, which are no training to go on with: begin one "
                f"with train.start={config.run.dir} and another run.dir"
            )
        differences = [
            f"{name} was {then} and is {now}"
            for name, then, now in [
                ("precision", saved.precision, config.precision),
                ("train.global_batch", saved.global_batch, sizes.global_batch),
                ("optimizer.name", saved.optimizer, config.optimizer.name),
            ]
            if then != now
        ]
        if differences:
            raise CheckpointError(
                f"the checkpoint of step {self.step} in {config.run.dir} does not fit: "
                f"{'; '.join(differences)}. Use the old values, or a new run.dir (the number of ranks and "
                "zero.stage may change)"
            )

    def weights_into(self, method: nn.Module) -> None:
        """Load the weights into a method built from the same config: its parameters and buffers.

        Raises:
            CheckpointError: they cannot be read, or have other names or shapes than the method's; names the
                first difference, found in the file's header before any weight is read.
        """
        now = {name: tuple(value.shape) for name, value in method.state_dict().items()}
        try:
            with safetensors.safe_open(self.weights, framework="pt") as file:
                saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in sorted(saved.keys() | now.keys()):
                if saved.get(name) != now.get(name):
                    raise CheckpointError(
                        f"{self.folder} is of another model: {name} is {_shape(saved.get(name))} there and "
                        f"{_shape(now.get(name))} in this config. {REMEDY}"
                    )
            weights = safetensors.torch.load_file(self.weights)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self.weights} cannot be read ({error})") from error
        method.load_state_dict(weights, strict=True)

    def state_for(self, rank: int) -> dict[str, Any]:
        """What one rank stored beside weights and optimiser: random states, callbacks, engine, buffers.

        A rank that the saved run did not have gets the last one's.
        """
        state: dict[str, Any] = read_state(self.folder / rank_file(min(rank, self.world_size - 1)))
        return state

    def callback_states(self) -> list[Mapping[str, Any]]:
        """Of every rank that saved it, in order: callback's name -> its state."""
        return [self.state_for(rank)["callbacks"] for rank in range(self.world_size)]

    def optimizer(self) -> OptimizerFiles:
        """The optimiser's state, for any layout."""
        return OptimizerFiles(self.folder, self.world_size)

    def randomness(self, seed: int) -> None:
        """Put this rank's random generators back, last before the first step: set-up draws from them.

        A rank that the saved run did not have is seeded by (`seed`, its number, the step).
        """
        rank = distributed.rank()
        if rank < self.world_size:
            restore_random_state(self.state_for(rank)["random"])
        else:
            seed_rank(seed, rank, self.step)


def _names(checkpoints: Path) -> tuple[list[str], str | None]:
    """Names of checkpoints, oldest first; and why they cannot be listed."""
    try:
        return [path.name for _, path in step_folders(checkpoints)], None
    except OSError as error:
        return [], error.strerror or str(error)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
