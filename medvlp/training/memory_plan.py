"""What a run will take of each GPU's memory, and how long it will last, before it waits in a queue for them.

Weights, gradients and optimiser state follow from the numbers of parameters and the ZeRO stage. What a
forward pass leaves for the backward pass is counted by running the method on fake tensors, which have shapes
and no memory; so are its floating-point operations.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.data.cache import open_reader
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method, Progress
from medvlp.methods.registry import build_method
from medvlp.training.operations import count_operations, example_batch
from medvlp.training.schedule import total_steps

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
        weights, optimizer: bytes at the run's ZeRO stage.
        gradients: of a backward pass; they come while activations go. accumulated: those in float32, which
            stay from one micro-batch to the next.
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
    accumulated: float
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
        states = self.weights + self.accumulated + self.optimizer
        return states + self.fixed + max(self.per_sample * micro_batch + others, self.gradients)

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


def plan_run(config: Config, gpus: int, memory: float) -> tuple[MemoryPlan, int]:
    """The plan of a run on its dataset, of which index and tokenizer are read, and the samples it will see.

    Args:
        config: of the run. gpus: ranks. memory: GiB of a GPU.

    Raises:
        MedvlpError: batch and ranks do not fit, or dataset, tokenizer or encoders are not to be had here.
    """
    # Published weights need not be here: only their shapes count.
    image = replace(config.image, pretrained=False, weights=None)
    reader = open_reader(config.data)
    steps_per_epoch = max(1, reader.sample_count(config.data.split) // config.train.global_batch)
    samples = total_steps(config, steps_per_epoch) * config.train.global_batch
    tokenizer = Tokenizer.load(config.data.tokenizer, config.data.root)
    micro_batch = divide_batch(config, gpus).micro_batch
    return plan_memory(replace(config, image=image), gpus, micro_batch, memory * GIB, tokenizer), samples


def refusal(plan: MemoryPlan) -> str | None:
    """Why a run will not fit its GPUs and what to change; None: it fits."""
    if plan.fits:
        return None
    need, have = plan.total(plan.micro_batch) / GIB, plan.usable / GIB
    if plan.largest:
        remedy = f"set train.micro_batch={plan.largest} or lower (a divisor of the global batch's share)"
    else:
        remedy = "not even one sample fits: raise zero.stage, take a smaller model or larger GPUs"
    return (
        f"micro-batches of {plan.micro_batch} need {need:.1f} GiB of each GPU, of which {have:.1f} GiB can "
        f"be used: {remedy}; image.gradient_checkpointing=true and text.gradient_checkpointing=true need "
        "less. `medvlp config --plan` has the list"
    )


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
    # Phases come to use more of a method, never less.
    phases = len(config.optimizer.phases) or 1
    method.on_progress(Progress(0, phases, phases + 1, phases - 1))
    flops = count_operations(method, example_batch(config, _SMALL, config.data.max_tokens)) / _SMALL
    small, large = _passes(method, config, torch.device(device))
    width, stage = _BYTES[config.precision], config.zero.stage
    over = {
        part: gpus if stage >= first else 1 for part, first in (("states", 1), ("grads", 2), ("weights", 3))
    }
    # In 16 bit masters, two moments and accumulated gradients are float32; in float32 DeepSpeed keeps masters
    # too from stage 1 on.
    states = 4 * (2 + (config.precision != "fp32" or stage > 0)) * trained
    if config.optimizer.name == "sgd":
        states -= 4 * trained
    per_sample = max(0.0, (large - small) / (_LARGE - _SMALL))
    return MemoryPlan(
        parameters=parameters,
        trained=trained,
        weights=width * parameters / over["weights"],
        gradients=width * trained / over["grads"],
        accumulated=0.0 if config.precision == "fp32" else 4 * trained / over["states"],
        optimizer=0.0 if config.zero.offload_optimizer else states / over["states"],
        fixed=max(0.0, small - _SMALL * per_sample) + (_CONTEXT if device == "cuda" else 0.0),
        per_sample=per_sample,
        candidates=4.0 * _LOGITS,
        flops=flops,
        gpus=gpus,
        micro_batch=micro_batch,
        usable=memory * (1 - _FRAGMENTS),
    )


def _passes(method: Method, config: Config, device: torch.device) -> tuple[float, float]:
    """Peak bytes beside the weights at `_SMALL` and at `_LARGE` samples."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    method = method.to(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _become_fake(method, mode, device)
        found = []
        for rows in (_SMALL, _LARGE):
            batch = example_batch(config, rows, config.data.max_tokens)._map(lambda tensor: tensor.to(device))
            known = [*method.parameters(), *method.buffers(), *tree_leaves(vars(batch))]
            with FusedAttention() if device.type == "cuda" else nullcontext(), LiveBytes(known) as live:
                output = method(batch, None)
            found.append(float(live.peak))
            del output
    return found[0], found[1]


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


class FusedAttention(TorchFunctionMode):
    """On fake GPUs, attention by a kernel that keeps no matrix of all pairs of tokens, as real GPUs have it.

    Left to itself torch finds no kernel for a GPU that is not there and plans with the plain products, half
    as much again for a ViT-B with BERT.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    return found[0]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, as long as somebody holds them.

    Args:
        known: what was there before, of which operations may return views.

    Attributes:
        live: bytes now. peak: the most there were.
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(
            tensor.untyped_storage() for tensor in known if isinstance(tensor, Tensor)
        )

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
        ("gradients, while activations go", gib(plan.gradients)),
        ("gradients in float32", gib(plan.accumulated)),
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
    accumulation = divide_batch(config, plan.gpus).accumulation
    if accumulation > 1 and config.train.accumulate == "exact":
        kept = f"encodings and heads of {accumulation * batch} samples, which train.accumulate=exact keeps"
        lines.append(("NOT IN THE SUM", kept))
    hours = plan.hours(samples, tflops, mfu)
    lines.append(
        (f"time at {100 * mfu:.0f} % of {tflops:g} TFLOP/s", f"{hours:.1f} h for {samples:,.0f} samples")
    )
    return lines
