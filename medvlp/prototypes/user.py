"""What a method, or a part of one, has to do with prototypes: learned ones, service clusters, masks."""

from typing import Any, Protocol

from torch import Tensor

from medvlp.config import MethodConfig
from medvlp.data.batch import Batch, Text
from medvlp.encoders.words import report_identity
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.false_negatives import (
    NOTHING_EXCLUDED,
    Exclusion,
    exclude_false_negatives,
    exclude_same_study,
)
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.usage import CountedPrototypes


class Embedder(Protocol):
    """The part of `medvlp.methods.base.Method` that embeds."""

    def encode_image(self, image: Tensor) -> Tensor: ...

    def encode_text(self, text: Text) -> Tensor: ...


class PrototypeUser:
    """The optional part of a method; all of it has a default. A mixin beside `nn.Module`.

    Attributes:
        masks: whether samples whose reports are alike are no negatives of each other (set by
            `mask_false_negatives`).
        mask_clusters: number of service clusters, where those of one cluster are alike; None: those of equal
            sentences are.
    """

    masks: bool = False
    mask_clusters: int | None = None

    def prototype_size(self) -> tuple[int, int] | None:
        """(number, width) of the learned prototypes that embeddings can start; None without any."""
        return None

    @property
    def learned_prototypes(self) -> CountedPrototypes | None:
        """The learned prototypes that embeddings can start; None without any."""
        return None

    def prototype_phase(self) -> int:
        """The optimiser phase, from 0, whose first step is the first to use the learned prototypes.

        They start there: before, no loss reaches them, while the features they are to stand among move.
        """
        return 0

    def prototype_encodings(self, method: Embedder, batch: Batch) -> Any:
        """What `prototype_features` needs of the encoders, for the samples of one micro-batch.

        Args:
            method: the whole method, which has the encoders.
            batch: the samples.

        Returns:
            As `DividedMethod.encode`: nested tuples of tensors with a row for each sample, of None, and of
            plain values. By default the embeddings of images and reports.
        """
        return method.encode_image(batch.image), method.encode_text(batch.text)

    def prototype_features(self, encodings: Any, batch: Batch) -> list[Tensor]:
        """Features of a batch that k-means may start the learned prototypes from.

        Args:
            encodings: what `prototype_encodings` made of the samples.
            batch: the samples that a loss sees together, of one or more micro-batches.

        Returns:
            [B, ..., D] tensors; zeros stand where a sample has none. By default the encodings.
        """
        return list(encodings)

    def service_size(self) -> tuple[int, int] | None:
        """(number, width) of the service clusters this part uses; None: it uses none."""
        width = self.embedding_width()
        return None if self.mask_clusters is None or width is None else (self.mask_clusters, width)

    @property
    def assigns_softly(self) -> bool:
        """Whether a loss takes soft assignments to the service clusters, in every step that has a table.

        Else clusters only mask, and nothing counts how they are used.
        """
        return False

    def embedding_width(self) -> int | None:
        """Width of the embeddings that every step returns; None: there are none.

        See `MethodConfig.embedding_need`.
        """
        return None

    def mask_false_negatives(self, clusters: int | None) -> None:
        """From now on samples whose reports are alike are no negatives of each other (before training).

        Args:
            clusters: where those of one service cluster are alike: their number, if the part does not have
                one of its own. None: those of equal sentences are.
        """
        self.masks, self.mask_clusters = True, clusters

    def exclude(
        self, batch: Batch, clusters: PrototypeTable | None, config: MethodConfig, text: Tensor | None
    ) -> Exclusion:
        """Which samples are no negatives of each other: those of one study, and where masked of like reports.

        Equal sentences are the safe choice: no weights can make reports equal, so the loss cannot be lowered
        by taking its negatives away. Clusters are of trained embeddings, and can. Of clusters reports alone
        decide: one id a sample makes "the same cluster" an equivalence, reports worded alike share theirs,
        and images can be alike in much that is no finding (projection, exposure).

        Args:
            batch: the samples.
            clusters: of the service, as `forward` got them.
            config: keys of the method; `negatives` and `same_study` are read.
            text: [B, D] embeddings of any length. Without those of texts no cluster is left out.
        """
        every_rank = config.negatives == "global"
        studies = batch.study if config.same_study == "excluded" else None
        alike = None
        if self.masks and self.mask_clusters is None:
            alike = report_identity(batch.text)
        elif self.masks and clusters is not None and text is not None:
            alike = clusters.assign(unit_norm(text.detach()).float())
        if alike is not None:
            return exclude_false_negatives(alike, batch.labels, every_rank, studies)
        return NOTHING_EXCLUDED if studies is None else exclude_same_study(studies, every_rank)


def to_cluster(image: Tensor | None, text: Tensor | None) -> dict[str, Tensor]:
    """`StepOutput.embeddings` of [B, D] embeddings of any length: detached, unit-norm, in float32."""
    given = {"image": image, "text": text}
    return {name: unit_norm(value.detach()).float() for name, value in given.items() if value is not None}
