"""How evenly clusters are used, how they change, and how they agree with findings."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the [K] sizes over K, in (0, 1]; 1: all clusters are of one size."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp() / len(counts))


def dead_share(counts: Tensor) -> float:
    """Share of the clusters without rows, in [0, 1]."""
    return float((counts == 0).double().mean())


def label_sets(bits: NDArray[np.int64], findings: int) -> NDArray[np.bool_]:
    """[n] label bits (see `medvlp.prototypes.ring.BankRows`) -> [n, C] bool, which findings are present."""
    present: NDArray[np.bool_] = (bits[:, None] >> np.arange(findings)) & 1 == 1
    return present


def purity(clusters: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of the [n] rows whose label is the most frequent one of their cluster, in (0, 1].

    With several findings a label is the whole set of findings (its bits). Rises by itself with the number of
    clusters: compare only tables of the same K on the same number of rows.
    """
    from sklearn.metrics.cluster import contingency_matrix  # here: takes a second to import

    table = contingency_matrix(labels, clusters, sparse=True)
    return float(table.max(0).sum() / len(clusters))


def nmi(clusters: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Mutual information of clusters and label sets over the mean of their entropies, in [0, 1]."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels, clusters))


def mean_finding_nmi(clusters: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Mean of the NMI of clusters with each finding alone, over findings that some rows have, not all.

    A finding is one bit and clusters are many, so values are small even for perfect clusters; NaN where no
    finding varies.
    """
    every = int(np.bitwise_or.reduce(labels)) if len(labels) else 0
    present = label_sets(labels, every.bit_length())
    scores = [
        nmi(clusters, column.astype(np.int64)) for column in present.T if 0 < column.sum() < len(column)
    ]
    return float(np.mean(scores)) if scores else float("nan")
