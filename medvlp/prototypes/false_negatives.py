"""Which samples of a batch are no negatives of each other: those of one service cluster."""

from typing import NamedTuple

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.prototypes.ring import label_bits
from medvlp.prototypes.table import PrototypeTable


class Exclusion(NamedTuple):
    """Pairs that contrasts between samples leave out (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        pairs: [B, N] bool, true where candidate j is no negative of sample i of this rank. Candidates are the
            samples of all ranks in rank order, or (`negatives: local`) of this one; a sample's own pair is
            false. None: every other sample is a negative.
        metrics: 0-d float32 by name, see `exclude_false_negatives`.
    """

    pairs: Tensor | None
    metrics: dict[str, Tensor]


#: Every other sample is a negative.
NOTHING_EXCLUDED = Exclusion(None, {})


@torch.no_grad()
def exclude_false_negatives(
    table: PrototypeTable, embeddings: Tensor, labels: Tensor, every_rank: bool
) -> Exclusion:
    """Leave out the pairs of samples whose embeddings fall into one cluster; at most one collective.

    Args:
        table: clusters, the same on all ranks.
        embeddings: [B, D] unit-norm embeddings of this rank's samples; B is equal on all ranks.
        labels: [B, C] 1, 0, -1 (uncertain) or NaN (unknown), only for the metrics.
        every_rank: candidates are the samples of all ranks; false: of this one.

    Returns:
        The pairs, and "prototypes/masked": their share of all pairs of different samples, in [0, 1]. Where
        the batch has label columns also "prototypes/mask_precision": share of the pairs left out that share
        a present finding or both have none, in [0, 1], among those whose samples both have labels; NaN where
        there is no such pair. The mean over ranks of each is its value over the pairs of all ranks.
    """
    # One gather for both: clusters decide, labels only tell how well.
    own = torch.stack([table.assign(embeddings), label_bits(labels)], 1)
    others = distributed.gather_rows(own) if every_rank else own
    pairs = own[:, None, 0] == others[None, :, 0]
    pairs.diagonal(distributed.rank() * len(own) if every_rank else 0).fill_(False)
    metrics = {"prototypes/masked": pairs.sum() / max(1, len(own) * (len(others) - 1))}
    if labels.shape[1]:
        metrics["prototypes/mask_precision"] = _precision(pairs, own[:, 1], others, len(table.centroids))
    return Exclusion(pairs, metrics)


def _precision(pairs: Tensor, findings: Tensor, others: Tensor, clusters: int) -> Tensor:
    """Agreeing labelled pairs of this rank over the mean number of labelled pairs of the ranks, 0-d."""
    mine, theirs = findings[:, None], others[None, :, 1]
    agreeing = ((mine & theirs) != 0) | ((mine == 0) & (theirs == 0))
    labelled = (mine >= 0) & (theirs >= 0)
    # The sizes of the clusters give the number of labelled pairs of all ranks without another collective.
    known = (others[:, 1] >= 0).long()
    sizes = known.new_zeros(clusters).scatter_add_(0, others[:, 0], known)
    total = (sizes * (sizes - 1)).sum()
    return (pairs & agreeing & labelled).sum() / (total * (len(findings) / len(others)))
