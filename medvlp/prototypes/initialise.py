"""Starting learned prototypes from k-means of the untrained (or pre-trained) model's embeddings."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.data.batch import Batch
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import Clusters, spherical_kmeans
from medvlp.prototypes.sampling import row_keys
from medvlp.prototypes.user import Embedder, PrototypeUser


class HasPrototypes(Embedder, Protocol):
    """The part of `medvlp.methods.base.Method` that is needed here; a method is also an `nn.Module`."""

    @property
    def prototype_user(self) -> PrototypeUser | None: ...


def initialise_prototypes(
    method: HasPrototypes, batches: Iterable[Batch], config: PrototypesConfig, seed: int
) -> Clusters | None:
    """Write k-means centroids of the first features into the learned prototypes; a collective.

    To be called before an engine owns the weights; afterwards all ranks have the same prototypes. What is
    clustered is the method's choice (`PrototypeUser.prototype_features`): embeddings of images and reports
    together, or of sentences. The pass has no gradient and no dropout; batch norms use batch statistics, as
    in the training that follows (running averages of an untrained network would leave all embeddings in a
    narrow cone), and are put back afterwards.

    Args:
        method: a method with learned prototypes.
        batches: this rank's micro-batches, of equal size on all ranks.
        config: the `prototypes` section; `init_samples` over all ranks are embedded.
        seed: of k-means.

    Returns:
        The clusters, or None with `init: random`.

    Raises:
        TooFewRowsError: fewer features than prototypes.
        ValueError: features are NaN or infinite.
    """
    user = method.prototype_user
    size = None if user is None else user.prototype_size()
    if config.init != "kmeans" or user is None or size is None:
        return None
    assert isinstance(method, nn.Module)
    device = next(method.parameters()).device
    rows, keys = [torch.zeros(0, size[1])], [torch.zeros(0, dtype=torch.int64)]
    iterator = iter(batches)
    with _batch_statistics(method), torch.no_grad():
        first = next(iterator, None)
        if first is not None:
            steps = -(-config.init_samples // (len(first.sample) * distributed.world_size()))
            for step, batch in enumerate([first, *islice(iterator, steps - 1)]):
                for part, features in enumerate(user.prototype_features(method, batch.to(device))):
                    found = features.float().cpu()
                    places = _places(found.shape[:-1], step, part)
                    there = (found != 0).any(-1)
                    rows.append(found[there])
                    keys.append(row_keys(seed, *(place[there] for place in places)))
    features = torch.cat(rows)
    lengths = torch.linalg.vector_norm(features, dim=1)
    total = distributed.sum_on_host(torch.stack([lengths.sum(), torch.tensor(float(len(lengths)))]).double())
    clusters = spherical_kmeans(unit_norm(features), size[0], config, seed, keys=torch.cat(keys))
    user.set_prototypes(clusters.centroids, float(total[0] / total[1]))
    return clusters


def _places(shape: torch.Size, step: int, part: int) -> list[Tensor]:
    """What names each feature of [B, ...] ones in the order one process has, whatever the number of ranks."""
    rows = distributed.rank() * shape[0] + torch.arange(shape[0])
    slots = torch.arange(shape[1:].numel()).view(1, *shape[1:])
    rows = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return [torch.full(shape, step), torch.full(shape, part), rows, slots.expand(shape)]


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
