"""A GPU that is out of memory: one error that names the keys which help."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from medvlp import distributed
from medvlp.config import Config
from shards.errors import MedvlpError


class DeviceMemoryError(MedvlpError):
    """A step does not fit the memory of a GPU: a config that another GPU, or more of them, may run."""

    exit_code = 2


#: Errors of CUDA's libraries about memory, told apart by their words only. NCCL has its memory from CUDA, not
#: from torch.
_WORDS = "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "Failed to CUDA calloc"
#: What NCCL says of any error of CUDA, at times without the reason; with so little left, memory it is.
_UNEXPLAINED, _FULL = "unhandled cuda error", 256 << 20


def is_memory_error(error: RuntimeError) -> bool:
    """Whether torch, or a library of CUDA, lacked memory of the GPU."""
    if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS):
        return True
    return _UNEXPLAINED in str(error) and torch.cuda.is_available() and _is_full()


def _is_full() -> bool:
    """Whether hardly any memory is left beside what torch keeps for its own later use."""
    with suppress(RuntimeError):  # after some errors the GPU answers nothing any more
        spare = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + spare < _FULL
    return False


@contextmanager
def naming_memory(part: str, config: Config, micro_batch: int) -> Iterator[None]:
    """Turn an error about the GPU's memory into one that says what to change.

    Args:
        part: of a step. config: of the run. micro_batch: samples of a forward pass.

    Raises:
        DeviceMemoryError: in place of torch's.
    """
    with _naming(lambda: _story(part, config, micro_batch)):
        yield


@contextmanager
def naming_setup(config: Config) -> Iterator[None]:
    """The same before the first step, when weights, masters and buffers come to the GPU and samples do not.

    Raises:
        DeviceMemoryError: in place of torch's.
    """
    with _naming(lambda: _story_of_setup(config)):
        yield


@contextmanager
def _naming(told: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_memory_error(error):
            raise
        raise DeviceMemoryError(told()) from error


@contextmanager
def naming_validation(config: Config) -> Iterator[None]:
    """The same in a validation, whose batches have a size of their own and keep nothing for a backward pass.

    Raises:
        DeviceMemoryError: in place of torch's, and of the engine's.
    """
    try:
        yield
    except (RuntimeError, DeviceMemoryError) as error:
        if isinstance(error, RuntimeError) and not is_memory_error(error):
            raise
        batch = config.validation.batch
        remedy = f"lower validation.batch (it is {batch})" if batch > 1 else "use a GPU with more memory"
        raise DeviceMemoryError(f"{_place('validation')}; {remedy}") from error


def _place(part: str) -> str:
    used = ""
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # after some errors the GPU answers nothing any more
            free, total = torch.cuda.mem_get_info()
            used = f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use)"
    return f"rank {distributed.rank()}: the GPU is out of memory in the {part}{used}"


def _story_of_setup(config: Config) -> str:
    remedies = ["See with nvidia-smi whether another process holds memory of it"]
    if config.zero.stage < 3 and distributed.world_size() > 1:
        remedies.append(f"raise zero.stage to 3 (it is {config.zero.stage})")
    if not config.zero.offload_optimizer:
        remedies.append("set zero.offload_optimizer=true")
    return f"{_place('set-up of weights and optimiser')}. {'; '.join(remedies)}"


def _story(part: str, config: Config, micro_batch: int) -> str:
    remedies = []
    if micro_batch > 1:
        sees = "" if config.train.accumulate == "exact" else "; a contrast sees one micro-batch"
        remedies.append(f"lower train.micro_batch (it is {micro_batch}{sees})")
    for name, section in (("image", config.image), ("text", config.text)):
        if not (section.gradient_checkpointing or section.frozen):
            remedies.append(f"set {name}.gradient_checkpointing=true")
    if config.zero.stage < 2 and distributed.world_size() > 1:
        remedies.append("raise zero.stage to 2")
    if config.precision == "fp32":
        remedies.append("set precision=bf16")
    return f"{_place(part)}. {'; '.join(remedies) or 'Use a GPU with more memory'}"
