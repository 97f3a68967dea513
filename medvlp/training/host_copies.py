"""Copies of state in host memory: what a background thread writes while the state itself moves on."""

from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Buffers that are allocated at the first save and used again at every later one.

    Args:
        device: where the state lies; for CUDA the buffers are pinned, so that copying runs at full speed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, place: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy a tensor of any device; complete after `finish`.

        Args:
            place: name of the buffer; what it held before is overwritten.
            tensor: any shape and layout.
            dtype: of the copy; default: the tensor's own.

        Returns:
            The contiguous buffer on the CPU.
        """
        dtype = dtype or tensor.dtype
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != dtype:
            buffer = torch.empty(tensor.shape, dtype=dtype, pin_memory=self._device.type == "cuda")
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=True)

    def copy_tree(self, place: str, value: Any) -> Any:
        """Copy lists, tuples and dicts with the tensors in them; other values are taken as they are."""
        if isinstance(value, Tensor):
            return self.copy(place, value)
        if isinstance(value, dict):
            return {name: self.copy_tree(f"{place}/{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.copy_tree(f"{place}/{i}", item) for i, item in enumerate(value))
        return value

    def finish(self) -> None:
        """Wait until all copies are complete."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
