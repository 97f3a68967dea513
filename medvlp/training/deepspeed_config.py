"""Our config -> DeepSpeed's JSON and parameter groups. Keys of `deepspeed:` are merged over it last."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlp.config import Config, OptimizerConfig
from medvlp.config_files import ConfigError
from medvlp.data.batch_sizes import BatchSizes

if TYPE_CHECKING:  # commands check a config on machines where importing torch takes long
    from torch import nn

    from medvlp.methods.base import Objective


def check_device(config: Config, device_type: str, here: bool = True) -> None:
    """Refuse what the device or DeepSpeed cannot do, before any group or model is made.

    Args:
        config: of the run. device_type: "cuda" or "cpu".
        here: whether it will run on this machine, so that its programs can be looked for.

    Raises:
        ConfigError: fp16 or offload without CUDA, offload without what compiles it, or stage 1 with exact
            accumulation and `overlap_comm`.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    if config.zero.stage == 1 and _may_be_exact(config) and zero.get("overlap_comm"):
        raise ConfigError(
            "deepspeed.zero_optimization.overlap_comm=true: at zero.stage=1 DeepSpeed then reduces only the "
            "gradients of the last backward pass, which with train.accumulate=exact are those of the "
            "encoders; use zero.stage=2, or leave it out"
        )
    if device_type == "cuda":
        if here and config.zero.offload_optimizer and (missing := missing_build_tools()):
            raise ConfigError(
                "zero.offload_optimizer: DeepSpeed compiles its CPU Adam at the first start, and there is no "
                f"{' and no '.join(missing)}; or turn it off"
            )
        return
    if config.precision == "fp16":
        raise ConfigError("precision=fp16 needs a CUDA device and there is none here; use bf16 or fp32")
    if config.zero.offload_optimizer or config.zero.offload_parameters:
        raise ConfigError(
            "zero.offload_* moves state from a GPU to the CPU, and there is no CUDA device here; turn it off"
        )


def missing_build_tools() -> list[str]:
    """What is not here to compile DeepSpeed's CPU Adam with, each with a remedy."""
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("cpu_adam"):  # it came compiled (DS_BUILD_CPU_ADAM=1)
        return []
    missing = []
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append("C++ compiler here (c++, or what CXX names): install g++ in the image")
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).with_name("ninja")
        remedy = f"add {beside.parent} to PATH" if beside.exists() else "pip install ninja"
        missing.append(f"ninja here: {remedy}")
    return missing


def deepspeed_json(config: Config, sizes: BatchSizes, device_type: str) -> dict[str, Any]:
    """The configuration dictionary for `deepspeed.initialize`.

    Args:
        config: the run's config.
        sizes: how the global batch is divided.
        device_type: "cuda" or "cpu".
    """
    generated = {
        "train_batch_size": sizes.global_batch,
        "train_micro_batch_size_per_gpu": sizes.micro_batch,
        "gradient_accumulation_steps": sizes.accumulation,
        # In fp32 at stage 0 its clipping fails without gradients, which is how `Engine` skips a bad step.
        "gradient_clipping": 0.0 if is_plain(config) else config.train.gradient_clip,
        "steps_per_print": None,
        "zero_optimization": _zero(config, device_type),
        # They wait for the GPU before and after every micro-batch; the monitor measures speed.
        "timers": {"throughput": {"enabled": False}},
        # Our groups hold torch's own AdamW or SGD, which DeepSpeed otherwise accepts only in part.
        "zero_allow_untested_optimizer": True,
        "optimizer": _optimizer(config.optimizer, device_type, config.zero.offload_optimizer),
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "checkpoint": {"tag_validation": "Ignore"},
    }
    if config.precision != "fp32" and config.zero.stage > 0:  # stage 0 accumulates in the model's own type
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge(generated, config.deepspeed)


