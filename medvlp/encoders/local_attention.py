"""Cross attention between patches and sentences with sigmoid weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class LocalContext(NamedTuple):
    """What each side gathers from the other (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        image: [B, P, D] context of each patch, from the sentences.
        text: [B, S, D] context of each sentence, from the patches.
        image_weights: [B, P, S] sigmoid attention of patches to sentences, 0 at empty slots.
        text_weights: [B, S, P] sigmoid attention of sentences to patches (empty slots hold some value).
    """

    image: Tensor
    text: Tensor
    image_weights: Tensor
    text_weights: Tensor


class LocalCrossAttention(nn.Module):
    """Single-head attention in both directions; weights are sigmoids that do not sum to one.

    (PRIOR section 3.2, "local alignment module": a patch may belong to no sentence, a sentence to no patch.)

    Args:
        width: D of patches and sentences.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.query1, self.key1, self.value1 = (nn.Linear(width, width) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, patches: Tensor, sentences: Tensor, valid: Tensor) -> LocalContext:
        """Contexts and weights.

        Args:
            patches: [B, P, D]. sentences: [B, S, D], or [1, S, D] the same for all images.
            valid: [B, S] or [1, S] bool, slots that hold a sentence.
        """
        kept = valid[:, None].to(patches.dtype)
        scores = (self.scale * self.query1(patches)) @ self.key2(sentences).transpose(1, 2)
        image_weights = scores.sigmoid() * kept
        scores = (self.scale * self.query2(sentences)) @ self.key1(patches).transpose(1, 2)
        text_weights = scores.sigmoid()
        return LocalContext(
            image=image_weights @ self.value2(sentences),
            text=text_weights @ self.value1(patches),
            image_weights=image_weights,
            text_weights=text_weights,
        )
