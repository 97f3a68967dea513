"""How a global batch is cut into micro-batches: global = micro x accumulation x ranks."""

from dataclasses import dataclass

from medvlp.config import Config
from medvlp.config_files import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """`global_batch` samples make an optimiser step, `micro_batch` a forward pass on a rank."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


def divide_batch(config: Config, world_size: int) -> BatchSizes:
    """Divide `train.global_batch` over ranks and accumulation steps.

    Raises:
        ConfigError: it does not divide; names values that would. Or the method has no loss to train on, or
            none that `checkpoint.keep_best` could compare, or contrasts a sample with nothing.
    """
    if not config.method.trains:
        raise ConfigError(
            f"method.name={config.method.name} has no loss: choose a method to train, and begin with these "
            "weights by train.start=RUN"
        )
    best = config.checkpoint.keep_best
    asked = {"loss": config.method.training_loss_changes, "valid/loss": config.method.loss_changes}
    if config.task is None and best in asked and (why := asked[best](config)):
        raise ConfigError(
            f"checkpoint.keep_best={best} would take the checkpoint before the loss grows by design: {why}. "
            "Name a metric that means the same throughout, as valid/image_to_text/R@5 with "
            "checkpoint.best_mode=max"
        )
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world_size:
        lower, upper = batch // world_size * world_size, -(-batch // world_size) * world_size
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ConfigError(f"train.global_batch={batch} does not divide over {world_size} ranks; {near} would")
    per_rank = batch // world_size
    micro = per_rank if micro is None else micro
    if micro > per_rank or per_rank % micro:
        fitting = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
        nearest = min(fitting, key=lambda size: (abs(size - micro), -size))
        raise ConfigError(
            f"train.micro_batch={micro} does not divide the {per_rank} samples of each rank "
            f"(train.global_batch={batch} over {world_size} ranks); {nearest} would"
        )
    sizes = BatchSizes(batch, micro, per_rank // micro, world_size)
    if config.task is None:
        _check_contrasts(config, sizes)
    return sizes


def _check_contrasts(config: Config, sizes: BatchSizes) -> None:
    """Refuse contrasts of a single sample, whose loss is 0 whatever it is."""
    contrasts = config.method.sample_contrasts(config)
    if not contrasts:
        return
    every_rank, exact = config.method.negatives == "global", config.train.accumulate == "exact"
    compared = (sizes.global_batch if exact else sizes.micro_batch * sizes.world_size) // (
        1 if every_rank else sizes.world_size
    )
    remedy = f"make it larger, or set {' and '.join(contrasts)} to 0"
    if compared == 1:
        where = "" if every_rank else f" over {sizes.world_size} ranks with method.negatives=local"
        name = f"train.global_batch={sizes.global_batch}{where}"
        if not exact:
            name = f"train.micro_batch={sizes.micro_batch} with train.accumulate=plain, {name}"
        raise ConfigError(
            f"{name}: a contrast of samples would see one alone, and be 0: {remedy}"
            + ("" if every_rank or sizes.world_size == 1 else ", or set method.negatives=global")
        )
    validation = config.validation
    if validation.batch == 1 and (validation.every_steps or validation.every_epochs):
        raise ConfigError(
            f"validation.batch=1: a contrast of samples would see one alone, and be 0: {remedy}"
        )
