"""What forward and backward passes hold in a GPU's memory, found on fake tensors, which have shapes alone."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.base import DividedMethod, Method
from medvlp.training.accumulation import Encodings, weighted_sum
from medvlp.training.operations import example_batch, fake_tensors

#: Micro-batches of the fake passes; memory in between and beyond follows a line through them.
_SMALL, _LARGE = 4, 8


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the samples of a micro-batch."""

    fixed: float
    per_sample: float

    def at(self, rows: int) -> float:
        """Bytes of so many samples."""
        return self.fixed + self.per_sample * rows


@dataclass(frozen=True)
class Passes:
    """Bytes at the peak of passes, beside weights and the gradients of weights.

    Attributes:
        whole: forward and backward pass of a micro-batch, with its samples.
        encoders: with exact accumulation, its second pass, through the encoders alone; None: the method
            cannot be divided.
        losses: heads and losses of all micro-batches of a step at once, with the encodings they start from.
        kept: of those, what stays during the second pass: the samples, and gradients of their encodings.
    """

    whole: Line
    encoders: Line | None = None
    losses: float = 0.0
    kept: float = 0.0


def measure_passes(method: Method, config: Config, share: int, gpu: bool) -> Passes:
    """The passes of a step, forward and backward.

    Args:
        method: on the CPU, in training; its parameters become fake. config: of the run.
        share: samples of a step on each rank.
        gpu: by the kernels of GPUs, which keep other things for the backward pass than those of the CPU.
    """
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    method = method.to(kind)
    with fake_tensors() as mode, _kernels(gpu):
        _become_fake(method, mode)
        whole = _line(method, config, lambda batch: method(batch, None).loss.backward())
        samples = _bytes(_tensors(example_batch(config, 1, config.data.max_tokens)))
        # On a GPU the next batch arrives while this one is computed.
        whole = replace(whole, per_sample=whole.per_sample + samples * (2 if gpu else 1))
        if not isinstance(method, DividedMethod):
            return Passes(whole)
        trained = any(p.requires_grad for encoder in method.encoders for p in encoder.parameters())
        again = partial(_encode, method) if trained else partial(_encode_once, method)
        encoders = _line(method, config, again)
        return Passes(whole, encoders, *_losses(method, config, share, trained))


def _line(method: Method, config: Config, run: Callable[[Batch], object]) -> Line:
    small, large = (
        _peak(method, example_batch(config, rows, config.data.max_tokens), run) for rows in (_SMALL, _LARGE)
    )
    per_sample = max(0.0, (large - small) / (_LARGE - _SMALL))
    return Line(max(0.0, small - _SMALL * per_sample), per_sample)


def _peak(method: Method, batch: Batch, run: Callable[[Batch], object]) -> int:
    with LiveBytes([*method.parameters(), *method.buffers(), *_tensors(batch)]) as live:
        run(batch)
    return int(live.peak)


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch._map(found.append)
    return found


def _encode(method: DividedMethod, batch: Batch) -> None:
    """The second pass of exact accumulation."""
    encodings = [value for value in tree_leaves(method.encode(batch)) if isinstance(value, Tensor)]
    encodings = [value for value in encodings if value.requires_grad]
    gradients = [torch.empty_like(value) for value in encodings]
    weighted_sum(encodings, gradients, 1.0).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _encode_once(method: DividedMethod, batch: Batch) -> None:
    """Of frozen encoders: there is no second pass."""
    method.encode(batch)


def _losses(method: DividedMethod, config: Config, share: int, trained: bool) -> tuple[float, float]:
    """`losses` and `kept` of `Passes`."""
    batch = example_batch(config, share, config.data.max_tokens)
    encodings = Encodings(share)
    with torch.no_grad():
        encodings.add(method.encode(batch))
    whole, leaves = encodings.joined(trained)
    with LiveBytes([*method.parameters(), *method.buffers(), *_tensors(batch), *leaves]) as live:
        method(batch, None, whole).loss.backward()
    samples, values = _bytes(_tensors(batch)), _bytes(leaves)
    gradients = _bytes(leaf for leaf in leaves if leaf.requires_grad)
    return samples + values + live.peak, samples + (gradients if trained else values)


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.untyped_storage().nbytes() for tensor in tensors))


def _become_fake(method: Method, mode: FakeTensorMode) -> None:
    """Replace parameters and buffers by some without memory, whose gradients go as soon as they are there.

    The plan counts gradients apart: at some stages they leave the GPU while activations do.
    """
    for module in method.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = nn.Parameter(mode.from_tensor(value.detach()), value.requires_grad)
                module._parameters[name] = fake
                if value.requires_grad:
                    fake.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _kernels(gpu: bool) -> Iterator[None]:
    """Attention by a kernel that keeps no matrix of all pairs of tokens, dropout by one that keeps bits.

    Fake tensors are on the CPU, because backward passes on those of a GPU need a real one. The CPU has other
    kernels: with its plain products a ViT-B with BERT would be planned half as large again. Functions are
    replaced, because torch's modes for them do not reach what checkpointed blocks compute again.
    """
    fused = {"scaled_dot_product_attention": _fused_attention, "dropout": _fused_dropout} if gpu else {}
    before = {name: getattr(F, name) for name in fused}
    try:
        for name, function in fused.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


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


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


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
