"""A bank of learned sentence prototypes, from which sentences are put together again."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.prototypes.usage import CountedPrototypes


class BankedSentences(NamedTuple):
    """Sentences in terms of the bank (a tuple: ZeRO-3's hooks look inside); float32 or better.

    Attributes:
        sentences: [..., D] mixtures of prototypes.
        weights: [..., K] what they are mixed with; rows sum to 1.
        scores: [..., K] dot products of the given sentences with the prototypes, without noise.
        noise: [..., K] what was added to the scores; None: nothing.
    """

    sentences: Tensor
    weights: Tensor
    scores: Tensor
    noise: Tensor | None = None


class SentenceBank(CountedPrototypes):
    """K learned prototypes; a sentence becomes their mixture by a (Gumbel-)softmax of dot products.

    (PRIOR section 3.3, "sentence prototype memory bank"; as in the published code neither sentences nor
    prototypes are normalised, and the mixture stays soft.)

    Args:
        count: number of prototypes K; width: D.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))

    def forward(self, sentences: Tensor, temperature: float, noise: Tensor | None = None) -> BankedSentences:
        """Mix prototypes.

        Args:
            sentences: [..., D].
            temperature: of the softmax; positive.
            noise: [..., K] Gumbel noise added to the scores, see `gumbel_noise`; None: none.
        """
        sentences = at_least_float32(sentences)
        prototypes = self.weight.to(sentences.dtype)
        scores = sentences @ prototypes.T
        noisy = scores if noise is None else scores + noise
        weights = (noisy / temperature).softmax(-1)
        return BankedSentences(weights @ prototypes, weights, scores, noise)

    def started(self, centroids: Tensor, length: float) -> Tensor:
        """Prototypes of one length, because the bank compares by dot products: it would prefer the longer."""
        return length * unit_norm(centroids)


def gumbel_noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draws of Gumbel(0, 1) from torch's default generator of the device of `like`, float32 or better."""
    dtype = at_least_float32(like[:0]).dtype
    return -torch.empty(shape, dtype=dtype, device=like.device).exponential_().log()
