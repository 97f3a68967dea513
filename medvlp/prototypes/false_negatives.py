"""Which samples of a batch are no negatives of each other: those of one study, those of like reports."""

from typing import NamedTuple

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.prototypes.ring import label_bits


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
def exclude_same_study(studies: Tensor, every_rank: bool) -> Exclusion:
    """Leave out the pairs of samples of one study, which share a report; at most one collective.

    Args:
        studies: [B] int64, equal for samples of one study; B is equal on all ranks.
        every_rank: candidates are the samples of all ranks; false: of this one.
    """
    others = distributed.gather_rows(studies) if every_rank else studies
    return Exclusion(_equal(studies, others, every_rank), {})


def _equal(own: Tensor, others: Tensor, every_rank: bool) -> Tensor:
    """[B, N] bool where a candidate's number is the sample's; a sample's own pair is false."""
    pairs = own[:, None] == others[None]
    pairs.diagonal(distributed.rank() * len(own) if every_rank else 0).fill_(False)
    return pairs


@torch.no_grad()
def exclude_false_negatives(
    alike: Tensor, labels: Tensor, every_rank: bool, studies: Tensor | None = None
) -> Exclusion:
    """Leave out the pairs of samples that are alike; at most one collective.

    Args:
        alike: [B] int64, equal for samples that are alike (their cluster, the identity of their report); B is
            equal on all ranks.
        labels: [B, C] 1, 0, -1 (uncertain) or NaN (unknown), only for the metrics.
        every_rank: candidates are the samples of all ranks; false: of this one.
        studies: [B] int64; pairs of one study are left out too, but do not count in the metrics.

    Returns:
        The pairs, and "prototypes/masked": their share of all pairs of different samples, in [0, 1]. Where
        the batch has label columns also "prototypes/mask_precision": share of the pairs left out that share
        a present finding or both have none, in [0, 1], among those whose samples both have labels; NaN where
        there is no such pair. With `every_rank` the mean over ranks of each is that of the pairs of all.
    """
    # One gather for all: what is alike and studies decide, labels only tell how well.
    columns = [alike, label_bits(labels)]
    own = torch.stack(columns if studies is None else [*columns, studies], 1)
    others = distributed.gather_rows(own) if every_rank else own
    pairs = _equal(own[:, 0], others[:, 0], every_rank)
    metrics = {"prototypes/masked": pairs.sum() / max(1, len(own) * (len(others) - 1))}
    if labels.shape[1]:
        metrics["prototypes/mask_precision"] = _precision(pairs, own[:, 1], others)
    if studies is not None:
        pairs = pairs | _equal(own[:, 2], others[:, 2], every_rank)
    return Exclusion(pairs, metrics)


def _precision(pairs: Tensor, findings: Tensor, others: Tensor) -> Tensor:
    """Agreeing labelled pairs of this rank over the mean number of labelled pairs of the ranks, 0-d."""
    mine, theirs = findings[:, None], others[None, :, 1]
    agreeing = ((mine & theirs) != 0) | ((mine == 0) & (theirs == 0))
    labelled = (mine >= 0) & (theirs >= 0)
    # The gathered rows give the number of labelled pairs of all ranks without another collective.
    alike, known = others[:, 0], others[:, 1] >= 0
    total = ((alike[:, None] == alike[None]) & known[:, None] & known[None]).sum() - known.sum()
    return (pairs & agreeing & labelled).sum() / (total * (len(findings) / len(others)))
