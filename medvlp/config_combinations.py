"""Combinations of config values that are refused before anything starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from medvlp.config import Config, ConfigError, FinetuneConfig, ImageConfig
from medvlp.config_keys import section_at

#: Least standard deviation of a channel.
MIN_STD = 1e-6
#: What DeepSpeed's JSON says of a run -> our key for it, which schedule, checkpoints and memory plan follow.
_SAID_BY_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16.enabled": "precision",
    "bfloat16.enabled": "precision",
    "fp16.enabled": "precision",
    "amp.enabled": "precision",
    "torch_autocast.enabled": "precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
    "zero_optimization.offload_param.device": "zero.offload_parameters",
    "zero_optimization.cpu_offload_param": "zero.offload_parameters",
}
#: Key -> those that nothing reads where it has a value.
_STANDS_ABOVE = {
    "optimizer.phases": (
        "train.epochs", "train.min_steps", "optimizer.lr", "optimizer.min_lr", "optimizer.warmup",
        "optimizer.warmup_steps", "method.stage",
    ),
    "train.steps": ("train.epochs", "train.min_steps"),
    "optimizer.warmup_steps": ("optimizer.warmup",),
}  # fmt: skip


def check_combinations(config: Config) -> None:
    """Refuse values that are each valid but cannot stand together."""
    if config.zero.offload_parameters and config.zero.stage != 3:
        raise ConfigError("zero.offload_parameters=true needs zero.stage=3")
    if config.train.compile and config.zero.stage == 3:
        raise ConfigError(
            "train.compile=true needs zero.stage of 0, 1 or 2: stage 3 gathers weights around every module, "
            "which leaves nothing to compile"
        )
    if config.zero.offload_optimizer and config.zero.stage == 0:
        raise ConfigError("zero.offload_optimizer=true needs zero.stage of 1, 2 or 3")
    if config.image.pretrained and config.image.weights:
        raise ConfigError("image.pretrained=true and image.weights are two sources of weights: choose one")
    transform = config.data.transform
    if transform.area_min > transform.area_max:
        raise ConfigError(
            f"data.transform.area_min={transform.area_min} is above data.transform.area_max="
            f"{transform.area_max}"
        )
    if transform.reduced_decoding and transform.crop not in ("area", "none"):
        raise ConfigError(
            f"data.transform.reduced_decoding=true does nothing with data.transform.crop={transform.crop}, "
            "which takes stored pixels as they are: choose crop=area or none, or leave it out"
        )
    _check_normalisation(config.image)
    _check_validation(config)
    if config.train.micro_batch and config.train.global_batch % config.train.micro_batch:
        raise ConfigError(
            f"train.micro_batch={config.train.micro_batch} does not divide "
            f"train.global_batch={config.train.global_batch}"
        )
    if config.optimizer.phases and config.train.steps is not None:
        raise ConfigError(
            "optimizer.phases and train.steps both say how long the run is: remove one (epochs of a phase "
            "may be fractions)"
        )
    if config.optimizer.phases and config.optimizer.schedule != "cosine":
        raise ConfigError(
            f"optimizer.phases needs optimizer.schedule=cosine, not {config.optimizer.schedule}"
        )
    for number, phase in enumerate(config.optimizer.phases):
        if phase.epochs <= 0 or phase.warmup_epochs >= phase.epochs:
            raise ConfigError(
                f"optimizer.phases[{number}]: epochs={phase.epochs} must be above 0 and above "
                f"warmup_epochs={phase.warmup_epochs}"
            )


def check_heard(config: Config, sources: Sequence[tuple[str, Mapping[str, Any]]], files: int) -> None:
    """Refuse what the user says and nothing would read, in the place that says what stands above it or later.

    Args:
        config: the merged config.
        sources: (what errors call it, its values) of what is merged, earliest first; no values for what is
            not the user's, whose old mistakes need not end what reads them.
        files: how many of them are files, which stand above earlier ones. The overrides behind them are said
            at once: of two that contradict each other none is the later one.
    """
    for above, ignored in _STANDS_ABOVE.items():
        section, name = above.split(".")
        if getattr(getattr(config, section), name) in (None, []):
            continue
        saying = [number for number, (_, values) in enumerate(sources) if _says(values, above)]
        first, origin = (min(saying[-1], files), sources[saying[-1]][0]) if saying else (0, "a run folder")
        for number, (source, values) in enumerate(sources):
            if number < first or _is_printed(values):
                continue
            later = [of for _, of in sources[number + 1 :]]
            # "At least 0 steps" asks for nothing.
            said = [key for key in ignored if _value(values, key)]
            if without := [key for key in said if not any(_says(of, key) for of in later)]:
                raise ConfigError(
                    f"{source}: {without[0]} changes nothing, for {above} (of {origin}) stands above it: "
                    f"change that, or take it away with {above}={'[]' if name == 'phases' else 'null'}"
                )
    if config.task is None and config.finetune != FinetuneConfig():
        for source, values in sources:
            if isinstance(keys := values.get("finetune"), Mapping) and keys:
                raise ConfigError(
                    f"{source}: finetune.{next(iter(keys))} changes nothing, for no task is trained: use "
                    "`medvlp finetune RUN --task NAME`, or leave it out"
                )


def forget_unheard(sources: Sequence[Mapping[str, Any]], files: int) -> None:
    """Take away what earlier files say of the training of tasks where a later one's key stands above it.

    `evaluation.tasks.*.training` is merged before it becomes a source of its own, in which nobody could tell
    any more what was said later.

    Args:
        sources: values of what is merged, earliest first, changed in place.
        files: as of `check_heard`.
    """
    of_tasks: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, values in enumerate(sources):
        for task, settings in (section_at(values, ("evaluation", "tasks")) or {}).items():
            if (training := section_at(settings, ("training",))) is not None:
                of_tasks.setdefault(task, []).append((number, training))
    for trainings in of_tasks.values():
        for above, ignored in _STANDS_ABOVE.items():
            saying = [of for of in trainings if _says(of[1], above)]
            if not saying or _value(saying[-1][1], above) in (None, []):
                continue
            for values in (values for number, values in trainings if number < min(saying[-1][0], files)):
                for section, name in (key.split(".") for key in ignored if _says(values, key)):
                    del values[section][name]


def _is_printed(values: Mapping[str, Any]) -> bool:
    """Whether these have every section, as what `medvlp config` prints: they say each key, read or not."""
    return values.keys() >= {section.name for section in fields(Config)}


def _says(values: Mapping[str, Any], key: str) -> bool:
    section, name = key.split(".")
    return isinstance(keys := values.get(section), Mapping) and name in keys


def _value(values: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name] if _says(values, key) else None


def check_deepspeed(config: Config) -> None:
    """Refuse what `deepspeed` says of a run that a key of ours says; the two would contradict each other."""
    for path, key in _SAID_BY_KEYS.items():
        if said := _said(config.deepspeed, path):
            raise ConfigError(
                f"deepspeed.{said} would stand above {key}, which the rest of a run follows: leave it out "
                f"and say it as {key}"
            )


def _said(tree: Mapping[str, Any], path: str) -> str | None:
    """How far a tree follows a dotted path to its end, or to what is no mapping; None: it does not."""
    value: Any = tree
    seen: list[str] = []
    for part in path.split("."):
        if not isinstance(value, Mapping):
            break
        if part not in value:
            return None
        value = value[part]
        seen.append(part)
    return ".".join(seen)


def _check_validation(config: Config) -> None:
    """Refuse a choice by a validation that is never made, or that sees what is trained."""
    best, validation = config.checkpoint.keep_best, config.validation
    validates = validation.every_steps > 0 or validation.every_epochs > 0
    if config.train.patience is not None and not (best or "").startswith("valid/"):
        raise ConfigError(
            f"train.patience={config.train.patience} counts validations without a better "
            f"checkpoint.keep_best, which is {best}: name a metric of the validation, such as valid/loss"
        )
    if (best or "").startswith("valid/") and not validates:
        raise ConfigError(
            f"checkpoint.keep_best={best} is measured by validations: set validation.every_epochs or "
            "validation.every_steps"
        )
    if validates and validation.split == config.data.split:
        raise ConfigError(f"validation.split={validation.split} is trained on: name another split")


def _check_normalisation(image: ImageConfig) -> None:
    """Refuse means and deviations that are no numbers, or not as many as the backbone has channels."""
    for name, value in (("mean", image.mean), ("std", image.std)):
        numbers = value if isinstance(value, list) else [value]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ConfigError(f"image.{name}={value}: give one number, or a list of one per channel")
        if isinstance(value, list) and len(value) != image.in_channels:
            raise ConfigError(
                f"image.{name}={value} has {len(value)} numbers and image.in_channels is "
                f"{image.in_channels}: give one number, or one per channel"
            )
        if name == "std" and min(numbers) < MIN_STD:
            raise ConfigError(f"image.std={value} is out of range: it goes from {MIN_STD} up")
