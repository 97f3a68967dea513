"""MeDSLIP's text book: frozen embeddings of the sentences that stand for anatomies and observations."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from medvlp.data.batch import Text
from medvlp.data.text import Tokenizer
from medvlp.encoders.text import TextEncoder, TextFeatures
from shards.entities.vocabulary import ANATOMIES, DESCRIPTIONS

#: What is said of every anatomy (published: the raw name, with a period).
ANATOMY_SENTENCE = "It is located at {anatomy}."


class TextBook(nn.Module):
    """Embeddings of both vocabularies, as buffers, and how a text becomes comparable with them.

    Every row is the same function of a text, so that a prompt that repeats a description is its row.

    Attributes:
        anatomy: [51, width] float32. pathology: [75, width] float32. Saved with the weights.
        written: whether `write` or a loaded state has filled them.

    Args:
        width: of the text encoder.
        pooling: "first" (the first token's hidden state, published) or "mean" (over the tokens).
        standardise: take the vocabulary's mean off every row and scale the rows to mean square 1. A frozen
            text encoder gives short texts that share nearly everything; the queries would start almost equal.
    """

    anatomy: Tensor
    pathology: Tensor
    centers: Tensor
    scales: Tensor

    def __init__(self, width: int, pooling: str, standardise: bool) -> None:
        super().__init__()
        self.pooling, self.standardise = pooling, standardise
        self.written = False
        self.register_buffer("anatomy", torch.zeros(len(ANATOMIES), width))
        self.register_buffer("pathology", torch.zeros(len(DESCRIPTIONS), width))
        self.register_buffer("centers", torch.zeros(2, width))
        self.register_buffer("scales", torch.ones(2, 1))

    @torch.no_grad()
    def write(
        self,
        encoder: TextEncoder,
        tokenizer: Tokenizer,
        max_tokens: int,
        descriptions: Sequence[str] = tuple(DESCRIPTIONS.values()),
    ) -> None:
        """Fill the book: anatomies as "It is located at left_hilar.", observations as their descriptions."""
        sentences = [ANATOMY_SENTENCE.format(anatomy=name) for name in ANATOMIES]
        vocabularies = (self.anatomy, sentences), (self.pathology, list(descriptions))
        for number, (rows, texts) in enumerate(vocabularies):
            text = tokenizer.tokenize([[sentence] for sentence in texts], max_tokens).to(rows.device)
            embeddings = self._pool(encoder, text)
            if self.standardise:
                self.centers[number] = embeddings.mean(0)
                self.scales[number] = (embeddings - self.centers[number]).square().mean().sqrt() + 1e-12
            rows.copy_((embeddings - self.centers[number]) / self.scales[number])
        self.written = True

    @torch.no_grad()
    def look_up(self, encoder: TextEncoder, text: Text) -> Tensor:
        """[N, width] float32 embeddings of prompts, as rows of the pathology vocabulary."""
        return (self._pool(encoder, text) - self.centers[1]) / self.scales[1]

    def _pool(self, encoder: TextEncoder, text: Text) -> Tensor:
        features: TextFeatures = encoder(text)
        hidden = features.hidden.float()
        if self.pooling == "first":
            return hidden[:, 0]
        mask = text.attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.written = self.written or f"{prefix}pathology" in state_dict

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the book in float32 when the module becomes half precision: it is a target of the losses."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            changed = getattr(self, name)
            if changed.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(changed.device).float())
        return self
