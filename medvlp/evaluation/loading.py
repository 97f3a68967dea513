"""The networks an evaluation compares: the trained one, and the same one before its first step."""

from __future__ import annotations

import torch

from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method
from medvlp.training import checkpoint as checkpoints
from medvlp.training.randomness import random_state, restore_random_state, seed_weights
from medvlp.training.saved_run import SavedRun


def load_models(
    source: SavedRun, config: Config, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Method]:
    """The trained network and the same one as it was before the first step (same config, same seed).

    Parts that the config starts from published weights have them in the untrained network too.
    """
    models = {}
    before = random_state()
    for name in ("trained", "untrained"):
        seed_weights(config.train.seed)
        method = build_method(config, tokenizer.vocab_size)
        method.prepare(tokenizer)
        if name == "trained":
            checkpoints.load_weights(source.checkpoint, method)
        models[name] = method.to(device).eval()
    restore_random_state(before)
    return models
