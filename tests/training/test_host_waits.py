"""Nothing in a step waits for the GPU: every method's forward pass on fake CUDA tensors, without a GPU."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import medvlp.methods.place.terms
import medvlp.methods.prior.terms
from tests.methods.small import built, names, small_batch, small_config

#: Operations whose result is on the host, or whose shape is known only after the kernel has run.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "equal")


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operations that wait for the device, and copies between it and the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _WAITING or (name in ("_to_copy", "copy_") and _crosses(args, result)):
            self.found.append(f"{name} at {_place()}")
        return result


def _crosses(args: Any, result: Any) -> bool:
    sources = [value for value in args if isinstance(value, torch.Tensor)]
    return len({tensor.device.type for tensor in [*sources, result]}) > 1


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/medvlp/" in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def _matched(cost: Tensor, *rest: Any) -> Tensor:
    """The shape of `medvlp.losses.matching.match`, the one documented wait of a step: it runs on the CPU."""
    return torch.zeros(cost.shape[:2], dtype=torch.int64, device=cost.device)


@pytest.mark.parametrize("name", names())
def test_a_forward_pass_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for terms in (medvlp.methods.place.terms, medvlp.methods.prior.terms):
        monkeypatch.setattr(terms, "match", _matched)
    method, batch = built(small_config(name)), small_batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in method.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    moved = mode.from_tensor(value.detach()).to("cuda")
                    module._parameters[name] = torch.nn.Parameter(moved, value.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = mode.from_tensor(buffer).to("cuda")
        given = batch._map(lambda tensor: mode.from_tensor(tensor).to("cuda"))
        with HostWaits() as waits:
            method(given, None)
    assert waits.found == []
