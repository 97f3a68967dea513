"""Embeddings of the texts that hold the first clusters (`prototypes.anchors`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Text
from medvlp.data.text import Tokenizer


class TextEmbedder(Protocol):
    """The part of `medvlp.methods.base.Method` that is needed here; a method is also an `nn.Module`."""

    def encode_text(self, text: Text) -> Tensor: ...


class AnchorEncoder:
    """Embeds `prototypes.anchors` with the weights of the moment.

    That the method can do so and has clusters for them to hold was checked when it was built
    (`medvlp.methods.registry`).

    Args:
        method: its `encode_text` makes the embeddings.
        tokenizer: of the run.
        config: of the run; the texts are cut and padded as reports are.
        device: of the method.
    """

    def __init__(
        self, method: TextEmbedder, tokenizer: Tokenizer, config: Config, device: torch.device
    ) -> None:
        anchors, data = config.prototypes.anchors, config.data
        self._method, self._text = method, None
        if anchors:
            text = tokenizer.tokenize([[anchor] for anchor in anchors], data.max_tokens, data.pad_to_max)
            self._text = text.to(device)

    def __call__(self) -> Tensor | None:
        """[A, D] unit-norm float32 on the CPU, rank 0's bits on all ranks; None without anchors.

        A collective, and at ZeRO-3 one that gathers weights: all ranks call it between the same two steps.
        Evaluates without gradient; modes and random generators are as before afterwards.
        """
        if self._text is None:
            return None
        assert isinstance(self._method, nn.Module)
        with _evaluating(self._method), torch.no_grad():
            embeddings = self._method.encode_text(self._text).float().cpu().contiguous()
        return distributed.broadcast_on_host(embeddings)


@contextmanager
def _evaluating(method: nn.Module) -> Iterator[None]:
    """Evaluation mode and a fork of the random generators (PRIOR may draw noise also when it evaluates)."""
    modes = {part: part.training for part in method.modules()}
    device = next(method.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            method.eval()
            yield
    finally:
        for part, training in modes.items():
            part.training = training
