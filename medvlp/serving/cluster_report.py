"""What lies in each cluster: sizes, findings, purity, and how well clusters agree with findings over all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.prototypes import cluster_metrics
from medvlp.prototypes.table import PrototypeTable
from medvlp.serving.snapshot import ABSENT, PRESENT, UNKNOWN, Snapshot

#: Most typical samples listed for a cluster.
TYPICAL = 16
#: Rows of one matrix product with the centroids.
_BLOCK = 4096


@dataclass(frozen=True)
class Members:
    """The cluster of every sample of a snapshot, once by its image and once by its report.

    Attributes:
        clusters: modality -> [S] int64, the cluster with the highest cosine (no bias, no balancing).
        cosines: modality -> [S] float32, that cosine.
    """

    snapshot: Snapshot
    clusters: dict[str, NDArray[np.int64]]
    cosines: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, snapshot: Snapshot) -> Members:
        """Assign all embeddings of a snapshot."""
        clusters, cosines = {}, {}
        for name, rows in snapshot.embeddings().items():
            cosine, nearest = nearest_clusters(snapshot.table, rows)
            clusters[name], cosines[name] = nearest.numpy(), cosine.numpy()
        return cls(snapshot, clusters, cosines)

    @cached_property
    def images(self) -> NDArray[np.int64]:
        """[K] samples whose image lies in each cluster."""
        return np.bincount(self.clusters["image"], minlength=len(self.snapshot.table.centroids))

    @cached_property
    def reports(self) -> NDArray[np.int64]:
        """[K] samples whose report lies in each cluster; all 0 where no reports are embedded."""
        of_row = self.clusters.get("report", np.zeros(0, np.int64))
        return np.bincount(of_row, minlength=len(self.snapshot.table.centroids))

    @cached_property
    def similarity(self) -> NDArray[np.float64]:
        """[K] mean cosine of all embeddings of a cluster with its centroid; NaN for an empty one."""
        count = self.snapshot.table.centroids.shape[0]
        total, size = np.zeros(count), self.images + self.reports
        for name, of_row in self.clusters.items():
            total += np.bincount(of_row, self.cosines[name], minlength=count)
        mean = np.full(count, np.nan)
        np.divide(total, size, out=mean, where=size > 0)
        return mean

    @cached_property
    def _order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows by the cluster of their image, most similar first; and where each cluster begins."""
        order = np.lexsort((-self.cosines["image"], self.clusters["image"]))
        count = self.snapshot.table.centroids.shape[0]
        starts = np.searchsorted(self.clusters["image"][order], np.arange(count + 1))
        return order, starts

    def rows(self, cluster: int) -> NDArray[np.int64]:
        """Rows whose image lies in a cluster, nearest to the centroid first."""
        order, starts = self._order
        return order[starts[cluster] : starts[cluster + 1]]

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """[S] numbers that are equal where the sets of findings present are; -1 without any known label."""
        labels = self.snapshot.labels.numpy()
        known = (labels != UNKNOWN).any(1)
        numbers = np.full(len(labels), -1, dtype=np.int64)
        if known.any():
            numbers[known] = np.unique(labels[known] == PRESENT, axis=0, return_inverse=True)[1].ravel()
        return numbers

    def purity(self, cluster: int) -> float | None:
        """Share of a cluster's labelled samples that have its most frequent set of findings."""
        classes = self.classes[self.rows(cluster)]
        classes = classes[classes >= 0]
        return float(np.bincount(classes).max() / len(classes)) if len(classes) else None

    def label_mix(self, cluster: int) -> dict[str, float]:
        """Finding -> share of the cluster's samples with it, of those labelled for it; frequent first."""
        labels = self.snapshot.labels.numpy()[self.rows(cluster)]
        known = (labels != UNKNOWN).sum(0)
        share = np.divide((labels == PRESENT).sum(0), known, out=np.zeros(len(known)), where=known > 0)
        names = self.snapshot.origin.label_names
        return {names[c]: float(share[c]) for c in np.argsort(-share, kind="stable") if share[c] > 0}


def nearest_clusters(table: PrototypeTable, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, D] rows -> ([n] float32 cosines, [n] int64 ids) of the nearest centroid, in blocks of rows."""
    parts = [table.nearest(block.float(), 1) for block in torch.split(rows, _BLOCK)]
    return torch.cat([cosine[:, 0] for cosine, _ in parts]), torch.cat([ids[:, 0] for _, ids in parts])


def report_of(members: Members) -> dict[str, Any]:
    """The content of `report.json`; sample keys and label names are all it says of samples."""
    snapshot, origin = members.snapshot, members.snapshot.origin
    table = snapshot.table
    clusters = []
    for number in range(table.centroids.shape[0]):
        rows = members.rows(number)
        similarity = members.similarity[number]
        clusters.append(
            {
                "id": number,
                "images": int(members.images[number]),
                "reports": int(members.reports[number]),
                "similarity": None if np.isnan(similarity) else round(float(similarity), 6),
                "purity": members.purity(number),
                "labels": members.label_mix(number),
                "typical": [snapshot.key_of(int(row)) for row in rows[:TYPICAL]],
            }
        )
    return {
        "run": origin.run,
        "checkpoint": origin.checkpoint,
        "step": origin.step,
        "table": {
            "source": origin.source,
            "version": table.version,
            "fingerprint": table.fingerprint,
            "clusters": table.centroids.shape[0],
            "width": table.centroids.shape[1],
        },
        "data": {"fingerprint": origin.data, "split": origin.split, "labels": origin.label_names},
        "samples": len(snapshot.sample),
        "modalities": list(snapshot.embeddings()),
        "overall": overall(members),
        "clusters": clusters,
    }


def overall(members: Members) -> dict[str, Any]:
    """Metrics over all clusters, as `medvlp.prototypes.cluster_metrics` defines them.

    dead_share and perplexity: of sizes in images and reports together. purity, nmi: of the clusters of the
    images and the sets of findings of labelled samples; nmi_by_finding: the same for each finding alone.
    same_cluster: share of samples whose image and report lie in one cluster. None: nothing to say it from.
    """
    snapshot = members.snapshot
    size = torch.from_numpy(members.images + members.reports)
    classes, of_image = members.classes, members.clusters["image"]
    known = classes >= 0
    labels = snapshot.labels.numpy()
    by_finding = {}
    for number, name in enumerate(snapshot.origin.label_names):
        column = labels[:, number]
        rows = (column == PRESENT) | (column == ABSENT)
        if 0 < (column[rows] == PRESENT).sum() < rows.sum():
            by_finding[name] = cluster_metrics.nmi(of_image[rows], column[rows].astype(np.int64))
    reports = members.clusters.get("report")
    return {
        "dead_share": cluster_metrics.dead_share(size),
        "perplexity": cluster_metrics.perplexity(size),
        "purity": cluster_metrics.purity(of_image[known], classes[known]) if known.any() else None,
        "nmi": cluster_metrics.nmi(of_image[known], classes[known]) if known.any() else None,
        "nmi_by_finding": by_finding,
        "same_cluster": None if reports is None else float((reports == of_image).mean()),
    }