def is_plain(config: Config) -> bool:
    """Whether DeepSpeed leaves the optimiser as torch made it: `Engine` then clips and checks gradients."""
    return config.zero.stage == 0 and config.precision == "fp32"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _zero(config: Config, device_type: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if device_type == "cuda" and config.zero.stage in (1, 2):
        # DeepSpeed's bucket of 5e8 holds all gradients of our models: nothing would travel during backward.
        # (In bf16 at stage 1 DeepSpeed takes another optimiser, which reduces after it and passes this over.)
        zero |= {"overlap_comm": True, "reduce_bucket_size": 25_000_000, "allgather_bucket_size": 200_000_000}
    if config.zero.stage == 1 and _may_be_exact(config):
        # Overlapping, stage 1 reduces the parameters whose hooks fire in the last backward pass and leaves
        # the others as they are on each rank; that of exact accumulation reaches the encoders alone.
        zero["overlap_comm"] = False
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _may_be_exact(config: Config) -> bool:
    """Whether a step may have several micro-batches and one loss."""
    return config.train.accumulate == "exact" and config.train.micro_batch is not None


def _optimizer(config: OptimizerConfig, device_type: str, offload: bool) -> dict[str, Any]:
    # The learning rate is set before every step; 0 makes the dummy step DeepSpeed starts with harmless.
    if config.name == "sgd":
        momentum = config.betas[0]
        return {
            "type": "SGD",
            "params": {"lr": 0.0, "momentum": momentum, "weight_decay": config.weight_decay},
        }
    parameters: dict[str, Any] = {
        "lr": 0.0,
        "betas": list(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    # DeepSpeed's own Adams are compiled on first use; torch's fused one is as fast and needs no compiler.
    # With offload DeepSpeed insists on its CPU Adam.
    if not offload:
        parameters |= {"torch_adam": True, "fused": device_type == "cuda"}
    return {"type": "AdamW", "params": parameters}


def parameter_groups(
    objective: Objective, config: OptimizerConfig
) -> tuple[list[dict[str, Any]], list[float]]:
    """Group the trainable parameters of an objective by (learning-rate factor, weight decay).

    Not decayed: names in `objective.parameters_without_decay()`, and, unless `decay_all`, parameters with at
    most one dimension (biases, norms, scales). The factors of encoders and fusion apply to parameters below
    attributes `image_encoder`, `text_encoder` and `fusion`, `layer_decay` inside the image encoder's
    backbone, the head's below the objective's attribute `head`.

    Returns:
        The optimiser's groups, and for each the factor on the scheduled learning rate. Frozen parameters
        are in no group; order follows the objective's parameters, so it is the same on every rank and resume.
    """
    exempt, layers = objective.parameters_without_decay(), _layers(objective, config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name not in exempt and (config.decay_all or parameter.ndim > 1)
        scale = _scale(name, config) * config.layer_decay ** layers.get(name, 0)
        groups.setdefault((scale, config.weight_decay if decays else 0.0), []).append(parameter)
    scales = [scale for scale, _ in groups]
    return [
        {"params": parameters, "weight_decay": decay} for (_, decay), parameters in groups.items()
    ], scales


def _scale(name: str, config: OptimizerConfig) -> float:
    path = name.split(".")
    if "image_encoder" in path:
        return config.image_lr_scale
    if "text_encoder" in path:
        return config.text_lr_scale
    if "fusion" in path:
        return config.fusion_lr_scale
    return config.head_lr_scale if path[0] == "head" else 1.0


def _layers(objective: Objective, config: OptimizerConfig) -> dict[str, int]:
    """Of each parameter of a timm backbone: layers between it and the backbone's end, as timm counts them."""
    if config.layer_decay == 1:
        return {}
    from timm.models import group_parameters

    from medvlp.encoders.image import ImageEncoder

    found: dict[str, int] = {}
    for path, part in objective.named_modules():
        if isinstance(part, ImageEncoder):
            matcher = part.backbone.group_matcher(coarse=False)
            numbers = group_parameters(part.backbone, matcher, reverse=True)
            last = max(numbers.values())
            prefix = f"{path}.backbone." if path else "backbone."
            found |= {prefix + name: last - number for name, number in numbers.items()}
    return found
