"""What a run will take of each GPU's memory, and how long it will last, before it waits in a queue for them.

Weights, gradients and optimiser state follow from the numbers of parameters and the ZeRO stage. What a
forward pass leaves for the backward pass is counted by running the method on fake tensors, which have shapes
and no memory; so are its floating-point operations.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method, Progress
from medvlp.methods.registry import build_method, fields_of

GIB = 2**30
#: Bytes of a CUDA context with the kernels of cuBLAS, cuDNN and NCCL; share that fragments leave unused.
_CONTEXT, _FRAGMENTS = 1.2 * GIB, 0.05
#: Micro-batches of the fake passes; memory in between and beyond follows a line through them.
_SMALL, _LARGE = 4, 8
#: float32 matrices of a row of gathered candidates: logits, softmax and gradient, in two directions.
_LOGITS = 6
#: Bytes of a value by precision.
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU, and operations.

    Attributes:
        parameters, trained: of the method.
        weights, gradients, optimizer: bytes at the run's ZeRO stage.
        fixed: context, buckets and what a forward pass takes at any micro-batch.
        per_sample: bytes that a sample of the micro-batch adds.
        candidates: bytes of a sample with each sample of the other GPUs in a global contrast.
        flops: of a training step, for each sample.
        gpus: ranks. micro_batch: the run's. usable: bytes of a GPU that may be taken.
    """

    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    fixed: float
    per_sample: float
    candidates: float
    flops: float
    gpus: int
    micro_batch: int
    usable: float

    def total(self, micro_batch: int) -> float:
        """Bytes at the peak of a step with this micro-batch."""
        others = self.candidates * micro_batch**2 * (self.gpus - 1)
        states = self.weights + self.gradients + self.optimizer
        return states + self.fixed + self.per_sample * micro_batch + others

    @property
    def largest(self) -> int:
        """The largest micro-batch that fits; 0: none does."""
        low, high = 0, 1
        while self.total(high) <= self.usable:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= self.usable else (low, middle)
        return low

    @property
    def fits(self) -> bool:
        """Whether the run's own micro-batch does."""
        return self.total(self.micro_batch) <= self.usable

    def hours(self, samples: float, tflops: float, mfu: float) -> float:
        """Hours for so many samples at a share `mfu` of `tflops` (10^12 operations a second) on every GPU."""
        return self.flops * samples / (self.gpus * tflops * 1e12 * mfu) / 3600


def plan_memory(
    config: Config, gpus: int, micro_batch: int, memory: float, tokenizer: Tokenizer, device: str = "cuda"
) -> MemoryPlan:
    """The plan of a run whose heaviest phase decides.

    Args:
        config: of the run. gpus: ranks. micro_batch: samples of a forward pass.
        memory: bytes of a GPU. tokenizer: of the run.
        device: "cuda" (none is needed) or "cpu", which keeps other things for the backward pass.
    """
    method = build_method(config, tokenizer.vocab_size).train()
    method.prepare(tokenizer)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in method.parameters())
    small, large, flops = _passes(method, config, torch.device(device))
    width, stage = _BYTES[config.precision], config.zero.stage
    over = {
        part: gpus if stage >= first else 1 for part, first in (("states", 1), ("grads", 2), ("weights", 3))
    }
    # In 16 bit masters, two moments and accumulated gradients are float32; in float32 DeepSpeed keeps masters
    # too from stage 1 on.
    states = 4 * (2 + (config.precision != "fp32" or stage > 0)) * trained
    if config.optimizer.name == "sgd":
        states -= 4 * trained
    gradients = width * trained / over["grads"]
    if config.precision != "fp32":
        gradients += 4 * trained / over["states"]
    per_sample = max(0.0, (large - small) / (_LARGE - _SMALL))
    return MemoryPlan(
        parameters=parameters,
        trained=trained,
        weights=width * parameters / over["weights"],
        gradients=gradients,
        optimizer=0.0 if config.zero.offload_optimizer else states / over["states"],
        fixed=max(0.0, small - _SMALL * per_sample) + (_CONTEXT if device == "cuda" else 0.0),
        per_sample=per_sample,
        candidates=4.0 * _LOGITS,
        flops=3 * flops / _LARGE,
        gpus=gpus,
        micro_batch=micro_batch,
        usable=memory * (1 - _FRAGMENTS),
    )


