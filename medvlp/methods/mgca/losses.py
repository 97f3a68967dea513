"""MGCA's three alignments as one module that takes embeddings, so that its losses can be checked alone."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvlp import distributed
from medvlp.losses.cross_attention import clamped_weights, patch_loss, word_loss
from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.losses.sinkhorn import sinkhorn
from medvlp.methods.base import StepOutput
from medvlp.methods.instance_contrast import instance_contrast
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.prototypes.learned import LearnedPrototypes
from medvlp.prototypes.table import PrototypeTable


class MGCATokens(NamedTuple):
    """Projected patches and words (not normalised) and what weights them.

    Attributes:
        patches: [B, P, D]. words: [B, W, D].
        word_valid: [B, W] bool, slots that hold a word.
        word_attention: [B, W] attention of [CLS] to the words, 0 in empty slots; None: equal weights.
        patch_attention: [B, P] attention of the class token to the patches; None: equal weights.
    """

    patches: Tensor
    words: Tensor
    word_valid: Tensor
    word_attention: Tensor | None = None
    patch_attention: Tensor | None = None


class MGCAEmbeddings(NamedTuple):
    """Projected images and reports [B, D] (not normalised), and their tokens if those are aligned."""

    image: Tensor
    report: Tensor
    tokens: MGCATokens | None = None


class MGCALosses(nn.Module):
    """Instance-wise, token-wise and prototype alignment (MGCA, NeurIPS 2022, sections 3.1 to 3.3).

    Holds the learned prototypes; `frozen` keeps them as they are.
    """

    def __init__(self, config: MGCAConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = False
        self.prototypes: LearnedPrototypes | None = None
        if config.prototype_weight > 0 and config.prototype_source == "learned":
            self.prototypes = LearnedPrototypes(config.prototypes, config.embedding)

    def forward(
        self,
        embeddings: MGCAEmbeddings,
        table: PrototypeTable | None = None,
        excluded: Tensor | None = None,
    ) -> StepOutput:
        """All terms with a weight, and their weighted sum.

        Args:
            embeddings: of this rank's samples.
            table: clusters of the service, for `prototype_source: clusters`; None (on all ranks, because the
                prototype loss has collectives): this step has no such loss.
            excluded: [B, N] samples that are no negatives of each other, see `instance_contrast`.
        """
        config = self.config
        image, report = unit_norm(embeddings.image), unit_norm(embeddings.report)
        loss = image.new_zeros(())
        terms: dict[str, Tensor] = {}
        if config.instance_weight > 0:
            terms |= self.instance(image, report, excluded)
            loss = loss + config.instance_weight * terms["loss/instance"]
        if config.token_weight > 0 and embeddings.tokens is not None:
            terms |= self.tokens(embeddings.tokens)
            loss = loss + config.token_weight * (terms["loss/word"] + terms["loss/patch"])
        if config.prototype_weight > 0 and (self.prototypes is not None or table is not None):
            terms["loss/prototype"] = self.prototype(image, report, table)
            loss = loss + config.prototype_weight * terms["loss/prototype"]
        return StepOutput(loss, terms)

    def instance(self, image: Tensor, report: Tensor, excluded: Tensor | None = None) -> dict[str, Tensor]:
        """Contrastive loss between [B, D] unit-norm images and reports: the sum of both directions."""
        config = self.config
        loss, accuracies = instance_contrast(
            image, report, config.instance_temperature, config.negatives, excluded, config.loss_memory
        )
        return {"loss/instance": loss} | accuracies

    def tokens(self, tokens: MGCATokens) -> dict[str, Tensor]:
        """Word and patch losses; they compare tokens of one sample, never of different ones."""
        config = self.config
        patches, words = unit_norm(tokens.patches), unit_norm(tokens.words)
        valid = tokens.word_valid
        attention = valid.float() if tokens.word_attention is None else tokens.word_attention
        word_weights = clamped_weights(attention, valid & (attention != 0), config.weight_quantile)
        if tokens.patch_attention is None:
            patch_weights = patches.new_full(patches.shape[:2], 1.0 / patches.shape[1])
        else:
            everywhere = torch.ones_like(tokens.patch_attention, dtype=torch.bool)
            patch_weights = clamped_weights(tokens.patch_attention, everywhere, config.weight_quantile)
        temperatures = (config.token_temperature, config.attention_temperature)
        negatives = None if config.padding_negatives else valid
        memory = config.loss_memory
        word = word_loss(words, patches, word_weights, negatives, *temperatures, memory)
        patch = patch_loss(
            patches, words, patch_weights, valid, config.normalise_patch_context, *temperatures, memory
        )
        return {"loss/word": word, "loss/patch": patch}

    def prototype(self, image: Tensor, report: Tensor, table: PrototypeTable | None = None) -> Tensor:
        """Swapped prediction of prototype assignments between [B, D] unit-norm images and reports.

        The prototypes are the learned ones, where there are any, else the clusters of `table`.
        """
        config, both = self.config, torch.cat([image, report])
        if self.prototypes is None:
            assert table is not None, "clusters are the prototypes"
            every_rank = config.negatives == "global"
            image_scores, report_scores = table.scores(both).chunk(2)
            codes = [table.soft_assign(x, config.sinkhorn_iterations, every_rank) for x in (image, report)]
        else:
            image_scores, report_scores = self.prototypes(both, self.frozen).chunk(2)
            codes = [self._codes(image_scores), self._codes(report_scores)]
        return swapped_prediction(
            image_scores, report_scores, codes[0], codes[1], config.prototype_temperature
        )

    def _codes(self, scores: Tensor) -> Tensor:
        config = self.config
        if config.negatives == "global":
            reduce = distributed.logsumexp_over_ranks
            return sinkhorn(scores, config.sinkhorn_epsilon, config.sinkhorn_iterations, reduce)
        return sinkhorn(scores, config.sinkhorn_epsilon, config.sinkhorn_iterations)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum_k targets[k] * log softmax(logits)[k].

    Args:
        logits: [B, K].
        targets: [B, K] probabilities, rows sum to 1; no gradient flows to them.

    Returns:
        0-d loss.
    """
    return -(targets.detach() * at_least_float32(logits).log_softmax(1)).sum(1).mean()


def swapped_prediction(
    image_scores: Tensor,
    text_scores: Tensor,
    image_codes: Tensor,
    text_codes: Tensor,
    temperature: float = 0.2,
) -> Tensor:
    """Half the sum of: texts predict the images' codes, images predict the texts' codes.

    Args:
        image_scores, text_scores: [B, K] cosine similarities with the prototypes.
        image_codes, text_codes: [B, K] assignments of the same samples.
        temperature: of the predicted distributions.

    Returns:
        0-d loss. (MGCA section 3.3, eq. 8 with the minus sign the paper lacks.)
    """
    text_to_image = soft_cross_entropy(text_scores / temperature, image_codes)
    image_to_text = soft_cross_entropy(image_scores / temperature, text_codes)
    return 0.5 * (text_to_image + image_to_text)
