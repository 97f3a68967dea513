"""Cost of PLACE's losses against the straightforward per-sample loops.

    python tests/benchmarks/place_losses.py [--batch 32] [--rounds 5] [--threads 2]

Observations: from unmatched observations and sentences to the contrast of the batch, sentences of equal
tokens being no negatives. The loop matches one sample after the other by scipy and contrasts one anchor after
the other; it leaves empty slots out. Correlations: from pixels and patch tokens to the error of the predicted
correlations; the loop takes one image after the other and lets `torch.corrcoef` correlate the cells. Both
sides compute the same numbers (checked before timing). Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import _measure
import torch
from _measure import Comparison, compare
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from medvlp.losses.normalise import unit_norm
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.losses import Sentences, observation_terms
from medvlp.methods.place.terms import correlation_loss, pixel_correlation

#: Published sizes (those of the defaults): 16 queries, 16 slots for sentences, embeddings of 128.
CONFIG = PLACEConfig()
#: Of an image in pixels, its patches on a side, and the deviation up to which a patch is flat.
SIDE, GRID, FLAT = 224, 14, 1e-3


def reports(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Seeded observations and sentences (leaves), which slots hold one (4 to 12), and what each says.

    Every third sentence is one of ten that many reports have.
    """
    generator = torch.Generator().manual_seed(0)

    def leaf(slots: int) -> Tensor:
        return torch.randn(batch, slots, CONFIG.embedding, generator=generator).requires_grad_()

    number = torch.randint(4, 13, (batch, 1), generator=generator)
    valid = torch.arange(CONFIG.max_sentences) < number
    own = torch.arange(10, 10 + valid.numel()).view_as(valid)
    common = torch.randint(10, valid.shape, generator=generator)
    identity = torch.where(torch.rand(valid.shape, generator=generator) < 1 / 3, common, own)
    return leaf(CONFIG.queries), leaf(CONFIG.max_sentences), valid, identity


def observations_vectorised(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    observations, sentences, valid, identity = reports(batch)

    def run() -> Tensor:
        said = Sentences(unit_norm(sentences), valid, identity)
        return observation_terms(unit_norm(observations), said, False, CONFIG)["loss/observation"]

    return run, [observations, sentences]


def observations_by_loop(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    observations, sentences, valid, identity = reports(batch)

    def run() -> Tensor:
        images, texts = [], []
        for row in range(batch):
            found = F.normalize(observations[row], dim=1)
            said = F.normalize(sentences[row][valid[row]], dim=1)
            query, sentence = linear_sum_assignment(-(found @ said.T).detach())
            images.append(found[query[sentence.argsort()]])
            texts.append(said)
        image, text, says = torch.cat(images), torch.cat(texts), identity[valid]
        losses = []
        for anchor in range(len(text)):
            others = says != says[anchor]
            others[anchor] = True
            label = others[:anchor].sum()
            for own, candidates in ((text[anchor], image), (image[anchor], text)):
                logits = candidates[others] @ own / CONFIG.observation_temperature
                losses.append(0.5 * F.cross_entropy(logits, label))
        of_anchors = torch.stack(losses).view(-1, 2).sum(1)
        return torch.stack([part.mean() for part in of_anchors.split(valid.sum(1).tolist())]).mean()

    return run, [observations, sentences]


def patches(batch: int) -> tuple[Tensor, Tensor]:
    """Seeded images with a black border, as films have, and patch tokens (a leaf)."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    image[..., : SIDE // GRID] = 0
    return image, torch.randn(batch, GRID**2, CONFIG.embedding, generator=generator).requires_grad_()


def correlations_vectorised(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    image, tokens = patches(batch)
    return lambda: correlation_loss(tokens, *pixel_correlation(image, (GRID, GRID), FLAT)), [tokens]


def correlations_by_loop(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    images, tokens = patches(batch)

    def run() -> Tensor:
        losses = []
        for image, own in zip(images, tokens, strict=True):
            cells = F.unfold(image[None] / 255, SIDE // GRID, stride=SIDE // GRID)[0].T
            usable = cells.std(1, correction=0) > FLAT
            unit = F.normalize(own[usable], dim=1)
            error = (unit @ unit.T - torch.corrcoef(cells[usable])).square()
            first, second = torch.triu_indices(len(unit), len(unit), 1)
            losses.append(error[first, second].mean())
        return torch.stack(losses).mean()

    return run, [tokens]


def main() -> int:
    options = _measure.options(__doc__, batch=32)
    sides = {
        "observations": (observations_by_loop, observations_vectorised, 4),
        "correlations": (correlations_by_loop, correlations_vectorised, 1),
    }
    comparisons = [
        Comparison(name, *(partial(side, options.batch) for side in (loops, vectorised)), faster=goal)
        for name, (loops, vectorised, goal) in sides.items()
    ]
    reached = compare(comparisons, f"PLACE, batch of {options.batch}", options.rounds, options.threads)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
