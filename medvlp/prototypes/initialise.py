"""Starting learned prototypes from k-means of the untrained (or pre-trained) model's embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.data.batch import Batch, Text
from medvlp.prototypes.kmeans import Clusters, spherical_kmeans


class PrototypeUser(Protocol):
    """The part of `medvlp.methods.base.Objective` that is needed here."""

    def prototype_size(self) -> tuple[int, int] | None: ...

    def set_prototypes(self, centroids: Tensor) -> None: ...


class HasPrototypes(Protocol):
    """The part of `medvlp.methods.base.Method` that is needed here; a method is also an `nn.Module`."""

    @property
    def prototype_user(self) -> PrototypeUser: ...

    def encode_image(self, image: Tensor) -> Tensor: ...

    def encode_text(self, text: Text) -> Tensor: ...


def initialise_prototypes(
    method: HasPrototypes, batches: Iterable[Batch], config: PrototypesConfig, seed: int
) -> Clusters | None:
    """Write k-means centroids of the first embeddings into the learned prototypes; a collective.

    To be called before an engine owns the weights; afterwards all ranks have the same prototypes. Images
    and reports are clustered together. The pass has no gradient and no dropout; batch norms use batch
    statistics, as in the training that follows (running averages of an untrained network would leave all
    embeddings in a narrow cone), and are put back afterwards.

    Args:
        method: a method with learned prototypes.
        batches: this rank's micro-batches, of equal size on all ranks.
        config: the `prototypes` section; `init_samples` over all ranks are embedded.
        seed: of k-means.

    Returns:
        The clusters, or None with `init: random`.

    Raises:
        TooFewRowsError: fewer embeddings than prototypes.
    """
    size = method.prototype_user.prototype_size()
    if config.init != "kmeans" or size is None:
        return None
    assert isinstance(method, nn.Module)
    device = next(method.parameters()).device
    world_size, rank = distributed.world_size(), distributed.rank()
    rows: list[Tensor] = []
    iterator = iter(batches)
    with _batch_statistics(method), torch.no_grad():
        first = next(iterator, None)
        if first is not None:
            steps = -(-config.init_samples // (len(first.sample) * world_size))
            for batch in [first, *islice(iterator, steps - 1)]:
                moved = batch.to(device)
                rows += [method.encode_image(moved.image).cpu(), method.encode_text(moved.text).cpu()]
    # Step, then modality, then rank: the order one process has, so that ranks do not change the start.
    places = [
        (step * world_size + rank) * len(part) + torch.arange(len(part)) for step, part in enumerate(rows)
    ]
    local = torch.cat(rows) if rows else torch.zeros(0, size[1])
    positions = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
    clusters = spherical_kmeans(local, size[0], config.iterations, seed, positions=positions)
    method.prototype_user.set_prototypes(clusters.centroids)
    return clusters


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Every batch norm that training would run on batch statistics does so; everything else evaluates."""
    modes = {part: part.training for part in module.modules()}
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    for part, training in modes.items():
        part.training = training and isinstance(part, nn.modules.batchnorm._BatchNorm)
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
