"""MPMA's global and local alignment (GLA) as one module on encoded pairs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvlp.encoders.batch_norm import GlobalBatchNorm
from medvlp.encoders.image import ImageFeatures
from medvlp.encoders.projection import ProjectionHead
from medvlp.losses.cross_attention import patch_loss, word_loss
from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.methods.instance_contrast import instance_contrast
from medvlp.methods.mpma.config import MPMAConfig
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED, Exclusion
from medvlp.prototypes.user import to_cluster

#: Least share of the running averages that a calibrating pass replaces.
_MOMENTUM = 0.1


class LearnedTemperature(nn.Module):
    """A temperature that training moves between two bounds.

    Bounded by a sigmoid on the log scale: at the end of a clamp the gradient is 0, and the temperature would
    stay there for ever.

    Args:
        start, low, high: first value and bounds, low < start < high.
    """

    def __init__(self, start: float, low: float, high: float) -> None:
        super().__init__()
        self.low, self.span = low, math.log(high / low)
        share = math.log(start / low) / self.span
        self.position = nn.Parameter(torch.tensor([math.log(share / (1 - share))]))

    def forward(self) -> Tensor:
        """The temperature, 0-d, in float32 or better."""
        share = at_least_float32(self.position).sigmoid().squeeze(0)
        return self.low * (self.span * share).exp()


class Aligned(NamedTuple):
    """What the alignment of a batch came to (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        terms: losses and metrics. embeddings, exclusion: see `StepOutput`; of the global contrast.
    """

    terms: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    exclusion: Exclusion


class GlobalLocalAlignment(nn.Module):
    """Contrast of images with reports, and of patches and words with what they gather from each other.

    Only the name is the paper's; the form follows CLIP (global) and MGCA and LoVT (local). A part whose
    weight is 0 has no heads.

    Args:
        config: keys of the method.
        image_width, patch_width, text_width: of the encoders' features.
    """

    def __init__(self, config: MPMAConfig, image_width: int, patch_width: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        if config.global_weight:
            read = patch_width if config.summary == "mean" else image_width
            self.image_head = _head(read, config)
            self.report_head = _head(text_width, config)
            self.temperature = LearnedTemperature(
                config.temperature, config.temperature_min, config.temperature_max
            )
            if self.calibrates:
                for norm in self._norms():
                    norm.momentum = 0.0
        if config.local_weight:
            self.patch_head = nn.Linear(patch_width, config.embedding)
            self.word_head = nn.Linear(text_width, config.embedding)

    def forward(
        self,
        image: ImageFeatures,
        hidden: Tensor,
        words: Tensor,
        exclude: Callable[[Tensor], Exclusion] | None = None,
    ) -> Aligned:
        """Losses of a batch: "loss/global" and "loss/local", without those of weight 0.

        Args:
            image: features of the patches the encoder saw.
            hidden: [B, L, D] hidden states of the reports.
            words: [B, L] bool, tokens of the report that were not hidden from the encoder.
            exclude: decides from [B, E] reports which samples are no negatives of each other in
                the global contrast; None: all are.

        Besides the losses: "retrieval/top1" and "retrieval/top5", in-batch accuracy of both directions, and
        "alignment/temperature".
        """
        terms: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        exclusion = NOTHING_EXCLUDED
        if self.config.global_weight:
            embeddings = self.embed_image(image), self.embed_report(hidden, words)
            shared = to_cluster(*embeddings)
            exclusion = NOTHING_EXCLUDED if exclude is None else exclude(embeddings[1])
            terms |= self._global(*embeddings, exclusion.pairs) | exclusion.metrics
        if self.config.local_weight:
            terms["loss/local"] = self._local(self.embed_patches(image), self.embed_words(hidden), words)
        return Aligned(terms, shared, exclusion)

    @property
    def calibrates(self) -> bool:
        """Whether only `calibrate` moves running averages: there are some, and training sees masked pairs."""
        config = self.config
        return config.global_weight > 0 and config.head == "batch_norm" and config.masking == "paired"

    def calibrate(self, image: ImageFeatures, hidden: Tensor, words: Tensor, passes: int) -> None:
        """Move the running averages of the global heads towards the statistics of whole pairs.

        Args:
            image, hidden, words: see `forward`; of whole pairs.
            passes: of the run, this one included: the first ones are averaged, so that nothing is left of
                what the averages began with.
        """
        for norm in self._norms():
            norm.momentum = max(_MOMENTUM, 1 / passes)
        self.embed_image(image), self.embed_report(hidden, words)
        for norm in self._norms():
            norm.momentum = 0.0

    def _norms(self) -> list[GlobalBatchNorm]:
        parts = [*self.image_head.modules(), *self.report_head.modules()]
        return [part for part in parts if isinstance(part, GlobalBatchNorm)]

    def embed_image(self, image: ImageFeatures) -> Tensor:
        """[B, E] unit-norm embeddings of images."""
        if self.config.project_first:
            return unit_norm(self.image_head(image.local).mean(1))
        summary = image.local.mean(1) if self.config.summary == "mean" else image.pooled
        return unit_norm(self.image_head(summary))

    def embed_report(self, hidden: Tensor, words: Tensor) -> Tensor:
        """[B, E] unit-norm embeddings of reports with [B, L, D] hidden states and [B, L] visible words."""
        if self.config.project_first:
            counted = (words,) if self.config.head == "batch_norm" else ()
            return unit_norm(_mean(self.report_head(hidden, *counted), words))
        summary = _mean(hidden, words) if self.config.summary == "mean" else hidden[:, 0]
        return unit_norm(self.report_head(summary))

    def embed_patches(self, image: ImageFeatures) -> Tensor:
        """[B, P, E] unit-norm embeddings of patches."""
        return unit_norm(self.patch_head(image.local))

    def embed_words(self, hidden: Tensor) -> Tensor:
        """[B, L, E] unit-norm embeddings of tokens."""
        return unit_norm(self.word_head(hidden))

    def ground(self, image: ImageFeatures, hidden: Tensor, words: Tensor) -> Tensor:
        """[B, N, P] mean cosine of every patch with the words of N prompts, in [-1, 1]."""
        prompts = _mean(self.embed_words(hidden), words)
        return torch.einsum("bpd,nd->bnp", self.embed_patches(image), prompts)

    def _global(self, image: Tensor, report: Tensor, excluded: Tensor | None) -> dict[str, Tensor]:
        temperature = self.temperature()
        config = self.config
        loss, accuracies = instance_contrast(
            image, report, temperature, config.negatives, excluded, config.loss_memory
        )
        return {"loss/global": 0.5 * loss, "alignment/temperature": temperature.detach()} | accuracies

    def _local(self, patches: Tensor, tokens: Tensor, words: Tensor) -> Tensor:
        """Token losses of each pair by itself; nothing is gathered."""
        config = self.config
        temperatures = (config.token_temperature, config.attention_temperature)
        word_weights = words / words.sum(1, keepdim=True).clamp(min=1)
        patch_weights = patches.new_full(patches.shape[:2], 1.0 / patches.shape[1])
        memory = config.loss_memory
        of_words = word_loss(tokens, patches, word_weights, words, *temperatures, memory)
        of_patches = patch_loss(patches, tokens, patch_weights, words, True, *temperatures, memory)
        return 0.5 * (of_words + of_patches)


def _head(width: int, config: MPMAConfig) -> nn.Module:
    if config.head == "batch_norm":
        return ProjectionHead(width, config.head_hidden, config.embedding, config.batch_norm == "global")
    return nn.Sequential(
        nn.Linear(width, config.head_hidden), nn.GELU(), nn.Linear(config.head_hidden, config.embedding)
    )


def _mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """[B, L, D] tokens -> [B, D] mean of the valid ones, 0 without any."""
    weights = (valid / valid.sum(1, keepdim=True).clamp(min=1)).to(tokens.dtype)
    return (weights[:, None] @ tokens).squeeze(1)
