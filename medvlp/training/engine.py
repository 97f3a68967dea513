"""DeepSpeed around a method: forward, backward, step, learning rate, gradient norm, state, whole weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.base import Method
from medvlp.training.batch_plan import BatchPlan
from medvlp.training.deepspeed_config import deepspeed_json
from medvlp.training.deepspeed_files import CollectingCheckpointEngine
from medvlp.training.parameter_groups import parameter_groups
from medvlp.training.state_files import StateFile

# DeepSpeed 0.19 still uses the names that torch 2.14 renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

#: Name of the folder, inside a checkpoint, of the files DeepSpeed reads back.
STATE_FOLDER = "deepspeed"


class Engine:
    """The only place that calls DeepSpeed.

    Attributes:
        method: the method itself (its parameters are cast, and at stage 3 sharded, by DeepSpeed).
        device: where it runs.
        plan: micro-batch, accumulation and ranks.
        zero_stage: 0 to 3.
    """

    def __init__(self, method: Method, config: Config, plan: BatchPlan, device: torch.device):
        """Shard and cast the method; needs the default process group. Weights must be equal on all ranks."""
        self.method = method
        self.device = device
        self.plan = plan
        self.zero_stage = config.zero.stage
        method.to(device)
        groups, self._scales = parameter_groups(method, config.optimizer)
        _refuse_shared_memory_collectives()
        deepspeed.init_distributed(dist_init_required=False)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=method,
            model_parameters=groups,
            config=deepspeed_json(config, plan, device.type),
            dist_init_required=False,
        )
        self._masters: dict[int, Tensor] = {}
        if config.zero.stage == 0 and config.precision != "fp32":
            self._repair_stage_zero()
        self._engine.checkpoint_engine = self._files = CollectingCheckpointEngine()
        # It would copy scripts weights.safetensors makes needless, and on a full disk fail on rank 0 alone.
        self._engine._copy_recovery_script = lambda folder: None
        self._plain = config.zero.stage == 0 and config.precision == "fp32"
        self._norm: Tensor | float | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The method's loss and terms for one micro-batch on this rank."""
        outputs: dict[str, Tensor] = self._engine(batch)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss` (divided by the accumulation steps, averaged over ranks)."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Count one micro-batch; at the last of a global batch clip, update weights, clear gradients."""
        if self._plain and self._engine.is_gradient_accumulation_boundary():
            # DeepSpeed knows the norm at every other stage and precision.
            self._norm = nn.utils.get_total_norm(
                [p.grad for p in self.method.parameters() if p.grad is not None]
            )
        self._engine.step()
        if not self._plain:
            self._norm = self._engine.get_global_grad_norm()

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping (waits for the device)."""
        return float(self._norm) if self._norm is not None else float("nan")

    def gradient_is_finite(self) -> Tensor:
        """0-d bool on the device: whether the last step's gradient norm is finite (does not wait)."""
        return torch.isfinite(torch.as_tensor(0.0 if self._norm is None else self._norm, device=self.device))

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the scheduled learning rate, times each group's factor, for the next step."""
        for group, scale in zip(self._optimizer.param_groups, self._scales, strict=True):
            group["lr"] = learning_rate * scale

    def collect_state(self, folder: Path) -> list[StateFile]:
        """This rank's DeepSpeed state (weights, optimiser) as files to be written below `folder`.

        The tensors are the live ones: write or copy them before the next step. All ranks call this together.
        """
        self._files.collected.clear()
        self._engine.save_checkpoint(str(folder), tag=STATE_FOLDER, save_latest=False)
        return list(self._files.collected)

    def load_state(self, folder: Path) -> None:
        """Restore what `collect_state` gave, at the same world size and stage; a collective."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=STATE_FOLDER)
        if path is None:
            raise FileNotFoundError(f"{folder / STATE_FOLDER}: DeepSpeed finds no state here")

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """All parameters in float32 (the master weights) and buffers, on the CPU of rank 0; {} on others.

        Gathers one parameter at a time. All ranks call this together.
        """
        weights: dict[str, Tensor] = {}
        names = set()
        for name, parameter in self.method.named_parameters(remove_duplicate=False):
            names.add(name)
            full = self._masters.get(id(parameter))
            full = _full_parameter(parameter) if full is None else full
            if distributed.is_main():
                weights[name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        if distributed.is_main():
            buffers = {name: b for name, b in self.method.state_dict().items() if name not in names}
            weights |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        return weights

    def _repair_stage_zero(self) -> None:
        """At stage 0 in 16 bit DeepSpeed makes a step on zero gradients, and keeps its masters to itself.

        That step leaves Adam's counter at 1, so that its bias correction would make the first update 0.74 of
        what it should be. (The JSON's learning rate of 0 keeps it from decaying weights.)
        """
        self._engine.basic_optimizer.state.clear()
        for model_group, master_group in zip(
            self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True
        ):
            self._masters |= {id(p): master for p, master in zip(model_group, master_group, strict=True)}

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def _refuse_shared_memory_collectives() -> None:
    """Keep DeepSpeed on gloo between CPU ranks.

    Its own shared-memory collectives are compiled at the first start (a compiler may be missing) and name
    their segments by user and port, so that two runs on one machine can meet in them.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _full_parameter(parameter: nn.Parameter) -> Tensor:
    master: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if master is not None:
        return master
    if hasattr(parameter, "ds_id"):  # frozen at stage 3: sharded, but not the optimiser's
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()
