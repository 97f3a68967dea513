"""The interface every pre-training method keeps."""

from __future__ import annotations

import abc
from typing import NamedTuple

from torch import Tensor, nn

from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch, Text
from medvlp.data.text import Tokenizer
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED, Exclusion, exclude_false_negatives
from medvlp.prototypes.table import PrototypeTable


class Progress(NamedTuple):
    """Where training stands before an optimiser step.

    Attributes:
        epoch: of the step about to be made, from 0.
        step: finished steps.
        steps: steps of the whole run.
        phase: number of the optimiser phase (`optimizer.phases`) the step belongs to, from 0; always 0
            without phases.
    """

    epoch: int
    step: int
    steps: int
    phase: int = 0


class Objective(nn.Module):
    """What the trainer may ask of anything that is trained; all of it has a default.

    Attributes:
        prototype_table: clusters of the prototype service this step may use (set by the trainer; None
            until there are some, and always None for objectives without `uses_service`).
        keep_embeddings: when true, `forward` leaves its detached unit-norm embeddings in `last_embeddings`
            (set by the trainer for objectives with `uses_service`).
        last_embeddings: modality ("image", "text") -> [B, D] float32 of the last `forward`.
        mask_clusters: number of service clusters whose samples are no negatives of each other; None: all
            other samples are negatives (set by `mask_false_negatives`).
        last_exclusion: what `share_embeddings` returned last.
        embedding_need: keys without which there are no embeddings to cluster, for messages.
    """

    prototype_table: PrototypeTable | None = None
    keep_embeddings: bool = False
    mask_clusters: int | None = None
    last_exclusion: Exclusion = NOTHING_EXCLUDED
    embedding_need: str = "a method that has them"

    def __init__(self) -> None:
        super().__init__()
        self.last_embeddings: dict[str, Tensor] = {}

    def on_progress(self, progress: Progress) -> None:
        """Called before every optimiser step."""

    def parameters_without_decay(self) -> set[str]:
        """Names of parameters that never get weight decay, not even with `optimizer.decay_all`.

        A frozen parameter has zero gradients, so that Adam leaves it exactly unchanged unless it decays.
        """
        return set()

    @property
    def prototype_user(self) -> Objective:
        """The part whose learned prototypes the trainer starts and revives: the objective, or one of it."""
        return self

    def prototype_size(self) -> tuple[int, int] | None:
        """(number, width) of the learned prototypes that embeddings can start; None without any."""
        return None

    def set_prototypes(self, centroids: Tensor, length: float = 1.0) -> None:
        """Write [K, D] unit-norm centroids into the learned prototypes (before the engine takes the weights).

        Args:
            centroids: found among `Method.prototype_features`.
            length: mean length of these, for prototypes whose length matters.

        Raises:
            NotImplementedError: there are no learned prototypes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no learned prototypes")

    @property
    def service_user(self) -> Objective:
        """The part whose embeddings the prototype service clusters: the objective, or a module of it."""
        return self

    @property
    def uses_service(self) -> bool:
        """Whether the trainer should run a prototype service (see medvlp/prototypes)."""
        return self.service_size() is not None

    def service_size(self) -> tuple[int, int] | None:
        """(number, width) of the service clusters this part uses; None: it uses none."""
        width = self.embedding_width()
        return None if self.mask_clusters is None or width is None else (self.mask_clusters, width)

    def embedding_width(self) -> int | None:
        """Width of the embeddings that every `forward` can leave in `last_embeddings`; None: there are none.

        They have to be what some loss shapes: clusters of untrained projections would say nothing.
        """
        return None

    def mask_false_negatives(self, clusters: int) -> None:
        """From now on samples of one service cluster are no negatives of each other (before training).

        Args:
            clusters: their number, where the part does not have a number of its own.

        Raises:
            ConfigError: this part leaves no embeddings that could be clustered.
        """
        if self.embedding_width() is None:
            raise ConfigError(
                "prototypes.false_negatives=mask needs embeddings of whole samples that a loss shapes, and "
                f"{type(self).__name__} has none without {self.embedding_need}: change that, or set "
                "prototypes.false_negatives=keep"
            )
        self.mask_clusters = clusters

    def share_embeddings(
        self, batch: Batch, every_rank: bool, image: Tensor | None, text: Tensor | None
    ) -> Exclusion:
        """Leave the embeddings for the service, and say which samples are no negatives of each other.

        Reports alone decide: one cluster id a sample makes "the same cluster" an equivalence, reports worded
        alike share theirs, and images can be alike in much that is no finding (projection, exposure).

        Args:
            batch: the samples.
            every_rank: the contrasts have the negatives of all ranks; false: of this one.
            image, text: [B, D] embeddings of any length; None: this step makes none. Without those of texts
                nothing is left out.
        """
        self.last_exclusion = NOTHING_EXCLUDED
        table = self.prototype_table if self.mask_clusters is not None and text is not None else None
        if not self.keep_embeddings and table is None:
            return self.last_exclusion
        given = {"image": image, "text": text}
        unit = {name: unit_norm(x.detach()).float() for name, x in given.items() if x is not None}
        if self.keep_embeddings:
            self.last_embeddings = unit
        if table is not None:
            self.last_exclusion = exclude_false_negatives(table, unit["text"], batch.labels, every_rank)
        return self.last_exclusion


class Method(Objective, abc.ABC):
    """A pre-training objective with its encoders.

    A method imports no DeepSpeed, no W&B and no files. Every random draw comes from torch's default
    generators, which the checkpoint restores.
    """

    @abc.abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return 0-d tensors: "loss" (differentiable) and every named term of it (detached or not).

        The value on each rank is the mean over that rank's rows; the mean over ranks equals the
        single-process value on the concatenated batch wherever the terms are global.
        """

    @abc.abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 1, H, W] uint8 images -> [B, D] unit-norm float32 embeddings in the shared space."""

    @abc.abstractmethod
    def encode_text(self, text: Text) -> Tensor:
        """Tokenised texts -> [B, D] unit-norm float32 embeddings in the shared space.

        Raises:
            NotImplementedError: the method embeds no reports (`embeds_reports` is false).
        """

    @abc.abstractmethod
    def image_features(self, image: Tensor) -> Tensor:
        """[B, 1, H, W] uint8 images -> [B, F] backbone features before any projection (linear probes)."""

    def prototype_features(self, batch: Batch) -> list[Tensor]:
        """Features of a batch that k-means may start the learned prototypes from.

        Returns:
            [B, ..., D] tensors; zeros stand where a sample has none. By default the embeddings of images and
            reports.
        """
        return [self.encode_image(batch.image), self.encode_text(batch.text)]

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Called once after the build, on the device and before any weights are loaded or sharded.

        For methods that keep encoded texts as buffers. Buffers are saved, so a loaded state replaces them.
        """

    @property
    def embeds_reports(self) -> bool:
        """Whether `encode_text` works; without it there is no retrieval of reports."""
        return True

    @property
    def scores_by_embedding(self) -> bool:
        """Whether `score` is the dot product of embeddings, so that each side is embedded once."""
        return True

    def score(self, image: Tensor, prompts: Text) -> Tensor:
        """[B, 1, H, W] images and N prompts -> [B, N] scores for zero-shot use (higher is more alike)."""
        return self.encode_image(image) @ self.encode_text(prompts).T

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        """Where in the images the prompts are seen.

        Args:
            image: [B, 1, H, W] uint8. prompts: N tokenised texts.

        Returns:
            [B, N, rows, columns] float32 maps on the encoder's grid, higher where a prompt is seen. Their
            range is the method's own: compare inside a map, not between methods.

        Raises:
            NotImplementedError: the method has no such map.
        """
        raise NotImplementedError(f"{type(self).__name__} does not ground text in images")
