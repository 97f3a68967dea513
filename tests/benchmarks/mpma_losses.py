"""Cost of MPMA's hidden words and local alignment against the straightforward ways.

    python tests/benchmarks/mpma_losses.py [--batch 32] [--rounds 5] [--threads 2]

Hidden words: from fused tokens through the report head to the loss and the share of words that are right,
with gradients of the head. The rival is the usual masked language model: logits over the vocabulary at every
position of the report, and a cross entropy that ignores those that are not hidden. Local alignment: from
embeddings of visible patches and words to the loss of both directions; the rival takes one sample after the
other and leaves padding out. Both sides compute the same numbers (checked before timing). Exits with 1 if a
goal is missed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import _measure
import torch
from _measure import Comparison, compare
from mgca_losses import TOKENS, make_text
from torch import Tensor
from torch.nn import functional as F

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.encoders.image import ImageFeatures
from medvlp.encoders.text import TextFeatures
from medvlp.losses.normalise import unit_norm
from medvlp.losses.parts import MEMORY
from medvlp.methods.mpma.alignment import GlobalLocalAlignment
from medvlp.methods.mpma.config import MPMAConfig
from medvlp.methods.mpma.masking import WORDS, PatchMask, draw_words, is_word, sample_noise
from medvlp.methods.mpma.method import MPMA, EncodedViews, PairMasks
from medvlp.methods.registry import build_method

#: Published sizes: hidden states of BERT-base, the words of Bio_ClinicalBERT, a quarter of 14 x 14 patches.
WIDTH, VOCABULARY, VISIBLE = 768, 28_996, 49


def masked_reports(batch: int) -> tuple[Text, Tensor]:
    """Reports of 20 to 110 tokens, and which of these are hidden."""
    generator = torch.Generator().manual_seed(0)
    text = make_text(batch, generator)
    tokens = torch.randint(VOCABULARY, text.input_ids.shape, generator=generator)
    lengths = tuple(text.attention_mask.sum(1).tolist())  # as the loader says them
    text = dataclasses.replace(text, input_ids=tokens, lengths=lengths)
    noise = sample_noise(torch.arange(batch), TOKENS, seed=0, step=0, stream=WORDS)
    return text, draw_words(text, noise, MPMAConfig().text_mask_ratio)


def reading_method(memory: float) -> MPMA:
    """A method whose report head has the published size; its encoders and its fusion are never called."""
    torch.manual_seed(0)
    config = Config()
    config.image.name, config.image.options = "vit_tiny_patch16_224", {"depth": 1}
    config.text.options = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 12}
    config.method = MPMAConfig(
        image_weight=0, global_weight=0, local_weight=0, fusion_layers=1, loss_memory=memory
    )
    method = build_method(config, VOCABULARY)
    assert isinstance(method, MPMA)
    return method


def words_case(batch: int, memory: float = MEMORY) -> tuple[MPMA, Tensor, Text, Tensor, list[Tensor]]:
    """The method, fused tokens, reports, hidden tokens and the leaves."""
    method = reading_method(memory)
    text, hidden = masked_reports(batch)
    fused = torch.randn(batch, TOKENS, WIDTH, requires_grad=True)
    return method, fused, text, hidden, [fused, *method.report_head.parameters()]


def words_vectorised(batch: int, memory: float = MEMORY) -> tuple[Callable[[], Tensor], list[Tensor]]:
    method, fused, text, hidden, leaves = words_case(batch, memory)
    nothing = torch.zeros(batch, 0, dtype=torch.long)
    masks = PairMasks(PatchMask(nothing, nothing), hidden)
    image = ImageFeatures(torch.zeros(batch, 1), torch.zeros(batch, 0, 1), (0, 0))
    views = EncodedViews(masked_image=image, masked_text=TextFeatures(fused))
    inputs = Batch(nothing, text, torch.arange(batch), nothing, [])

    def run() -> Tensor:
        terms = method._report_loss(lambda report, patches, mask: report, inputs, masks, views)
        return terms["loss/report"] + terms["report/accuracy"]

    return run, leaves


def words_everywhere(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    method, fused, text, hidden, leaves = words_case(batch)

    def run() -> Tensor:
        logits = method.report_head(fused)
        loss = F.cross_entropy(logits.flatten(0, 1), text.input_ids.masked_fill(~hidden, -100).flatten())
        right = (logits.argmax(2) == text.input_ids) & hidden
        return loss + right.sum() / hidden.sum()

    return run, leaves


def local_case(batch: int) -> tuple[Tensor, Tensor, Tensor, GlobalLocalAlignment]:
    """Embeddings of visible patches and of tokens (leaves), the visible words, and the alignment."""
    config = MPMAConfig(global_weight=0)
    text, hidden = masked_reports(batch)
    generator = torch.Generator().manual_seed(0)
    patches, tokens = (
        torch.randn(batch, count, config.embedding, generator=generator).requires_grad_()
        for count in (VISIBLE, TOKENS)
    )
    return patches, tokens, is_word(text) & ~hidden, GlobalLocalAlignment(config, WIDTH, WIDTH, WIDTH)


def local_vectorised(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    patches, tokens, words, alignment = local_case(batch)
    return lambda: alignment._local(unit_norm(patches), unit_norm(tokens), words), [patches, tokens]


def local_by_loop(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    patches, tokens, words, alignment = local_case(batch)
    sharp, temperature = alignment.config.attention_temperature, alignment.config.token_temperature

    def contrast(own: Tensor, others: Tensor) -> Tensor:
        """Of tokens with what each gathers from the others."""
        gathered = F.normalize((own @ others.T / sharp).softmax(1) @ others, dim=1)
        logits, labels = own @ gathered.T / temperature, torch.arange(len(own))
        return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))

    def run() -> Tensor:
        losses = []
        for image, report, seen in zip(patches, tokens, words, strict=True):
            visible, read = F.normalize(image, dim=1), F.normalize(report[seen], dim=1)
            losses.append(0.5 * (contrast(read, visible) + contrast(visible, read)))
        return torch.stack(losses).mean()

    return run, [patches, tokens]


def main() -> int:
    options = _measure.options(__doc__, batch=32)
    rival, ours, loop, local = (
        partial(side, options.batch)
        for side in (words_everywhere, words_vectorised, local_by_loop, local_vectorised)
    )
    comparisons = [
        Comparison("hidden words", rival, ours, faster=1.1, smaller=2),
        Comparison("local alignment", loop, local, faster=1),
    ]
    reached = compare(comparisons, f"MPMA, batch of {options.batch}", options.rounds, options.threads)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
