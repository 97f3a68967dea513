"""Cost of MGCA's losses and word aggregation against the straightforward per-sample loops.

    python tests/benchmarks/mgca_losses.py [--batch 72] [--rounds 5] [--threads 2]

Both sides compute the same numbers (checked before timing). The loops are what the definitions in MGCA's
paper say, one sample (and in the aggregation one token) at a time; unlike the published code they leave
padding out, which on a CPU saves them a third of the arithmetic. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import _measure
import torch
from _measure import Comparison, compare
from torch import Tensor
from torch.nn import functional as F

from medvlp.data.batch import Text
from medvlp.encoders.words import aggregate_words
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.mgca.losses import MGCAEmbeddings, MGCALosses, MGCATokens

#: Published sizes: 196 patches, 112 tokens, embeddings of 128, hidden states of 768, 500 prototypes.
PATCHES, TOKENS, EMBEDDING, HIDDEN = 196, 112, 128, 768
CONFIG = MGCAConfig()


def make_text(batch: int, generator: torch.Generator) -> Text:
    """Reports of 20 to 110 tokens, about every fourth a continued piece."""
    word_index = torch.full((batch, TOKENS), -1)
    sentence_index = torch.full((batch, TOKENS), -1)
    for row in range(batch):
        count = int(torch.randint(20, TOKENS, (), generator=generator))
        starts = torch.rand(count, generator=generator) < 0.75
        starts[[0, 1, count - 1]] = True
        word_index[row, :count] = starts.long().cumsum(0) - 1
        sentence_index[row, 1 : count - 1] = 0
    mask = (word_index >= 0).long()
    return Text(mask, mask, word_index, sentence_index)


def tensors(batch: int) -> tuple[MGCAEmbeddings, Tensor, list[Tensor]]:
    """Seeded outputs of the heads, prototypes, and the leaves among them."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    valid = aggregate_words(
        torch.zeros(batch, TOKENS, 1), torch.zeros(batch, TOKENS), make_text(batch, generator)
    ).valid
    attention = torch.rand(batch, TOKENS - 1, generator=generator) * valid
    image, report = leaf(batch, EMBEDDING), leaf(batch, EMBEDDING)
    patches, words = leaf(batch, PATCHES, EMBEDDING), leaf(batch, TOKENS - 1, EMBEDDING)
    embeddings = MGCAEmbeddings(image, report, MGCATokens(patches, words, valid, attention))
    prototypes = F.normalize(torch.randn(CONFIG.prototypes, EMBEDDING, generator=generator), dim=1)
    return embeddings, prototypes, [image, report, patches, words]


def objective_vectorised(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    embeddings, prototypes, leaves = tensors(batch)
    objective = MGCALosses(CONFIG)
    assert objective.prototypes is not None
    objective.prototypes.set(prototypes)
    return lambda: objective(embeddings).loss, leaves


def objective_by_loop(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    embeddings, prototypes, leaves = tensors(batch)

    def run() -> Tensor:
        image, report = F.normalize(embeddings.image, dim=1), F.normalize(embeddings.report, dim=1)
        labels = torch.arange(batch)
        logits = image @ report.T / CONFIG.instance_temperature
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        assert embeddings.tokens is not None
        for row in range(batch):
            loss = loss + tokens_of_one(embeddings.tokens, row) / batch
        return loss + prototypes_by_loop(image, report, prototypes)

    return run, leaves


def tokens_of_one(inputs: MGCATokens, row: int) -> Tensor:
    """Word plus patch loss of one sample."""
    assert inputs.word_attention is not None
    kept = inputs.word_valid[row]
    words = F.normalize(inputs.words[row][kept], dim=1)
    patches = F.normalize(inputs.patches[row], dim=1)
    attention = inputs.word_attention[row][kept]
    weights = attention.clamp(attention.quantile(0.1), attention.quantile(0.9))
    even = patches.new_full((PATCHES,), 1 / PATCHES)
    sharp = CONFIG.attention_temperature
    seen = F.normalize((words @ patches.T / sharp).softmax(1) @ patches, dim=1)
    read = F.normalize((patches @ words.T / sharp).softmax(1) @ words, dim=1)
    return contrast(words, seen, weights / weights.sum()) + contrast(patches, read, even)


def contrast(tokens: Tensor, context: Tensor, weights: Tensor) -> Tensor:
    logits = tokens @ context.T / CONFIG.token_temperature
    labels = torch.arange(len(tokens))
    rows = F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(
        logits.T, labels, reduction="none"
    )
    return 0.5 * (weights * rows).sum()


def prototypes_by_loop(image: Tensor, report: Tensor, prototypes: Tensor) -> Tensor:
    """Swapped prediction, one sample at a time (the assignments need the whole batch)."""
    scores = [image @ prototypes.T, report @ prototypes.T]
    codes = [assign(part.detach()) for part in scores]
    loss = image.new_zeros(())
    for row in range(len(image)):
        for part, code in zip(scores, reversed(codes), strict=True):
            predicted = (part[row] / CONFIG.prototype_temperature).log_softmax(0)
            loss = loss - 0.5 * (code[row] * predicted).sum()
    return loss / len(image)


def assign(scores: Tensor) -> Tensor:
    plan = (scores / CONFIG.sinkhorn_epsilon).exp()
    for _ in range(CONFIG.sinkhorn_iterations):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def aggregation(batch: int) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(0)
    text = make_text(batch, generator)
    hidden = torch.randn(batch, TOKENS, HIDDEN, generator=generator).requires_grad_()
    return hidden, torch.rand(batch, TOKENS, generator=generator), text


def words_vectorised(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    hidden, attention, text = aggregation(batch)
    return lambda: aggregate_words(hidden, attention, text).features.square().mean(), [hidden]


def words_by_loop(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    hidden, _, text = aggregation(batch)

    def run() -> Tensor:
        features = []
        for states, words, sentences in zip(hidden, text.word_index, text.sentence_index, strict=True):
            sums: dict[int, Tensor] = {}
            for state, word, sentence in zip(
                states.unbind(), words.tolist(), sentences.tolist(), strict=True
            ):
                if word > 0 and sentence >= 0:
                    sums[word] = sums[word] + state if word in sums else state
            filled = torch.stack(list(sums.values()))
            features.append(F.pad(filled, (0, 0, 0, TOKENS - 1 - len(filled))))
        return torch.stack(features).square().mean()

    return run, [hidden]


def main() -> int:
    options = _measure.options(__doc__, batch=72)
    batch = options.batch
    comparisons = [
        Comparison("all losses", partial(objective_by_loop, batch), partial(objective_vectorised, batch), 3),
        Comparison("pieces to words", partial(words_by_loop, batch), partial(words_vectorised, batch), 1),
    ]
    reached = compare(comparisons, f"MGCA, batch of {batch}", options.rounds, options.threads)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
