"""Losses of several methods on one pair of encoders: a mixture that none of the papers has."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from medvlp.config import Config, MethodConfig
from medvlp.data.batch import Text
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.text import TextEncoder, TextFeatures
from medvlp.methods.base import Progress, StepOutput
from medvlp.methods.combination.config import CombinationConfig
from medvlp.methods.mgca.method import MGCA
from medvlp.methods.pair import Alignment, EncodedPair, PairMethod, build_encoders
from medvlp.methods.place.method import PLACE
from medvlp.methods.prior.method import PRIOR
from medvlp.methods.registry import register
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import PrototypeUser

PartConfig = TypeVar("PartConfig", bound=MethodConfig)


class Combination(Alignment):
    """Weighted sum of the losses of MGCA, PRIOR and PLACE, each with heads of its own.

    Every term of a part is chosen by the part's own weights: one of weight 0 is neither built nor computed.
    Its `negatives`, `same_study`, `batch_norm` and `loss_memory` stand above those of its parts.

    Args:
        config: keys of the method.
        image: image backbone; text: text backbone (only their sizes and normalisation are read).
        staged: PRIOR follows the optimiser phases.
    """

    def __init__(
        self, config: CombinationConfig, image: ImageEncoder, text: TextEncoder, staged: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.weights = config.weights
        self.parts = nn.ModuleDict()
        if "mgca" in self.weights:
            self.parts["mgca"] = MGCA(_over_ranks(config.mgca, config), image, text)
        if "prior" in self.weights:
            self.parts["prior"] = PRIOR(_over_ranks(config.prior, config), image, text, staged)
        if "place" in self.weights:
            self.parts["place"] = PLACE(_over_ranks(config.place, config), image, text)
        self.reads_pooled = config.reads_pooled
        self.shapes_embeddings = f"{config.embeds_with}'s {self._embedding().shapes_embeddings}"
        self.image_attention = any(part.image_attention for part in self._parts().values())
        self.text_attention = any(part.text_attention for part in self._parts().values())

    def forward(self, pair: EncodedPair, clusters: PrototypeTable | None = None) -> StepOutput:
        """Losses of a batch: every term of a part as "PART/...", its total as "PART/loss".

        With masks of false negatives also the metrics of `exclude_false_negatives`. The embeddings are those
        of the part that decides which samples are no negatives.
        """
        loss = torch.zeros((), device=pair.image.pooled.device)
        terms: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        parts, user = self._parts(), self.service_user
        if user.masks:
            # It decides for all parts which samples are no negatives of each other.
            parts = dict(sorted(parts.items(), key=lambda item: item[1] is not user))
        exclusion = NOTHING_EXCLUDED
        for name, part in parts.items():
            own: StepOutput = part(pair, clusters)
            loss = loss + self.weights[name] * own.loss
            for term, value in own.named.items():
                terms[term if term.startswith("prototypes/") else f"{name}/{term}"] = value
            if part is user:
                embeddings, exclusion = own.embeddings, own.exclusion
                if user.masks:
                    pair = pair._replace(exclusion=exclusion)
        return StepOutput(loss, terms, embeddings, exclusion)

    @property
    def embeds(self) -> bool:
        return self._embedding().embeds

    def embed_image(self, features: ImageFeatures) -> Tensor:
        return self._embedding().embed_image(features)

    def embed_text(self, features: TextFeatures, text: Text) -> Tensor:
        return self._embedding().embed_text(features, text)

    @property
    def scores_by_embedding(self) -> bool:
        return self._embedding().scores_by_embedding

    def score(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        return self._embedding().score(image, prompts, text)

    @property
    def grounds(self) -> bool:
        return self._embedding().grounds

    def ground(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        return self._embedding().ground(image, prompts, text)

    def on_progress(self, progress: Progress) -> None:
        """Every part follows the training."""
        for part in self._parts().values():
            part.on_progress(progress)

    @property
    def loss_variant(self) -> str:
        """Those of the parts that have several."""
        return ", ".join(filter(None, (part.loss_variant for part in self._parts().values())))

    def parameters_without_decay(self) -> set[str]:
        return {
            f"parts.{name}.{parameter}"
            for name, part in self._parts().items()
            for parameter in part.parameters_without_decay()
        }

    @property
    def prototype_users(self) -> Sequence[PrototypeUser]:
        """Every part that has some."""
        return [user for part in self._parts().values() for user in part.prototype_users]

    @property
    def service_user(self) -> PrototypeUser:
        """MGCA where clusters are its prototypes, else the part that embeds: one service has one space."""
        mgca = self._parts().get("mgca")
        return mgca if mgca is not None and mgca.service_size() is not None else self._embedding()

    def _embedding(self) -> Alignment:
        return self._parts()[self.config.embeds_with]

    def _parts(self) -> dict[str, Alignment]:
        return {name: part for name, part in self.parts.items() if isinstance(part, Alignment)}


def _over_ranks(part: PartConfig, config: CombinationConfig) -> PartConfig:
    return dataclasses.replace(
        part,
        negatives=config.negatives,
        batch_norm=config.batch_norm,
        same_study=config.same_study,
        loss_memory=config.loss_memory,
    )


@register("combination", CombinationConfig)
def build(config: Config, vocab_size: int) -> PairMethod:
    """The combination as the config describes it (see `medvlp.methods.registry.build_method`)."""
    method: CombinationConfig = config.method  # type: ignore[assignment]
    image, text = build_encoders(config, vocab_size, method.reads_pooled)
    return PairMethod(image, text, Combination(method, image, text, staged=bool(config.optimizer.phases)))
