"""Starting learned prototypes from k-means of the model's features, when a loss first uses them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.data.batch import Batch, join
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import Clusters, spherical_kmeans
from medvlp.prototypes.sampling import row_keys
from medvlp.prototypes.user import Embedder, PrototypeUser


class FoundPrototypes(NamedTuple):
    """What k-means found among the features.

    Attributes:
        clusters: their centroids are [K, D] unit vectors.
        length: mean length of the features, for prototypes whose length matters.
    """

    clusters: Clusters
    length: float


class HasPrototypes(Embedder, Protocol):
    """The part of `medvlp.methods.base.Method` that is needed here; a method is also an `nn.Module`."""

    @property
    def prototype_users(self) -> Sequence[PrototypeUser]: ...


def initialise_prototypes(
    method: HasPrototypes,
    batches: Callable[[], Iterable[Batch]],
    config: PrototypesConfig,
    seed: int,
    phase: int = 0,
    joined: int = 1,
) -> list[Clusters]:
    """Write k-means centroids of features into the prototypes first used in `phase`; a collective.

    To be called before an engine owns the weights; afterwards all ranks have the same prototypes.

    Args:
        method: a method with learned prototypes.
        batches: starts an iteration over this rank's micro-batches; see `find_prototypes`.
        config: the `prototypes` section.
        seed: of k-means.
        phase: of the optimiser that training is about to begin, see `PrototypeUser.prototype_phase`.
        joined: micro-batches that a loss sees together; see `find_prototypes`.

    Returns:
        The clusters of each part that has such prototypes; none with `init: random`.

    Raises:
        TooFewRowsError, ValueError: see `find_prototypes`.
    """
    found = []
    for user in starting_users(method, config, phase):
        prototypes = user.learned_prototypes
        assert prototypes is not None, "of those that start"
        clusters, length = find_prototypes(method, user, batches(), config, seed, joined)
        prototypes.set(clusters.centroids, length)
        found.append(clusters)
    return found


def starting_users(method: HasPrototypes, config: PrototypesConfig, phase: int) -> list[PrototypeUser]:
    """The parts whose learned prototypes start from k-means at the first step of an optimiser phase."""
    if config.init != "kmeans":
        return []
    return [user for user in method.prototype_users if user.prototype_phase() == phase]


def find_prototypes(
    method: Embedder,
    user: PrototypeUser,
    batches: Iterable[Batch],
    config: PrototypesConfig,
    seed: int,
    joined: int = 1,
) -> FoundPrototypes:
    """Cluster the features of a method's part by k-means; a collective.

    What is clustered is the part's choice (`PrototypeUser.prototype_features`): embeddings of images and
    reports together, or of sentences. The pass has no gradient and no dropout; batch norms use batch
    statistics, as in the training that follows (running averages of an untrained network would leave all
    embeddings in a narrow cone), and are put back afterwards. What is found depends neither on the ranks nor
    on how they cut their batches, wherever the losses do not (batch norms inside an encoder apart).

    Args:
        method: an `nn.Module` that has the encoders, in its own hands or in an engine's.
        user: the part.
        batches: this rank's micro-batches, of equal size on all ranks.
        config: the `prototypes` section; `init_samples` over all ranks are embedded.
        seed: of k-means.
        joined: micro-batches that a loss sees together: those of a step with exact accumulation, else 1. The
            encoders run on each, the part's heads on all of them.

    Raises:
        TooFewRowsError: fewer features than prototypes.
        ValueError: features are NaN or infinite.
    """
    size = user.prototype_size()
    assert size is not None, "a part with learned prototypes"
    assert isinstance(method, nn.Module)
    device = next(method.parameters()).device
    rows, keys = [torch.zeros(0, size[1])], [torch.zeros(0, dtype=torch.int64)]
    with _batch_statistics(method), torch.no_grad():
        for number, parts in enumerate(_passes(batches, joined, config.init_samples)):
            batch = join(parts).to(device)
            features = user.prototype_features(_encodings(method, user, batch, len(parts[0].keys)), batch)
            for part, given in enumerate(features):
                found = given.float().cpu()
                places = _places(batch.sample.cpu(), found.shape[:-1], number, part)
                there = (found != 0).any(-1)
                rows.append(found[there])
                keys.append(row_keys(seed, *(place[there] for place in places)))
    every = torch.cat(rows)
    lengths = torch.linalg.vector_norm(every, dim=1)
    total = distributed.sum_on_host(torch.stack([lengths.sum(), torch.tensor(float(len(lengths)))]).double())
    clusters = spherical_kmeans(unit_norm(every), size[0], config, seed, keys=torch.cat(keys))
    return FoundPrototypes(clusters, float(total[0] / total[1]))


def _passes(batches: Iterable[Batch], joined: int, samples: int) -> Iterator[list[Batch]]:
    """The micro-batches of each pass of the losses, until those of all ranks have so many samples."""
    iterator, seen = iter(batches), 0
    while seen < samples and (parts := list(islice(iterator, joined))):
        yield parts
        seen += sum(len(part.keys) for part in parts) * distributed.world_size()


def _encodings(method: Embedder, user: PrototypeUser, batch: Batch, size: int) -> Any:
    """The encodings of a batch, made of `size` samples at a time."""
    starts = range(0, len(batch.keys), size)
    parts = [user.prototype_encodings(method, batch.rows(start, start + size)) for start in starts]
    return tree_map(lambda *of: torch.cat(of) if isinstance(of[0], Tensor) else of[0], *parts)


def _places(samples: Tensor, shape: torch.Size, number: int, part: int) -> list[Tensor]:
    """What names each feature of [B, ...] ones of B samples, on whatever rank and in whatever order."""
    rows = samples.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    slots = torch.arange(shape[1:].numel()).view(1, *shape[1:])
    return [torch.full(shape, number), torch.full(shape, part), rows, slots.expand(shape)]


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
