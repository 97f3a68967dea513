"""Seeds and random states: equal weights on all ranks, own dropout on each, and both resumable."""

import random
from typing import Any, cast

import numpy as np
import torch

from medvlp.device import uses_cuda


def seed_weights(seed: int) -> None:
    """Seed every default generator alike on all ranks, for building the model."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed every default generator for training: differently on each rank, and by the step it joins at."""
    words = [seed % 2**63, rank] + ([step] if step else [])
    own = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
    seed_weights(own)


def random_state() -> dict[str, Any]:
    """State of this rank's default generators (Python, NumPy, torch, CUDA) as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if uses_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; a CUDA state is used where there is CUDA."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and uses_cuda():
        torch.cuda.set_rng_state(state["cuda"])
