"""The networks an evaluation compares: the trained one, and the same one before its first step."""

from __future__ import annotations

import torch

from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method
from medvlp.runs import saved_run
from medvlp.runs.encoder_records import check_start
from medvlp.runs.randomness import random_state, restore_random_state, seed_weights
from medvlp.runs.saved_run import SavedRun


def load_models(
    source: SavedRun, config: Config, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Method]:
    """The trained network and the same one as it was before the first step (same config, same seed).

    Parts that the config starts from published weights have them in the untrained network too.

    Raises:
        IdentityError: those are not the weights the run was started from.
    """
    before = random_state()
    trained = saved_run.load_method(source, config, tokenizer)
    seed_weights(config.train.seed)
    untrained = build_method(config, tokenizer.vocab_size)
    check_start(untrained, config, None if source.stored is None else source.stored[0])
    untrained.prepare(tokenizer)
    restore_random_state(before)
    return {"trained": trained.to(device), "untrained": untrained.to(device).eval()}
