"""The interface every pre-training method keeps."""

from __future__ import annotations

import abc

from torch import Tensor, nn

from medvlp.data.batch import Batch, Text
from medvlp.prototypes.table import PrototypeTable


class Method(nn.Module, abc.ABC):
    """A pre-training objective with its encoders.

    A method imports no DeepSpeed, no W&B and no files. Every random draw comes from torch's default
    generators, which the checkpoint restores.

    Attributes:
        prototype_table: clusters of the prototype service this step may use (set by the trainer; None
            until there are some, and always None for methods without `uses_service`).
        keep_embeddings: when true, `forward` leaves its detached unit-norm embeddings in `last_embeddings`
            (set by the trainer for methods with `uses_service`).
        last_embeddings: modality ("image", "text") -> [B, D] float32 of the last `forward`.
    """

    prototype_table: PrototypeTable | None = None
    keep_embeddings: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.last_embeddings: dict[str, Tensor] = {}

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
        """Tokenised texts -> [B, D] unit-norm float32 embeddings in the shared space."""

    @abc.abstractmethod
    def image_features(self, image: Tensor) -> Tensor:
        """[B, 1, H, W] uint8 images -> [B, F] backbone features before any projection (linear probes)."""

    def score(self, image: Tensor, prompts: Text) -> Tensor:
        """[B, 1, H, W] images and N prompts -> [B, N] scores for zero-shot use (higher is more alike)."""
        return self.encode_image(image) @ self.encode_text(prompts).T

    def on_progress(self, epoch: int, step: int) -> None:
        """Called before every optimiser step with the epoch (from 0) and global step (from 0)."""

    def parameters_without_decay(self) -> set[str]:
        """Names of parameters that never get weight decay, not even with `optimizer.decay_all`.

        A frozen parameter has zero gradients, so that Adam leaves it exactly unchanged unless it decays.
        """
        return set()

    @property
    def uses_service(self) -> bool:
        """Whether the trainer should run a prototype service for this method (see medvlp/prototypes)."""
        return False

    def prototype_size(self) -> tuple[int, int] | None:
        """(number, width) of the method's prototypes, learned or from the service; None without any."""
        return None

    def set_prototypes(self, centroids: Tensor) -> None:
        """Write [K, D] unit-norm centroids into the learned prototypes (before the engine takes the weights).

        Raises:
            NotImplementedError: the method has no learned prototypes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no learned prototypes")
