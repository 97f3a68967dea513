"""One refresh: from the embeddings of all members of a group to the next version of the table."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes import cluster_metrics
from medvlp.prototypes.kmeans import Anchors, Clusters, build_search, describe, improve
from medvlp.prototypes.ring import BankRows
from medvlp.prototypes.sampling import gather_in_order, mixed_seed, rank_order, row_keys, smallest
from medvlp.prototypes.seeding import first_centroids
from medvlp.prototypes.table import PrototypeTable

#: Rows, of all members together, on which clusters are compared with labels.
LABELLED_ROWS = 20_000
#: PCL's smoothing constant alpha, and the percentiles its code clips densities at.
_ALPHA, _PERCENTILES = 10.0, (10.0, 90.0)


def refresh_table(
    rows: BankRows,
    old: PrototypeTable | None,
    config: PrototypesConfig,
    count: int,
    seed: int,
    anchors: Tensor | None = None,
) -> tuple[PrototypeTable | None, dict[str, float]]:
    """Cluster the rows of all members (ranks or cluster workers); a collective of the present default group.

    Starts from the old centroids, so that ids keep their meaning. The rows used (see `max_points`) and the
    start are chosen by sample, modality and step of a row, so they do not depend on which member holds it;
    rows without a sample (-1) are told apart by member and place instead.

    Args:
        rows: of this member; any number, also none.
        old: the present table (the same on all members); None: there is none yet.
        config: the `prototypes` section.
        count: number of clusters K.
        seed: of the run; what is random follows from it and the version.
        anchors: [A, D] text embeddings that hold the first A clusters (the same on all members).

    Returns:
        The new table, the same bits on all members, or None where there are fewer than `min_points` rows
        for each cluster; and metrics to log (see README.md beside this file), the same on all members but
        for seconds.

    Raises:
        ValueError: the old table or the anchors do not fit the rows or `count`.
    """
    clock = _Clock()
    embeddings, usable = _usable(rows)
    total, unusable = distributed.sum_on_host(torch.tensor([len(embeddings), int((~usable).sum())])).tolist()
    version = 0 if old is None else old.version
    metrics = {"prototypes/rows": float(total), "prototypes/unusable": float(unusable)}
    if total < count * config.min_points:
        return None, {"prototypes/version": float(version), **metrics, "prototypes/put_off": 1.0}
    _check(embeddings, old, count, anchors)
    keys = _keys(rows, usable, mixed_seed(seed, version + 1))
    labels = rows.labels[usable]
    if total > count * config.max_points:
        chosen = smallest(keys, count * config.max_points)
        embeddings, keys, labels = embeddings[chosen], keys[chosen], labels[chosen]
    clock.lap("choose")
    held = None if anchors is None else Anchors(unit_norm(anchors).float().cpu(), config.anchor_pull)
    clusters, before, on_gpu = _cluster(
        embeddings, keys, old, config, count, (seed, version + 1), held, clock
    )
    table = _publish(clusters, config, version + 1)
    metrics |= {
        "prototypes/version": float(table.version),
        "prototypes/put_off": 0.0,
        "prototypes/sampled": float(clusters.counts.sum()),
        "prototypes/similarity": clusters.similarity,
        "prototypes/perplexity": cluster_metrics.perplexity(clusters.counts),
        "prototypes/dead": cluster_metrics.dead_share(clusters.counts),
        "prototypes/split": float(clusters.revived),
        "prototypes/on_gpu": float(on_gpu),
    }
    if before is not None:
        differing = distributed.sum_on_host((before != clusters.nearest).sum())
        metrics["prototypes/churn"] = float(differing / clusters.counts.sum())
    if distributed.sum_on_host((labels >= 0).sum()):  # of the rows that were chosen
        metrics |= _agreement(clusters.nearest, labels, keys)
        clock.lap("labels")
    return table, metrics | clock.metrics()


def _usable(rows: BankRows) -> tuple[Tensor, Tensor]:
    """[m, D] unit vectors of the rows that have a direction, and [n] bool, which those are."""
    embeddings = rows.embeddings.detach().float()
    lengths = torch.linalg.vector_norm(embeddings, dim=1)
    usable = lengths.isfinite() & (lengths > 1e-6)
    if not usable.all():
        embeddings, lengths = embeddings[usable], lengths[usable]
    return embeddings / lengths[:, None], usable


def _check(embeddings: Tensor, old: PrototypeTable | None, count: int, anchors: Tensor | None) -> None:
    width = embeddings.shape[1]
    if old is not None and old.centroids.shape != (count, width):
        raise ValueError(
            f"the prototype table has shape {tuple(old.centroids.shape)}, this run's is {(count, width)} "
            "(the number of prototypes or the method's embedding has changed)"
        )
    if anchors is not None and (anchors.shape[1:] != (width,) or len(anchors) > count):
        raise ValueError(
            f"prototypes.anchors: texts with embeddings {tuple(anchors.shape)} for {count} clusters of "
            f"width {width}"
        )


def _keys(rows: BankRows, usable: Tensor, seed: int) -> Tensor:
    places = rank_order(len(usable))
    named = torch.where(rows.sample >= 0, rows.sample, -1 - places)
    return row_keys(seed, named[usable], rows.modality[usable], rows.step[usable])


def _cluster(
    embeddings: Tensor,
    keys: Tensor,
    old: PrototypeTable | None,
    config: PrototypesConfig,
    count: int,
    seeds: tuple[int, int],
    anchors: Anchors | None,
    clock: _Clock,
) -> tuple[Clusters, Tensor | None, bool]:
    """k-means, blending and the last assignment; the rows' [n] old clusters; whether a GPU was used."""
    directions = None if anchors is None else anchors.directions
    if old is None:
        start = first_centroids(embeddings, keys, count, config.start, seeds[0], directions)
    else:
        start = old.centroids.float().cpu()
    clock.lap("start")
    search = build_search(len(embeddings), count, embeddings.shape[1], config)
    improved = improve(embeddings, start, search, range(config.iterations), *seeds, anchors)
    centroids = improved.centroids
    if old is not None and config.blend < 1.0:
        centroids = unit_norm(torch.lerp(start, centroids, config.blend))
        if anchors is not None and anchors.pull == 1.0:
            centroids = anchors.hold(centroids)  # the text's embedding of now, not a mixture
    clock.lap("iterations")
    # Members on different machines may round differently.
    centroids = distributed.broadcast_on_host(centroids.contiguous())
    clusters = describe(embeddings, centroids, search, improved.revived)
    clock.lap("assignment")
    return clusters, None if old is None else improved.first, search.on_gpu


