"""The first check: what is installed on this machine, and whether its GPU computes."""

from __future__ import annotations

from importlib import metadata

import torch

from launcher.doctor.machine import check_machine
from tests.cuda.place import Place
from tests.cuda.runner import Note


def environment(place: Place, note: Note) -> None:
    """Versions, and the doctor's look at this machine."""
    packages = ["torch", "deepspeed", "transformers", "timm", "numpy"]
    packages += metadata.packages_distributions()["faiss"]  # faiss-cpu, or one of those for GPUs
    note("versions", {name: metadata.version(name) for name in packages})
    note("device", torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu")
    found = [f"{result.status}: {result.check}: {result.detail}" for result in check_machine()]
    note("doctor", found)
    assert place.dry or place.device.type == "cuda", "torch sees no GPU"
