"""MeDSLIP's heads and losses as one module on the decoders' outputs, so that they can be checked alone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp import distributed
from medvlp.losses.normalise import at_least_float32, unit_norm
from medvlp.methods.base import StepOutput
from medvlp.methods.medslip.config import MeDSLIPConfig
from medvlp.methods.medslip.terms import (
    existence_labels,
    existence_loss,
    prototype_contrast,
    relation_loss,
    relation_scores,
    sample_negatives,
)


class Read(NamedTuple):
    """What the two decoders give, and the texts that asked.

    Attributes:
        pathology: [B, P, width]; anatomy: [B, A, width] decoder outputs.
        pathology_book: [P, D]; anatomy_book: [A, D] text embeddings.
    """

    pathology: Tensor
    anatomy: Tensor
    pathology_book: Tensor
    anatomy_book: Tensor


class Negatives(NamedTuple):
    """Rows of the other vocabulary's book: pathology [B, P, K] of anatomies, anatomy [B, A, K]; -1: none."""

    pathology: Tensor
    anatomy: Tensor


class RelationScale(nn.Module):
    """The factor of the relation's dot products: fixed, or learned as a logarithm."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.fixed = 1.0 if kind == "one" else width**-0.5
        start = torch.full((1,), self.fixed).log()
        self.logarithm = nn.Parameter(start) if kind == "learned" else None

    def forward(self, scores: Tensor) -> Tensor:
        """[..., N] dot products -> logits."""
        factor = self.fixed if self.logarithm is None else self.logarithm.exp().to(scores.dtype)
        return scores * factor


class TextProjection(nn.Linear):
    """Products of queries with texts, after a linear map of the queries to the texts' width.

    With queries q [N, width], texts t [M, D] and the weight W [D, width]: (q W^T) t^T = q (t W)^T. The right
    side maps M texts instead of B * N queries, and needs no [B, N, D] tensor; cosines do.
    """

    def forward(self, queries: Tensor, texts: Tensor, cosine: bool) -> Tensor:  # type: ignore[override]
        """[B, N, width] queries and [M, D] texts -> [B, N, M] dot products, float32 or better.

        Args:
            queries, texts: what is compared.
            cosine: over the lengths of the mapped queries (texts are taken to have length 1).
        """
        queries, weight, bias = (at_least_float32(value) for value in (queries, self.weight, self.bias))
        texts = texts.to(weight.dtype)
        if cosine:
            # From the mapped queries themselves: an expansion of their length cancels where it is short.
            return unit_norm(F.linear(queries, weight, bias)) @ texts.T
        return queries @ (texts @ weight).T + texts @ bias


class MeDSLIPLosses(nn.Module):
    """Existence, prototype and relation losses of both streams (MeDSLIP; published code, `loss_*`).

    Args:
        config: keys of the method.
        text_width: D of the text embeddings.
    """

    def __init__(self, config: MeDSLIPConfig, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.pathology_existence = nn.Linear(config.width, 2)
        self.anatomy_existence = nn.Linear(config.width, 2)
        self.pathology_projection = TextProjection(config.width, text_width)
        self.anatomy_projection = TextProjection(config.width, text_width)
        self.relation_scale = RelationScale(config.relation_scale, config.width)

    def forward(self, read: Read, matrix: Tensor, negatives: Negatives | None = None) -> StepOutput:
        """All terms with a weight above 0, and their weighted sum.

        Args:
            read: of this rank's samples.
            matrix: [B, A, P], see `medvlp.methods.medslip.terms`; not changed.
            negatives: of the prototype losses; None: drawn here.
        """
        config = self.config
        dropped = self.dropout(read.pathology), self.dropout(read.anatomy)
        present = matrix == 1
        by_pathology, by_anatomy = existence_labels(matrix)
        counts = self._counts(by_pathology, by_anatomy, matrix)
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if config.existence_weight > 0:
            pathology, anatomy = self.pathology_existence(dropped[0]), self.anatomy_existence(dropped[1])
            terms["existence_pathology"] = existence_loss(pathology, by_pathology, counts[0])
            terms["existence_anatomy"] = existence_loss(anatomy, by_anatomy, counts[1])
            weights |= dict.fromkeys(("existence_pathology", "existence_anatomy"), config.existence_weight)
        if config.prototype_weight > 0:
            of_pathology = present.transpose(1, 2)
            if negatives is None:
                number = config.prototype_negatives
                negatives = Negatives(
                    sample_negatives(of_pathology, number), sample_negatives(present, number)
                )
            terms["prototype_pathology"] = self._contrast(
                self.pathology_projection,
                dropped[0],
                read.anatomy_book,
                of_pathology,
                negatives.pathology,
                counts[2],
            )
            terms["prototype_anatomy"] = self._contrast(
                self.anatomy_projection,
                dropped[1],
                read.pathology_book,
                present,
                negatives.anatomy,
                counts[3],
            )
            weights |= dict.fromkeys(("prototype_pathology", "prototype_anatomy"), config.prototype_weight)
        if config.relation_weight > 0:
            scores = self.relation_scale(relation_scores(read.anatomy, read.pathology))
            terms["relation"] = relation_loss(scores, matrix, counts[4])
            weights["relation"] = config.relation_weight
        loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return StepOutput(loss, {f"loss/{name}": value for name, value in terms.items()})

    def _contrast(
        self,
        projection: TextProjection,
        queries: Tensor,
        texts: Tensor,
        positives: Tensor,
        negatives: Tensor,
        count: Tensor,
    ) -> Tensor:
        """The prototype loss of one stream's queries against the texts of the other vocabulary."""
        normalise, temperature = self.config.prototype_normalise, self.config.prototype_temperature
        texts = unit_norm(texts) if normalise else texts
        products = projection(queries, texts, normalise)
        gram = texts @ texts.T if normalise else None
        return prototype_contrast(products, positives, negatives, temperature, gram, count)

    def _counts(self, by_pathology: Tensor, by_anatomy: Tensor, matrix: Tensor) -> Tensor:
        """[5] entries of each mean: of this rank, or (`negatives: global`) the average over ranks.

        Divided by the average, the mean over ranks of the ranks' losses is the mean over all entries.
        """
        entries = (by_pathology >= 0, by_anatomy >= 0, by_pathology == 1, by_anatomy == 1, matrix >= 0)
        counts = torch.stack([entry.sum() for entry in entries]).float()
        if self.config.negatives == "global":
            counts = distributed.sum_over_ranks(counts) / distributed.world_size()
        return counts

    def probability(self, pathology: Tensor) -> Tensor:
        """[B, N, width] outputs of the pathology decoder -> [B, N] probability that each is present.

        The softmax over the two logits, as in the published test scripts.
        """
        logits: Tensor = self.pathology_existence(pathology)
        return logits.float().softmax(-1)[..., 1]