def _publish(clusters: Clusters, config: PrototypesConfig, version: int) -> PrototypeTable:
    """The table, with member 0's bits of everything."""
    # Minus the log of the (smoothed) share against an even one: a softmax with it uses clusters evenly.
    log_bias = -((clusters.counts + 1) / (clusters.counts + 1).mean()).log()
    if config.cluster_temperature:
        temperatures = density_temperatures(clusters.distances, clusters.counts, config.temperature)
    else:
        temperatures = torch.full_like(clusters.counts, config.temperature)
    columns = torch.stack([clusters.counts, log_bias, temperatures])
    counts, log_bias, temperatures = distributed.broadcast_on_host(columns).clone()
    return PrototypeTable(
        clusters.centroids, counts, log_bias, temperatures, version, config.temperature, config.balance
    )


def density_temperatures(distances: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Temperatures with mean `temperature`, lower where rows lie close to their centroid.

    phi = (sum of the Euclidean distances to the centroid) / (n log(n + 10)); clusters with at most one row
    take the largest; clipped at the 10th and 90th percentile. (Li et al., ICLR 2021; the clipping and what
    happens to single rows are of the published code.) Where all rows lie on their centroids all are equal.

    Args:
        distances: [K] sums over each cluster's rows. counts: [K] rows.
        temperature: positive.

    Returns:
        [K] float32, positive.
    """
    sums, number = distances.double().numpy(), counts.double().numpy()
    several = number > 1
    density = np.zeros(len(number))
    density[several] = sums[several] / (number[several] * np.log(number[several] + _ALPHA))
    density[~several] = density.max()
    low, high = np.percentile(density, _PERCENTILES)
    # Clusters of identical rows would get a temperature of 0 where they are more than a tenth.
    density = density.clip(max(low, 1e-3 * high), high)
    if not density.mean() > 0:
        return torch.full((len(number),), temperature, dtype=torch.float32)
    return torch.from_numpy(temperature * density / density.mean()).float()


def _agreement(nearest: Tensor, labels: Tensor, keys: Tensor) -> dict[str, float]:
    """Agreement of clusters and labels on a sample of the labelled rows, computed by member 0."""
    known = labels >= 0
    nearest, labels, keys = nearest[known], labels[known], keys[known]
    chosen = smallest(keys, LABELLED_ROWS)
    pairs = gather_in_order(torch.stack([nearest[chosen], labels[chosen]], 1), keys[chosen]).numpy()
    values = torch.zeros(3, dtype=torch.float64)
    if distributed.is_main():
        measures = (cluster_metrics.nmi, cluster_metrics.mean_finding_nmi, cluster_metrics.purity)
        values = torch.tensor(
            [measure(pairs[:, 0], pairs[:, 1]) for measure in measures], dtype=torch.float64
        )
    names = ("prototypes/nmi", "prototypes/nmi_findings", "prototypes/purity")
    return dict(zip(names, distributed.broadcast_on_host(values).tolist(), strict=True))


class _Clock:
    """Seconds of each part of a refresh on this member."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[f"prototypes/seconds_{part}"] = now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        return {**self._seconds, "prototypes/seconds": time.perf_counter() - self._begin}
