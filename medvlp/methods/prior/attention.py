"""PRIOR's two attentions: a pool over the patches or sentences, and sigmoid attention between them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.encoders.backbones import EncoderError


class AttentionPool(nn.Module):
    """One vector from a set: multi-head attention over {mean, x_1 .. x_N} with the mean as the only query.

    (CLIP's attention pool, Radford et al. 2021, as PRIOR's published code uses it for images and reports.)

    Args:
        width: D of the vectors; heads: attention heads, a divisor of D.
        positions: N where every set has N vectors in a fixed order (a feature map), which then get learned
            positions; None: a set without order, of any size.

    Raises:
        EncoderError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, positions: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise EncoderError(f"method.pool_heads={heads} does not divide the width {width} that is pooled")
        self.heads, self.positions = heads, positions
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(width, width) for _ in range(4))
        self.positional_embedding = (
            None if positions is None else nn.Parameter(torch.randn(positions + 1, width) / width**0.5)
        )

    def forward(self, vectors: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pool each set.

        Args:
            vectors: [B, N, D].
            valid: [B, N] bool, vectors that exist; None: all. A set without any pools its mean, taken as 0.

        Returns:
            [B, D] in the type of `vectors`.

        Raises:
            EncoderError: another number of vectors than there are positions.
        """
        if self.positions not in (None, vectors.shape[1]):
            raise EncoderError(
                f"{vectors.shape[1]} vectors for {self.positions} positions of an attention pool: "
                "give images of data.image_size"
            )
        if valid is None:
            mean, mask = vectors.mean(1, keepdim=True), None
        else:
            count = valid.sum(1).clamp(min=1).to(vectors.dtype)
            kept = vectors.masked_fill(~valid[:, :, None], 0)
            mean = (kept.sum(1) / count[:, None])[:, None]
            # The mean is a key too, so that no row of the mask is empty.
            mask = F.pad(valid, (1, 0), value=True)[:, None, None]
        tokens = torch.cat([mean, vectors], 1)
        if self.positional_embedding is not None:
            tokens = tokens + self.positional_embedding
        query = self._heads(self.q_proj(tokens[:, :1]))
        key, value = self._heads(self.k_proj(tokens)), self._heads(self.v_proj(tokens))
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: Tensor = self.c_proj(pooled.transpose(1, 2).flatten(2))
        return output[:, 0]

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, N, D] -> [B, heads, N, D / heads]."""
        batch, count, _ = projected.shape
        return projected.view(batch, count, self.heads, -1).transpose(1, 2)


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
        scores = self.query1(patches) @ (self.scale * self.key2(sentences)).transpose(1, 2)
        image_weights = scores.sigmoid() * kept
        scores = (self.scale * self.query2(sentences)) @ self.key1(patches).transpose(1, 2)
        text_weights = scores.sigmoid()
        return LocalContext(
            image=image_weights @ self.value2(sentences),
            text=text_weights @ self.value1(patches),
            image_weights=image_weights,
            text_weights=text_weights,
        )
