"""The objective of a downstream task: the network of a pre-training run, a head, and a loss."""

import abc
from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from medvlp.data.batch import Batch
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method, Objective


class SupervisedObjective(Objective):
    """Trains a head, and the parts of a method below it.

    A subclass writes `forward(batch, clusters=None) -> StepOutput` and `predict`. Both call modules (ZeRO-3
    gathers weights when one is called): `self.method.image_features(batch.image)`,
    `self.method.image_encoder(batch.image)`, `self.head(...)`.

    Attributes:
        method: the whole method, so that its weights load by name; parts that are not trained are frozen and
            in evaluation mode. With `image.frozen` the image backbone is, too.
        head: what the task adds; `optimizer.head_lr_scale` is for it.

    Args:
        method: as it was built, before its weights are loaded.
        head: newly drawn.
        trained: names of the parts of the method that are trained.
    """

    method: Method

    def __init__(
        self, method: Method, head: nn.Module, trained: tuple[str, ...] = ("image_encoder",)
    ) -> None:
        super().__init__()
        self.method, self.head = method, head
        self._frozen = [name for name, _ in method.named_children() if name not in trained]
        for name, parameter in method.named_parameters():
            if name.split(".")[0] not in trained:
                parameter.requires_grad_(False)

    @abc.abstractmethod
    def predict(self, batch: Batch) -> Mapping[str, Tensor]:
        """All that scoring needs of the samples of a batch: what is predicted, and the truth.

        Returns:
            name -> [B, ...], with the same trailing shape in every batch (pad to a fixed size). Of dense
            maps: sums of each sample, not the maps, which would not fit into memory for a whole split.
        """

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.method.get_submodule(name).eval()
        return self

    def prepare(self, tokenizer: Tokenizer) -> None:
        """See `Objective.prepare`."""
        self.method.prepare(tokenizer)

    def parameters_without_decay(self) -> set[str]:
        """See `Objective.parameters_without_decay`."""
        return {f"method.{name}" for name in self.method.parameters_without_decay()}
