"""How much of a GPU's arithmetic a run reaches: operations of a step, and the peak of the card (MFU)."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.methods.base import Objective, Progress
from medvlp.methods.registry import fields_of
from medvlp.prototypes.usage import uncounted
from medvlp.runs.randomness import random_state, restore_random_state
from medvlp.training.schedule import Schedule
from shards.errors import MedvlpError

logger = logging.getLogger(__name__)

#: 10^12 operations a second of dense matrix products, by a word of the name that CUDA gives a card: in 16
#: bit, in TF32 and in float32 (makers' data sheets, without sparsity). 0: the card has no such units.
PEAKS = {
    "B200": (2250.0, 1100.0, 75.0),
    "H200": (989.0, 494.0, 67.0),
    "GH200": (989.0, 494.0, 67.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "V100": (125.0, 0.0, 15.7),
    "T4": (65.0, 0.0, 8.1),
}
#: Cards of one name in another form, by a second word of it.
_VARIANTS = {
    ("H100", "PCIE"): (756.0, 378.0, 51.0),
    ("H100", "NVL"): (835.0, 417.0, 60.0),
    ("H200", "NVL"): (835.0, 417.0, 60.0),
    ("V100", "PCIE"): (112.0, 0.0, 14.0),
}
#: Samples of the passes that are counted.
_ROWS = 4


def peak_tflops(card: str, precision: str, tf32: bool) -> float | None:
    """Peak of a GPU, 10^12 operations a second; None where the card or its peak in this precision is unknown.

    Args:
        card: what CUDA calls it. precision: fp32, bf16 or fp16.
        tf32: whether products of float32 values are made in TF32.
    """
    words = re.split(r"[ \-]", card.upper())
    known = [name for name in PEAKS if name in words]
    if len(known) != 1:
        return None
    variants = [peaks for (name, form), peaks in _VARIANTS.items() if name == known[0] and form in words]
    half, quick, single = variants[0] if variants else PEAKS[known[0]]
    if precision == "fp32":
        return (quick if tf32 else single) or single
    # Cards without TF32 compute fp16 alone on their matrix units.
    return half if precision == "fp16" or quick else None


@dataclass(frozen=True)
class StepWork:
    """Operations (two for each multiply-add) of forward and backward passes, and the peak of the GPU.

    Passes that are made again to save memory do not count. Between two lengths of reports the number follows
    a line: what grows with their square is below a hundredth. What a method leaves out of a batch's shorter
    reports (MPMA's vocabulary) counts as if they were padded.

    Attributes:
        lines: by optimiser phase: of a sample without a report, and of each token of its padded report.
        groups: `text.length_groups`, in which reports are padded.
        phases: [steps] phase of every step.
        peak: operations a second of the GPU in the run's precision.
    """

    lines: Mapping[int, tuple[float, float]]
    groups: int
    phases: NDArray[np.int64]
    peak: float

    def of(self, batch: Batch, step: int) -> float:
        """Operations of a micro-batch after `step` finished steps."""
        base, token = self.lines[int(self.phases[step])]
        tokens = sum(rows * length for rows, length in batch.text.groups(self.groups))
        return len(batch.keys) * base + tokens * token


def step_work(
    objective: Objective, config: Config, schedule: Schedule, step: int, device: torch.device
) -> StepWork | None:
    """Count the operations of every phase that is still to come; None without a GPU whose peak is known.

    Call it before DeepSpeed takes the objective, whose parameters and buffers it leaves alone.

    Args:
        objective: on its device. config, schedule: of the run. step: finished steps.
        device: of the run.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = config.monitor.peak_tflops or peak_tflops(card, config.precision, config.train.tf32)
    if config.task is not None or (peak is None and not card):
        return None
    if peak is None:
        logger.info(
            "no mfu: the peak of %s in %s is not known; monitor.peak_tflops says it", card, config.precision
        )
        return None
    try:
        lines = _lines_of_phases(objective, config, schedule, step)
    except (RuntimeError, MedvlpError) as error:
        # Fake tensors cannot go through every network; a run does not end for want of a metric.
        reason = " ".join(str(error).split())[:200]
        logger.warning("no mfu: the operations of this network cannot be counted (%s)", reason)
        return None
    return StepWork(lines, config.text.length_groups, schedule.phases, peak * 1e12)


def _lines_of_phases(
    objective: Objective, config: Config, schedule: Schedule, step: int
) -> dict[int, tuple[float, float]]:
    longest = config.data.max_tokens
    short = max(1, longest // 2)
    lines: dict[int, tuple[float, float]] = {}
    now, found = min(step, schedule.steps - 1), np.unique(schedule.phases[step:]).tolist()
    for phase in reversed(found):  # the method stays in the phase that comes first
        begin = max(now, int(np.argmax(schedule.phases == phase)))
        objective.on_progress(Progress(0, begin, schedule.steps, phase))
        few, many = (
            count_operations(objective, example_batch(config, _ROWS, length)) / _ROWS
            for length in (short, longest)
        )
        token = (many - few) / (longest - short)
        lines[phase] = (many - token * longest, token)
    return lines


def count_operations(objective: Objective, batch: Batch) -> float:
    """Operations of a forward and backward pass, on fake tensors, which have shapes and no memory.

    Args:
        objective: on any device, before DeepSpeed takes it; left as it is.
        batch: on the CPU.
    """
    with _draws_put_back(), fake_tensors() as mode, uncounted(objective):
        state: dict[str, Tensor] = {
            name: nn.Parameter(_fake(parameter, mode), parameter.requires_grad)
            for name, parameter in objective.named_parameters()
        }
        state |= {name: _fake(buffer, mode) for name, buffer in objective.named_buffers()}
        given = batch._map(mode.from_tensor)
        # Plain attention: torch's table of costs lacks the fused kernel of the CPU.
        with distributed.alone(), sdpa_kernel(SDPBackend.MATH), _Operations() as counted:
            loss = torch.func.functional_call(objective, state, (given, None)).loss
            counted.backward = True
            loss.backward()
    return float(counted.total)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """The mode in which operations on fake tensors run.

    It looks for a GPU before each of them: a fifth of the time where DeepSpeed has told torch to ask the
    driver. Here it is asked once.
    """
    ask, there = torch.cuda.is_available, torch.cuda.is_available()
    torch.cuda.is_available = lambda: there
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        torch.cuda.is_available = ask


@contextmanager
def _draws_put_back() -> Iterator[None]:
    random = random_state()
    try:
        yield
    finally:
        restore_random_state(random)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return torch.empty_like(mode.from_tensor(tensor.detach()), device="cpu")


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums what torch's table of costs says; not, as its `FlopCounterMode`, what is computed again.

    Attributes:
        total: operations so far. backward: whether the backward pass has begun.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0
        self.backward = False

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        cost = flop_registry.get(function._overloadpacket)  # type: ignore[attr-defined]
        # A backward pass runs without gradient, but for what gradient checkpointing makes again.
        if cost is not None and not (self.backward and torch.is_grad_enabled()):
            self.total += cost(*args, **kwargs, out_val=result)
        return result


def example_batch(config: Config, rows: int, length: int) -> Batch:
    """Images and reports of `length` tokens in sentences of 16; contents do not matter."""
    size = config.data.image_size
    ids = torch.ones(rows, length, dtype=torch.int64)
    words = torch.arange(length).expand(rows, length).contiguous()
    sentences = (words // 16).where((words > 0) & (words < length - 1), -1)
    fields: dict[str, Tensor] = {}
    if "entities" in fields_of(config.method.name):
        from shards.entities.vocabulary import ANATOMIES, OBSERVATIONS

        fields["entities"] = torch.zeros(rows, len(ANATOMIES), len(OBSERVATIONS), dtype=torch.int8)
    image = torch.zeros(rows, 1, size, size, dtype=torch.uint8)
    text = Text(ids, torch.ones_like(ids), words, sentences, (length,) * rows)
    return Batch(image, text, torch.arange(rows), torch.zeros(rows, 1), [""] * rows, fields=fields)
