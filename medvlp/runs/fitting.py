"""Whether a checkpoint is one this run can go on from. World size and ZeRO stage are free to change."""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import nn

from medvlp.config import Config
from medvlp.data.batch_plan import BatchPlan
from medvlp.runs import checkpoint
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import FORMAT, Manifest

REMEDY = "Resume with the config it was made with (config.yaml in the run folder), or choose a new run.dir"


def check_fits(manifest: Manifest, config: Config, plan: BatchPlan) -> None:
    """Refuse a checkpoint whose sequence of updates this run would not continue.

    Raises:
        CheckpointError: precision, global batch or optimizer differ, or another version wrote it.
    """
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} in {config.run.dir} has layout {manifest.format}, this "
            f"version resumes from layout {FORMAT}; use the version that wrote it, or choose a new run.dir"
        )
    differences = [
        f"{name} was {then} and is {now}"
        for name, then, now in [
            ("precision", manifest.precision, config.precision),
            ("train.global_batch", manifest.global_batch, plan.global_batch),
            ("optimizer.name", manifest.optimizer, config.optimizer.name),
        ]
        if then != now
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} in {config.run.dir} does not fit: "
            f"{'; '.join(differences)}. Use the old values, or a new run.dir (the number of ranks and "
            "zero.stage may change)"
        )


def check_weights(folder: Path, method: nn.Module) -> None:
    """Refuse a checkpoint whose weights have other names or shapes than the method's; reads only the header.

    Raises:
        CheckpointError: they differ, with the first difference.
    """
    path = folder / checkpoint.WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    now = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder} is of another model: {name} is {_shape(saved.get(name))} there and "
                f"{_shape(now.get(name))} in this config. {REMEDY}"
            )


def check_trainable(folder: Path, saved: list[str], method: nn.Module) -> None:
    """Refuse a checkpoint of a run that trained other parameters: some would go on without their moments.

    Raises:
        CheckpointError: they differ, with the first difference.
    """
    now = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    for name in sorted(now ^ set(saved)):
        then, today = ("frozen", "trained") if name in now else ("trained", "frozen")
        raise CheckpointError(
            f"{folder} does not fit this config: {name} was {then} there and is {today} here. {REMEDY}"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