def _passes(method: Method, config: Config, device: torch.device) -> tuple[float, float, float]:
    """Peak bytes beside the weights at `_SMALL` and at `_LARGE` samples, and operations of the latter."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    method = method.to(kind)
    phases = len(config.optimizer.phases) or 1
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _become_fake(method, mode, device)
        # Phases come to use more of a method, never less.
        method.on_progress(Progress(0, phases, phases + 1, phases - 1))
        found, flops = [], 0.0
        for rows in (_SMALL, _LARGE):
            batch = _batch(config, rows)._map(lambda tensor: tensor.to(device))
            with FlopCounterMode(display=False) as counter, LiveBytes() as live:
                output = method(batch, None)
            found.append(float(live.peak))
            flops = float(counter.get_total_flops())
            del output
    return found[0], found[1], flops


def _become_fake(method: Method, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace every parameter and buffer by one that has a shape and no memory."""
    for module in method.modules():
        for name, value in module._parameters.items():
            if value is not None:
                moved = mode.from_tensor(value.detach()).to(device)
                module._parameters[name] = nn.Parameter(moved, value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer).to(device)


def _batch(config: Config, rows: int) -> Batch:
    """Images and reports of the greatest length; contents do not matter."""
    size, length = config.data.image_size, config.data.max_tokens
    ids = torch.ones(rows, length, dtype=torch.int64)
    words = torch.arange(length).expand(rows, length).contiguous()
    sentences = (words // 16).where((words > 0) & (words < length - 1), -1)
    fields: dict[str, Tensor] = {}
    if "entities" in fields_of(config.method.name):
        from shards.entities.vocabulary import ANATOMIES, OBSERVATIONS

        fields["entities"] = torch.zeros(rows, len(ANATOMIES), len(OBSERVATIONS), dtype=torch.int8)
    image = torch.zeros(rows, 1, size, size, dtype=torch.uint8)
    text = Text(ids, torch.ones_like(ids), words, sentences)
    return Batch(image, text, torch.arange(rows), torch.zeros(rows, 1), [""] * rows, fields=fields)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, as long as somebody holds them.

    Attributes:
        live: bytes now. peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


def describe(
    plan: MemoryPlan, config: Config, samples: float, tflops: float, mfu: float
) -> list[tuple[str, str]]:
    """The plan as lines of a table: what, and how much."""

    def gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"

    batch = plan.micro_batch
    lines = [
        ("parameters", f"{plan.parameters / 1e6:.1f} M, {plan.trained / 1e6:.1f} M trained"),
        ("weights", gib(plan.weights)),
        ("gradients", gib(plan.gradients)),
        (f"optimizer (ZeRO {config.zero.stage}, {plan.gpus} GPUs)", gib(plan.optimizer)),
        ("context, buffers, any batch", gib(plan.fixed)),
        (
            f"activations of {batch} samples",
            f"{gib(plan.per_sample * batch)} ({plan.per_sample / 2**20:.1f} MiB each)",
        ),
        ("logits with other GPUs", gib(plan.candidates * batch**2 * (plan.gpus - 1))),
        (
            "sum, of each GPU",
            f"{gib(plan.total(batch))} of {gib(plan.usable)}{'' if plan.fits else ': DOES NOT FIT'}",
        ),
        ("largest micro-batch", str(plan.largest) if plan.largest else "none: not even one sample fits"),
        ("operations of a sample", f"{plan.flops / 1e9:.1f} GFLOP forward and backward"),
    ]
    hours = plan.hours(samples, tflops, mfu)
    lines.append(
        (f"time at {100 * mfu:.0f} % of {tflops:g} TFLOP/s", f"{hours:.1f} h for {samples:,.0f} samples")
    )
    return lines
