"""Which clusters a run has: its prototype service's, its learned prototypes, or new ones by k-means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import spherical_kmeans
from medvlp.prototypes.learned import LearnedPrototypes
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import rank_file
from medvlp.runs.saved_run import SavedRun
from medvlp.serving.layout import PrototypeFilesError
from medvlp.serving.run_model import RunModel
from medvlp.serving.snapshot import Source

#: Embeddings for each cluster that FAISS advises at least; decides K where nobody says it.
POINTS_PER_CLUSTER = 39


def choose_table(
    model: RunModel, embeddings: Mapping[str, Tensor], clusters: int | None, say: Callable[[str], None]
) -> tuple[PrototypeTable, Source]:
    """The clusters to store for a run.

    Args:
        model: the run's method.
        embeddings: modality -> [S, D] unit-norm rows; clustered where the run has no clusters of its own.
        clusters: cluster these rows anew into so many, whatever the run has; None: take the run's own where
            it has some.
        say: receives one line of progress at a time.

    Raises:
        TooFewRowsError: fewer rows than clusters.
        PrototypeFilesError: fewer than two rows for each of two clusters.
    """
    width = next(iter(embeddings.values())).shape[1]
    user, elsewhere = model.method.prototype_user, _embeds_elsewhere(model.config)
    if clusters is None and not (elsewhere and model.method.service_user is user):
        table = stored_table(model.source)
        if table is not None and table.centroids.shape[1] == width:
            say(f"clusters: version {table.version} of the run's prototype service")
            return table, "service"
    if clusters is None and not elsewhere:
        for module in model.method.modules():
            if isinstance(module, LearnedPrototypes) and module.weight.shape[1] == width:
                say(f"clusters: the {len(module.weight)} prototypes the method has learned")
                return PrototypeTable.start(module.weight.detach().cpu(), model.source.step), "learned"
    rows = unit_norm(torch.cat([part.float() for part in embeddings.values()]))
    if clusters is None:
        clusters = min(model.config.prototypes.clusters, len(rows) // POINTS_PER_CLUSTER)
        if clusters < 2:
            raise PrototypeFilesError(
                f"{len(rows)} embeddings are too few to choose a number of clusters for them "
                f"({POINTS_PER_CLUSTER} each): give --clusters, or more samples with --limit"
            )
    config = model.config
    say(f"clusters: k-means of {len(rows)} embeddings into {clusters}")
    found = spherical_kmeans(rows, clusters, config.prototypes, config.train.seed)
    temperature = config.prototypes.temperature
    table = PrototypeTable.start(found.centroids, model.source.step, temperature, balance="none")
    return dataclasses.replace(table, counts=found.counts), "kmeans"


def stored_table(source: SavedRun) -> PrototypeTable | None:
    """The table of the prototype service in a checkpoint; None where the run had none yet.

    Raises:
        PrototypeFilesError: the checkpoint's state cannot be read.
    """
    path = source.checkpoint.folder / rank_file(0)
    if rank_file(0) not in source.manifest.files:
        return None
    try:
        callbacks = source.checkpoint.state_for(0)["callbacks"]  # the table is the same in all ranks' state
        state = callbacks.get("prototypes", {}).get("table")
        return None if state is None else PrototypeTable.from_state_dict(state)
    except (CheckpointError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrototypeFilesError(
            f"{path}: the state of the prototype service cannot be read ({error}); "
            "build from another checkpoint, or cluster anew with --clusters"
        ) from error


def _embeds_elsewhere(config: Config) -> bool:
    """Whether `encode_image` embeds into another space than the one of `prototype_user`.

    A combination's prototypes are those of its MGCA part, and another part may embed.
    """
    return getattr(config.method, "embeds_with", "mgca") != "mgca"
