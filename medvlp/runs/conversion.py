"""A checkpoint in forms that other programs read: DeepSpeed's universal checkpoint, and plain safetensors.

Needs neither DeepSpeed nor a process group. The output folder appears whole or not at all.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import FORMAT, WEIGHTS
from medvlp.runs.optimizer_files import STEP, OptimizerFiles
from medvlp.runs.state_files import StateFile
from shards.atomic import atomic_folder

#: File of `to_safetensors` with the whole optimiser state.
OPTIMIZER = "optimizer.safetensors"


def to_safetensors(checkpoint: Path, out: Path) -> list[Path]:
    """Write `weights.safetensors` and `optimizer.safetensors` with whole float32 tensors.

    The second holds `<parameter>.exp_avg`, `<parameter>.exp_avg_sq` or `<parameter>.momentum_buffer` in the
    parameter's shape, and `<parameter>.step` with one element.

    Args:
        checkpoint: folder of a checkpoint.
        out: folder to make.

    Returns:
        The files.

    Raises:
        CheckpointError: the checkpoint is damaged or of an older layout, `out` exists, or the disk refused.
    """
    _, weights, files, _ = _open(checkpoint, out)
    optimizer: dict[str, Tensor] = {}
    for name in files.names():
        for key, value in _whole_state(files, name, weights[name]).items():
            optimizer[f"{name}.{key}"] = value
    return _write(out, {WEIGHTS: weights, OPTIMIZER: optimizer})


def to_universal(checkpoint: Path, out: Path) -> list[Path]:
    """Write a DeepSpeed universal checkpoint, which DeepSpeed loads at any world size at ZeRO 1 to 3.

    `deepspeed_engine.load_checkpoint(out)` reads it with `{"checkpoint": {"load_universal": true}}`. Learning
    rate and other settings of the optimiser are left to the program that loads it; buffers DeepSpeed does not
    load from there (they are in `mp_rank_00_model_states.pt`, under "module").

    Args and errors are those of `to_safetensors`.
    """
    opened, weights, files, state = _open(checkpoint, out)
    tag = checkpoint.name
    names = state["trainable"]
    contents: dict[str, Any] = {}
    steps = [files.step(name) or 0.0 for name in names]
    for name in names:
        folder = f"{tag}/zero/{name}"
        contents[f"{folder}/fp32.pt"] = {"param": weights[name]}
        for key, value in _whole_state(files, name, weights[name]).items():
            contents[f"{folder}/{key}.pt"] = value.reshape(()) if key == STEP else {"param": value}
    groups: list[dict[str, Any]] = [{} for _ in range(state["groups"])]
    contents[f"{tag}/zero/optimizer_state.pt"] = {
        "ds_version": metadata.version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(max(steps, default=0.0))}}, "param_groups": groups,
        },
    }  # fmt: skip
    contents[f"{tag}/mp_rank_00_model_states.pt"] = {
        "module": weights,
        "buffer_names": [name for name in weights if name not in state["parameters"]],
        "param_shapes": [],
        "ds_version": metadata.version("deepspeed"),
        "dp_world_size": opened.world_size,
        "mp_world_size": 1,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        **state["counters"],
    }
    return _write(out, contents, {"latest_universal": tag})


def _open(folder: Path, out: Path) -> tuple[Checkpoint, dict[str, Tensor], OptimizerFiles, dict[str, Any]]:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.manifest.format != FORMAT:
        raise CheckpointError(
            f"{folder} has layout {checkpoint.manifest.format}; only layout {FORMAT} is converted"
        )
    if out.exists():
        raise CheckpointError(f"{out} exists; choose a folder that does not")
    weights = safetensors.torch.load_file(checkpoint.weights)
    return checkpoint, weights, checkpoint.optimizer(), checkpoint.state_for(0)["engine"]


def _whole_state(files: OptimizerFiles, name: str, weight: Tensor) -> dict[str, Tensor]:
    """The optimiser state of one parameter, moments in its shape; empty if it was never updated."""
    whole = {key: files.part(name, key, 0, weight.numel()).view(weight.shape) for key in files.keys(name)}
    step = files.step(name)
    return whole if step is None else whole | {STEP: torch.tensor([step])}


def _write(out: Path, contents: dict[str, Any], texts: dict[str, str] | None = None) -> list[Path]:
    try:
        with atomic_folder(out) as partial:
            for name, content in contents.items():
                StateFile(partial / name, content).write()
            for name, text in (texts or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    return [out / name for name in [*contents, *(texts or {})]]
