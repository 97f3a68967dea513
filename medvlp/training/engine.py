"""DeepSpeed around an objective: passes, steps, learning rate, gradient norm, state, whole weights."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch
from medvlp.data.batch_sizes import BatchSizes
from medvlp.methods.base import Objective, StepOutput
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.optimizer_files import OptimizerFiles
from medvlp.training.accumulation import accumulates_exactly, weighted_sum
from medvlp.training.deepspeed_config import deepspeed_json, is_plain, parameter_groups
from medvlp.training.device_memory import naming_memory, naming_setup
from medvlp.training.loss_scale import LossScale
from medvlp.training.optimizer_fragments import (
    Fragment,
    find_fragments,
    fragment_tensors,
    load_fragments,
    load_masters,
    write_elements,
    write_model_elements,
)

# DeepSpeed 0.19 still uses the names that torch 2.14 renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

#: What DeepSpeed counts.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class Engine:
    """The only place that calls DeepSpeed.

    Attributes:
        objective: what is trained (its parameters are cast, and at stage 3 sharded, by DeepSpeed).
        device: where it runs.
        sizes: micro-batch, accumulation and ranks.
        zero_stage: 0 to 3.
        exact: whether a step is one loss over all its micro-batches (`medvlp.training.accumulation`).
        applied: whether the last optimiser step updated the weights; the same on all ranks.
        loss_scale: of fp16; None in other precisions.
    """

    def __init__(self, objective: Objective, config: Config, sizes: BatchSizes, device: torch.device):
        """Shard and cast the objective; needs the default process group and equal weights on all ranks.

        Raises:
            ConfigError: exact accumulation with an offloaded optimiser.
            DeviceMemoryError: what is kept between steps does not fit the GPU.
        """
        self.objective = objective
        self.device = device
        self.sizes = sizes
        self.zero_stage = config.zero.stage
        self.exact = accumulates_exactly(objective, config, sizes)
        if self.exact and config.zero.offload_optimizer:
            raise ConfigError(
                "zero.offload_optimizer=true with train.accumulate=exact: DeepSpeed hands over the gradients "
                "of the last backward pass only, which are those of the encoders; set train.accumulate=plain "
                "or a train.micro_batch that makes a step of one"
            )
        self._precision, self._config = config.precision, config
        if device.type == "cuda":
            choose_kernels(config.train.tf32)
        _refuse_shared_memory_collectives()
        deepspeed.init_distributed(dist_init_required=False)
        with naming_setup(config):
            objective.to(device)
            groups, self._scales = parameter_groups(objective, config.optimizer)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=objective,
                model_parameters=groups,
                config=deepspeed_json(config, sizes, device.type),
                dist_init_required=False,
            )
        self._masters: dict[int, Tensor] = {}
        self._fetching: dict[str, Any] = {}  # by kind of pass
        if config.zero.stage == 0 and config.precision != "fp32":
            self._repair_stage_zero()
        self.loss_scale = LossScale(self._optimizer) if config.precision == "fp16" else None
        self._plain, self._clip = is_plain(config), config.train.gradient_clip
        self._norm: Tensor | float | None = None
        self._boundary_is_said = False
        self.applied = True

    def forward(
        self, batch: Batch, clusters: PrototypeTable | None = None, encodings: Any = None
    ) -> StepOutput:
        """Loss and terms of this rank's samples; see `Objective.forward` and `DividedMethod.forward`.

        Raises:
            DeviceMemoryError: it does not fit the GPU; so do `backward` and `step`.
        """
        given = () if encodings is None else (encodings,)
        self._expect_a_pass("loss")
        with naming_memory("forward pass", self._config, self.sizes.micro_batch):
            output: StepOutput = self._engine(batch, clusters, *given)
        return output

    def encode(self, batch: Batch) -> Any:
        """What `DividedMethod.encode` makes of a micro-batch."""
        self._expect_a_pass("encoders" if torch.is_grad_enabled() else "encoders without gradient")
        with naming_memory("forward pass", self._config, self.sizes.micro_batch):
            return self._engine(batch, encode_only=True)

    def begin_backward(self, last: bool) -> None:
        """With exact accumulation, before each forward and backward pass: whether the step comes after it."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._boundary_is_said = True

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, averaged over ranks (and over micro-batches, unless exact)."""
        # Else gradients of single micro-batches are not reduced, and the ranks part without a word.
        assert not self.exact or self._boundary_is_said, "exact accumulation goes through exact_passes"
        if self.loss_scale is not None and self.zero_stage == 0:
            # DeepSpeed's optimiser divides by the scale at every stage, its `backward` multiplies from 1 on.
            loss = loss.float() * self.loss_scale.value
        with naming_memory("backward pass", self._config, self.sizes.micro_batch):
            self._engine.backward(loss, scale_wrt_gas=not self.exact)

    def backward_from(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Accumulate the gradients that follow from those of some outputs.

        Args:
            tensors: made by a forward pass.
            gradients: of each, as `backward` of what was computed from its value has left them.
        """
        # As a scalar, because only such a one takes the whole way of DeepSpeed's reduction at every stage. It
        # is multiplied by the loss scale once more.
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        self.backward(weighted_sum(tensors, gradients, scale))

    def step(self) -> None:
        """Count one micro-batch; at the last of a global batch clip, update weights, clear gradients.

        With exact accumulation it is called once, for all of them.

        A gradient that is not finite changes neither weights nor optimiser state; `applied` becomes false.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._boundary_is_said = False
        if self.exact:  # called once for all micro-batches, which DeepSpeed counts
            self._engine.micro_steps += self.sizes.accumulation - 1
        if self._plain and boundary:
            self._prepare_plain_step()
        if self.loss_scale is not None and boundary:
            self.loss_scale.begin()
        with naming_memory("optimiser's step", self._config, self.sizes.micro_batch):
            self._engine.step()
        if self.exact and self.zero_stage == 3:
            # DeepSpeed overwrites the gradients of the step before in the first backward pass alone, and adds
            # to them in the others: those of encoders would add up from step to step.
            self._optimizer.grad_partitions_flat_buffer.zero_()
        if not self._plain:
            self._norm = self._engine.get_global_grad_norm()
            self.applied = not boundary or self._engine.was_step_applied()
        if self.loss_scale is not None and boundary:
            if self.zero_stage == 0 and self._norm is not None:
                self._norm = self._norm / self.loss_scale.value_before
            self.loss_scale.end(self.applied)

    def _prepare_plain_step(self) -> None:
        """Do what DeepSpeed does at every other stage: find the norm, refuse a bad one, clip."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.applied = bool(torch.isfinite(self._norm))  # waits for the device, as DeepSpeed's check does
        if not self.applied:
            self.objective.zero_grad(set_to_none=True)  # the optimiser passes over them
        elif self._clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, self._norm)

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all parameters, before clipping (waits for the device)."""
        return float(self._norm) if self._norm is not None else float("nan")

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the scheduled learning rate, times each group's factor, for the next step."""
        for group, scale in zip(self._optimizer.param_groups, self._scales, strict=True):
            group["lr"] = learning_rate * scale

    @torch.no_grad()
    def restart_optimizer(self) -> None:
        """Make the next step a fresh optimiser's first: moments and step counters become zero in place.

        In place, because the state's tensors are what DeepSpeed shards, offloads and saves. Zero moments with
        a zero counter are what Adam and SGD with momentum start from.
        """
        for state in self._engine.basic_optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    value.zero_()
                else:
                    state[name] = 0  # DeepSpeed's CPU Adam counts its steps in an int

    def _fragments(self) -> list[Fragment]:
        named = self.objective.named_parameters()
        return find_fragments(named, self._optimizer, self.zero_stage, distributed.rank(), self._masters)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """This rank's part of the optimiser state: `<key>:<parameter>` -> 1-D tensor, and where parts begin.

        The tensors are the live ones: copy them before the next step.
        """
        fragments = self._fragments()
        if self.zero_stage == 0:  # every rank holds everything and writes its share
            ranks = distributed.world_size()
            fragments = [fragment.share(distributed.rank(), ranks) for fragment in fragments]
        tensors = fragment_tensors(fragments, self._engine.basic_optimizer)
        return tensors, {fragment.name: fragment.start for fragment in fragments}

    def counters(self) -> dict[str, Any]:
        """Plain values beside the optimiser state, the same on all ranks: counters, loss scaling, names."""
        return {
            "counters": {name: int(getattr(self._engine, name)) for name in _COUNTERS},
            "scaler": {} if self.loss_scale is None else self.loss_scale.state_dict(),
            "trainable": [name for name, p in self.objective.named_parameters() if p.requires_grad],
            "parameters": [name for name, _ in self.objective.named_parameters(remove_duplicate=False)],
            "groups": len(self._optimizer.param_groups),
        }

    def load_state(self, weights: Path, files: OptimizerFiles, counters: dict[str, Any]) -> None:
        """Restore masters and optimiser state saved at any world size and stage.

        The objective must have had these weights when the engine was made.

        Args:
            weights: file with the whole float32 weights.
            files: the optimiser state.
            counters: from `counters`.
        """
        fragments = self._fragments()
        if self._precision != "fp32":  # else the weights themselves are the masters
            with safetensors.safe_open(weights, framework="pt") as masters:
                load_masters(fragments, masters)
        load_fragments(fragments, self._engine.basic_optimizer, files)
        for name, value in counters["counters"].items():
            setattr(self._engine, name, value)
        # Where global batches end: DeepSpeed divides this count by the number of micro-batches, which may be
        # another one than before.
        self._engine.micro_steps = self._engine.global_steps * self.sizes.accumulation
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(counters["scaler"])

    @torch.no_grad()
    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter (in float32 where it is trained), gathered one at a time; a collective."""
        for name, _ in self.objective.named_parameters(remove_duplicate=False):
            yield name, self.whole_parameter(name)

    @torch.no_grad()
    def whole_parameter(self, name: str) -> Tensor:
        """One parameter (in float32 where it is trained) on the device; a collective."""
        parameter = self.objective.get_parameter(name)
        master = self._masters.get(id(parameter))
        return (_full_parameter(parameter) if master is None else master).detach()

    @torch.no_grad()
    def rewrite_rows(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Set rows of a trained matrix between two steps, masters and the model's own; their moments to zero.

        Every rank writes its part, so all give the same values.

        Args:
            name: of the parameter, [K, D]. rows: [m] int64. values: [m, D] float32. On the CPU.
        """
        parameter, width = self.objective.get_parameter(name), values.shape[1]
        places = (rows[:, None] * width + torch.arange(width)).flatten()
        for fragment in self._fragments():
            if fragment.name == name:
                write_elements(fragment, self._engine.basic_optimizer, places, values.flatten())
        write_model_elements(parameter, distributed.rank(), places, values.flatten())

    def buffers(self) -> dict[str, Tensor]:
        """This rank's live buffers, those that belong to the objective's state."""
        names = {name for name, _ in self.objective.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in self.objective.state_dict().items() if name not in names}

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """All parameters in float32 (the master weights) and buffers, on the CPU of rank 0; {} on others.

        Gathers one parameter at a time. All ranks call this together.
        """
        weights: dict[str, Tensor] = {}
        for name, full in self.whole_parameters():
            if distributed.is_main():
                weights[name] = full.to("cpu", torch.float32, copy=True).contiguous()
        if distributed.is_main():
            weights |= {name: buffer.detach().cpu().clone() for name, buffer in self.buffers().items()}
        return weights

    def _expect_a_pass(self, kind: str) -> None:
        """At stage 3, with exact accumulation: have DeepSpeed fetch weights ahead in this pass's own order.

        It keeps one order in which modules use them. Where passes of several kinds take turns, each is
        another order than the last: it forgets that, compares the new one between ranks, and fetches nothing
        ahead.
        """
        if self.exact and self.zero_stage == 3:
            offload = self._optimizer.parameter_offload
            if kind not in self._fetching:
                self._fetching[kind] = copy.copy(offload.param_coordinator)  # what is in flight, all share
                self._fetching[kind]._clear_trace_structures()
            offload.param_coordinator = self._fetching[kind]

    def _repair_stage_zero(self) -> None:
        """At stage 0 in 16 bit DeepSpeed makes a step on zero gradients, and keeps its masters to itself.

        That step leaves Adam's counter at 1, so that its bias correction would make the first update 0.74 of
        what it should be. (The JSON's learning rate of 0 keeps it from decaying weights.) It also waits for
        the device once for each gradient, to see whether that is finite.
        """
        self._engine.basic_optimizer.state.clear()
        self._optimizer.overflow_checker.has_overflow_serial = _any_not_finite
        for model_group, master_group in zip(
            self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True
        ):
            self._masters |= {id(p): master for p, master in zip(model_group, master_group, strict=True)}

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def choose_kernels(tf32: bool) -> None:
    """TF32 or exact float32, and convolutions by trial: images have one size during training."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def _refuse_shared_memory_collectives() -> None:
    """Keep DeepSpeed on gloo between CPU ranks.

    Its own shared-memory collectives are compiled at the first start (a compiler may be missing) and name
    their segments by user and port, so that two runs on one machine can meet in them.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _any_not_finite(parameters: Sequence[nn.Parameter]) -> bool:
    greatest = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
    return not bool(torch.isfinite(greatest))


def _full_parameter(parameter: nn.Parameter) -> Tensor:
    master: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if master is not None:
        return master
    if hasattr(parameter, "ds_id"):  # frozen at stage 3: sharded, but not the optimiser's
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()
