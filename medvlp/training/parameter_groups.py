"""Which parameters share a learning-rate factor and a weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from medvlp.config import OptimizerConfig
from medvlp.methods.base import Method


def parameter_groups(method: Method, config: OptimizerConfig) -> tuple[list[dict[str, Any]], list[float]]:
    """Group the trainable parameters of a method by (learning-rate factor, weight decay).

    Not decayed: names in `method.parameters_without_decay()`, and, unless `decay_all`, parameters with at
    most one dimension (biases, norms, scales). The encoders' factors apply to parameters below the method's
    attributes `image_encoder` and `text_encoder`.

    Returns:
        The optimiser's groups, and for each the factor on the scheduled learning rate. Frozen parameters
        are in no group; order follows the method's parameters, so it is the same on every rank and resume.
    """
    exempt = method.parameters_without_decay()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name not in exempt and (config.decay_all or parameter.ndim > 1)
        key = (_scale(name, config), config.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    scales = [scale for scale, _ in groups]
    return [
        {"params": parameters, "weight_decay": decay} for (_, decay), parameters in groups.items()
    ], scales


def _scale(name: str, config: OptimizerConfig) -> float:
    if name.startswith("image_encoder."):
        return config.image_lr_scale
    if name.startswith("text_encoder."):
        return config.text_lr_scale
    return 1.0
