"""Cost of MGCA's token losses and word aggregation against the straightforward per-sample loops.

    python tests/benchmarks/mgca_losses.py [--batch 48] [--rounds 5] [--device cpu]

Both sides compute the same numbers (checked before timing); times are medians over rounds of forward plus
backward. The loops are what the definitions in MGCA's paper say, one sample and one token at a time; on a
CPU the loop over samples gains by leaving padding out, on a GPU it waits for a launch at every step. Exits
with 1 if the vectorised side is not the faster one in total.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from medvlp.data.batch import Text
from medvlp.encoders.words import aggregate_words
from medvlp.losses.cross_attention import clamped_weights, patch_loss, word_loss
from medvlp.losses.normalise import unit_norm

#: Published sizes: 196 patches, 112 tokens, embeddings of 128, hidden states of 768.
PATCHES, TOKENS, EMBEDDING, HIDDEN = 196, 112, 128, 768
TEMPERATURE = 0.1


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


def losses_by_loop(words: Tensor, patches: Tensor, attention: Tensor, valid: Tensor) -> Tensor:
    """Word plus patch loss, one sample at a time."""
    total = words.new_zeros(())
    for w, p, a, kept in zip(words, patches, attention, valid, strict=True):
        w, a = w[kept], a[kept]
        weights = a.clamp(a.quantile(0.1), a.quantile(0.9))
        weights = weights / weights.sum()
        total = total + contrast_by_loop(
            w, F.normalize((w @ p.T / TEMPERATURE).softmax(1) @ p, dim=1), weights
        )
        even = p.new_full((len(p),), 1 / len(p))
        total = total + contrast_by_loop(p, F.normalize((p @ w.T / TEMPERATURE).softmax(1) @ w, dim=1), even)
    return total / len(words)


def contrast_by_loop(tokens: Tensor, context: Tensor, weights: Tensor) -> Tensor:
    logits = tokens @ context.T / TEMPERATURE
    labels = torch.arange(len(tokens), device=tokens.device)
    rows = F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(
        logits.T, labels, reduction="none"
    )
    return 0.5 * (weights * rows).sum()


def losses_vectorised(words: Tensor, patches: Tensor, attention: Tensor, valid: Tensor) -> Tensor:
    """The same by the library's functions."""
    weights = clamped_weights(attention, valid)
    even = patches.new_full(patches.shape[:2], 1 / patches.shape[1])
    return word_loss(words, patches, weights, valid) + patch_loss(patches, words, even, valid)


def words_by_loop(hidden: Tensor, attention: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """Word features and attentions, one token at a time."""
    features, summed = [], []
    for row in range(len(hidden)):
        words: dict[int, Tensor] = {}
        masses: dict[int, Tensor] = {}
        for token in range(TOKENS):
            word = int(text.word_index[row, token].item())
            if word > 0 and int(text.sentence_index[row, token].item()) >= 0:
                words[word] = words.get(word, 0) + hidden[row, token]
                masses[word] = masses.get(word, 0) + attention[row, token]
        filled = torch.stack(list(words.values()))
        features.append(F.pad(filled, (0, 0, 0, TOKENS - 1 - len(filled))))
        summed.append(F.pad(torch.stack(list(masses.values())), (0, TOKENS - 1 - len(filled))))
    return torch.stack(features), torch.stack(summed)


def seconds(run: Callable[[], Tensor], leaves: list[Tensor], rounds: int) -> float:
    """Median time of forward and backward."""
    times = []
    for _ in range(rounds + 1):
        for leaf in leaves:
            leaf.grad = None
        started = time.perf_counter()
        run().backward()
        if leaves[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    text = make_text(options.batch, generator).to(options.device)

    def random(*shape: int) -> Tensor:
        return torch.randn(options.batch, *shape, generator=generator).to(options.device)

    hidden = random(TOKENS, HIDDEN).requires_grad_()
    attention = random(TOKENS).abs()
    words, patches = (
        random(TOKENS - 1, EMBEDDING).requires_grad_(),
        random(PATCHES, EMBEDDING).requires_grad_(),
    )
    aggregated = aggregate_words(hidden.detach(), attention, text)
    pair = (aggregated.attention, aggregated.valid)
    contenders: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]] = {
        "word pieces to words": (
            lambda: words_by_loop(hidden, attention, text)[0].square().sum(),
            lambda: aggregate_words(hidden, attention, text).features.square().sum(),
            [hidden],
        ),
        "word and patch loss": (
            lambda: losses_by_loop(unit_norm(words), unit_norm(patches), *pair),
            lambda: losses_vectorised(unit_norm(words), unit_norm(patches), *pair),
            [words, patches],
        ),
    }
    table = Table(title=f"batch of {options.batch} on {options.device}, forward and backward")
    for column in ("part", "loops", "vectorised", "ratio"):
        table.add_column(column, justify="left" if column == "part" else "right")
    totals = [0.0, 0.0]
    for name, (loop, vectorised, leaves) in contenders.items():
        torch.testing.assert_close(loop(), vectorised(), rtol=1e-4, atol=1e-5)
        slow, fast = (seconds(run, leaves, options.rounds) for run in (loop, vectorised))
        totals = [totals[0] + slow, totals[1] + fast]
        table.add_row(name, f"{1e3 * slow:.0f} ms", f"{1e3 * fast:.0f} ms", f"{slow / fast:.1f}x")
    Console().print(table)
    return 0 if totals[1] < totals[0] else 1


if __name__ == "__main__":
    sys.exit(main())
