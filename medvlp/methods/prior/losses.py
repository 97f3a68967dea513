"""PRIOR's losses in its three stages, as one module that takes projected features."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp import distributed
from medvlp.encoders.batch_norm import GlobalBatchNorm
from medvlp.losses.contrastive import ranked_contrast
from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.methods.base import StepOutput
from medvlp.methods.prior.attention import AttentionPool, LocalContext, LocalCrossAttention
from medvlp.methods.prior.bank import BankedSentences, SentenceBank, gumbel_noise
from medvlp.methods.prior.config import GENERATED, PRIORConfig
from medvlp.methods.prior.decoders import SentenceDecoder, UpsamplingDecoder
from medvlp.methods.prior.modules import LearnedScale, feature_map
from medvlp.methods.prior.terms import (
    masked_mean,
    reorder,
    score_divergence,
    sentence_contrast,
    set_distance,
    simsiam,
)
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED, Exclusion
from medvlp.prototypes.user import to_cluster

#: From [B, E] reports (None where no term embeds them) to the pairs that are no negatives.
Exclude = Callable[[Tensor | None], Exclusion]


class PRIORParts(NamedTuple):
    """What the losses start from.

    Attributes:
        image: [B, E] projected global features; None where no term contrasts images with reports.
        patches: [B, P, E] projected patches.
        sentences: [B, S, E] sentence embeddings. valid: [B, S] bool, slots that hold one.
        target: [B, 1, H, W] normalised image; None where it is not reconstructed.
        noise: Gumbel noise [B, S, K] of the true and of the generated sentences; None: drawn here.
    """

    image: Tensor | None
    patches: Tensor
    sentences: Tensor
    valid: Tensor
    target: Tensor | None = None
    noise: tuple[Tensor, Tensor] | None = None


class PRIORLosses(nn.Module):
    """Global and local alignment, sentence bank, image and sentence decoders (PRIOR, ICCV 2023).

    Only the parts that some term of the stages to come needs are built.

    Attributes:
        stage: 1, 2 or 3. temperature: of the bank's softmax. Both are set from outside before a step.

    Args:
        config: keys of the method.
        stages: the stages this objective will be in.
        grid: (rows, columns) of the patches.
        size: side of the reconstructed image in pixels.
    """

    def __init__(self, config: PRIORConfig, stages: Sequence[int], grid: tuple[int, int], size: int) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.stage, self.temperature = stages[0], config.bank_temperature
        width = config.embedding
        terms = {term for stage in stages for term in config.weights(stage)}
        contrasts = bool(terms & {"global", "generated"})
        self.report_pool = AttentionPool(width, config.pool_heads) if contrasts else None
        self.scale = LearnedScale(config.temperature, config.temperature_min) if contrasts else None
        self.report_norm: GlobalBatchNorm | None = None
        if "global" in terms and config.head_norm == "batch":
            synchronise = config.batch_norm == "global"
            self.report_norm = GlobalBatchNorm(width, affine=False, synchronise=synchronise)
        self.cross_attention = LocalCrossAttention(width)
        self.predictor = _predictor(width) if "local_image" in terms else None
        self.local_scale = (
            LearnedScale(config.temperature, config.temperature_min) if "local_text" in terms else None
        )
        self.bank = SentenceBank(config.prototypes, width) if config.has_bank(stages) else None
        self.channel_dropout = nn.Dropout2d(config.channel_dropout)
        self.image_decoder = self.sentence_decoder = None
        if "image" in terms:
            sizes = config.image_decoder_width, grid, size, config.batch_norm == "global"
            self.image_decoder = UpsamplingDecoder(2 * width, *sizes)
        if terms & GENERATED:
            self.sentence_decoder = SentenceDecoder(
                width,
                config.queries,
                config.decoder_layers,
                config.decoder_heads,
                config.decoder_hidden,
                config.decoder_dropout,
                config.causal_decoder,
            )

    @property
    def generates(self) -> bool:
        """Whether sentences are generated in this stage, so that reports are cut to `queries` sentences."""
        return bool(GENERATED & self.config.weights(self.stage).keys())

    def forward(self, parts: PRIORParts, exclude: Exclude | None = None) -> StepOutput:
        """All terms of the stage, their weighted sum, and the embeddings of images and reports if it has any.

        Args:
            parts: of this rank's samples.
            exclude: decides, once reports are embedded, which samples are no negatives of each
                other in the contrasts between samples ("global", "generated"); None: all are.
        """
        weights = self.config.weights(self.stage)
        sentences, valid = parts.sentences, parts.valid
        noise = parts.noise or (None, None)
        banked = None
        if self.config.uses_bank(self.stage):
            banked = self.banked(sentences, noise[0])
            assert self.bank is not None
            self.bank.count(banked.scores, valid)
        if banked is not None and self.stage >= self.config.bank_stage:
            sentences = banked.sentences.to(parts.patches.dtype)
        terms: dict[str, Tensor] = {}
        report = self.report(sentences, valid) if "global" in weights else None
        contrasts = weights.keys() & {"global", "generated"}
        exclusion = NOTHING_EXCLUDED if exclude is None or not contrasts else exclude(report)
        terms |= exclusion.metrics
        if parts.image is not None and report is not None:
            terms |= self._global(parts.image, report, exclusion.pairs)
        if weights.keys() & {"local_image", "local_text", "image"}:
            context = self.cross_attention(parts.patches, sentences, valid)
            terms |= self._local(parts, sentences, context, weights)
        if banked is not None and "bank" in weights:
            terms["loss/bank"] = self._distance(parts.sentences, valid, banked)
        if banked is not None and GENERATED & weights.keys():
            terms |= self._generation(parts, banked, weights, noise[1], exclusion.pairs)
        loss = torch.stack([weight * terms[f"loss/{name}"] for name, weight in weights.items()]).sum()
        return StepOutput(loss, terms, to_cluster(parts.image, report), exclusion)

    def banked(self, sentences: Tensor, noise: Tensor | None = None) -> BankedSentences:
        """[B, S, E] sentences as mixtures of the bank's prototypes, with the noise that is due."""
        assert self.bank is not None
        wanted = self.config.bank_noise
        if noise is None and (wanted == "always" or (wanted == "training" and self.training)):
            noise = gumbel_noise((*sentences.shape[:-1], self.config.prototypes), sentences)
        mixed: BankedSentences = self.bank(sentences, self.temperature, noise)
        return mixed

    def report(self, sentences: Tensor, valid: Tensor) -> Tensor:
        """[B, E] embeddings of reports from [B, S, E] sentences, as they are contrasted with images."""
        assert self.report_pool is not None
        pooled: Tensor = self.report_pool(sentences, valid)
        return pooled if self.report_norm is None else self.report_norm(pooled)

    def _distance(self, sentences: Tensor, valid: Tensor, banked: BankedSentences) -> Tensor:
        """Mean distance of the sentences to the bank's mixtures of them."""
        mixtures = banked.sentences
        if self.config.bank_detached:
            assert self.bank is not None
            sentences = sentences.detach()
            mixtures = self.bank(sentences, self.temperature, banked.noise).sentences
        distance = (mixtures - at_least_float32(sentences)).abs().mean(2)
        return masked_mean(distance, valid, self._mean_over_ranks)

    def _global(self, image: Tensor, report: Tensor, excluded: Tensor | None) -> dict[str, Tensor]:
        """Contrast of images and reports, its accuracy inside the batch, and its temperature."""
        assert self.scale is not None
        found = self._contrast(image, report, excluded)
        terms = dict(zip(("loss/global", "retrieval/top1", "retrieval/top5"), found, strict=False))
        terms["temperature/global"] = 1 / self.scale(found[0].new_ones(())).detach().squeeze()
        return terms

    def _contrast(self, first: Tensor, second: Tensor, excluded: Tensor | None) -> list[Tensor]:
        """Mean of both directions of `ranked_contrast` between [B, E] vectors."""
        assert self.scale is not None
        first, second, offset = unit_norm(first), unit_norm(second), 0
        firsts, seconds = first, second
        if self.config.negatives == "global":
            firsts, seconds = (distributed.gather_with_gradient(value) for value in (first, second))
            offset = distributed.rank() * first.shape[0]
        options = 1.0, offset, excluded, self.config.loss_memory
        to_second = ranked_contrast(self.scale(first), seconds, *options)
        to_first = ranked_contrast(self.scale(second), firsts, *options)
        return [0.5 * (a + b) for a, b in zip(to_second, to_first, strict=True)]

    def _local(
        self, parts: PRIORParts, sentences: Tensor, context: LocalContext, weights: dict[str, float]
    ) -> dict[str, Tensor]:
        """Local alignment of patches and of sentences, and the reconstructed image."""
        patches, terms = parts.patches, {}
        some = parts.valid.any(1)
        if "local_image" in weights:
            assert self.predictor is not None
            predicted = self.predictor(patches), self.predictor(context.image)
            each = simsiam(patches, context.image, *predicted).mean(1)
            terms["loss/local_image"] = (each * some).mean()
        if "local_text" in weights:
            assert self.local_scale is not None
            scaled = self.local_scale(unit_norm(sentences))
            terms["loss/local_text"] = sentence_contrast(scaled, unit_norm(context.text), parts.valid)
            terms["temperature/local"] = 1 / self.local_scale(scaled.new_ones(())).detach().squeeze()
        if "image" in weights:
            assert self.image_decoder is not None
            assert parts.target is not None
            masked = self.channel_dropout(feature_map(patches, self.grid, self.config))
            of_text = feature_map(context.image, self.grid, self.config)
            image = self.image_decoder(torch.cat([masked, of_text], 1))
            terms["loss/image"] = F.l1_loss(at_least_float32(image), parts.target)
        return terms

    def _generation(
        self,
        parts: PRIORParts,
        banked: BankedSentences,
        weights: dict[str, float],
        noise: Tensor | None,
        excluded: Tensor | None,
    ) -> dict[str, Tensor]:
        """Sentences generated from the image, against the bank's mixtures of the true ones."""
        assert self.sentence_decoder is not None
        valid, terms = parts.valid, {}
        target = banked.sentences.masked_fill(~valid[:, :, None], 0)
        generated = self.sentence_decoder(parts.patches)
        generated = reorder(generated, target, self.config.wrong_permutation)
        if "sentence" in weights:
            terms["loss/sentence"] = (set_distance(generated, target) * valid.any(1)).mean()
        if not weights.keys() & {"score", "generated"}:
            return terms
        again = self.banked(generated, noise)
        if "score" in weights:
            divergence = score_divergence(banked.scores, again.scores)
            terms["loss/score"] = masked_mean(divergence, valid, self._mean_over_ranks)
        if "generated" in weights:
            assert self.report_pool is not None
            dtype = parts.patches.dtype
            of_generated, of_true = (
                self.report_pool(side.sentences.to(dtype), valid) for side in (again, banked)
            )
            terms["loss/generated"] = self._contrast(of_generated, of_true, excluded)[0]
        return terms

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        """What `masked_mean` divides by: the mean over ranks, or this rank's own number."""
        if self.config.rank_means or self.config.negatives == "local":
            return count
        return distributed.sum_over_ranks(count) / distributed.world_size()


def _predictor(width: int) -> nn.Sequential:
    """SimSiam's bottleneck without batch norm, as published."""
    first = nn.Linear(width, max(1, width // 2))
    nn.init.normal_(first.weight, std=width**-0.5)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(first.out_features, width))
