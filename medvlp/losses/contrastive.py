"""Contrastive loss of paired embeddings and the retrieval accuracy inside a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.parts import MEMORY, mean_in_parts

_read: ContextVar[bool] = ContextVar("read", default=True)


@contextmanager
def accuracies_read(read: bool) -> Iterator[None]:
    """Inside, whether anybody reads accuracies: they cost a pass over all logits in every step."""
    before = _read.set(read)
    try:
        yield
    finally:
        _read.reset(before)


def are_accuracies_read() -> bool:
    """Whether losses return accuracies beside their value, see `accuracies_read`."""
    return _read.get()


def contrastive_logits(local: Tensor, gathered: Tensor, temperature: float | Tensor) -> Tensor:
    """Cosine similarities of this rank's rows with every candidate, over the temperature.

    Args:
        local: [b, D] unit-norm embeddings of one modality on this rank.
        gathered: [B, D] unit-norm embeddings of the other modality on all ranks, in rank order.
        temperature: positive number or 0-d tensor.

    Returns:
        [b, B] logits.
    """
    return local @ gathered.T / temperature


def paired_cross_entropy(logits: Tensor, offset: int = 0, excluded: Tensor | None = None) -> Tensor:
    """InfoNCE of one direction: mean over rows i of -log softmax(logits[i])[offset + i].

    Args:
        logits: [b, B], row i belongs to column offset + i.
        offset: first column of this rank (rank * b).
        excluded: [b, B] bool, columns that are no negatives of a row; its own column always takes part. A row
            whose other columns are all excluded has loss and gradient 0. None: all are negatives.

    Returns:
        0-d loss. (ConVIRT, CLIP; MGCA section 3.1 "instance-wise alignment".)
    """
    labels = torch.arange(logits.shape[0], device=logits.device) + offset
    if excluded is not None:
        excluded = excluded.scatter(1, labels[:, None], False)
        logits = logits.masked_fill(excluded, -torch.inf)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def in_batch_accuracy(logits: Tensor, offset: int = 0, k: int = 1) -> Tensor:
    """Share of rows with fewer than k columns above their own, in [0, 1]; a 0-d tensor.

    Args:
        logits: [b, B]; offset: as in `paired_cross_entropy`.
        k: rank up to which a hit counts; more than B counts as B.
    """
    labels = torch.arange(logits.shape[0], device=logits.device) + offset
    own = logits.gather(1, labels[:, None])
    # One pass instead of a sort; a row with NaN counts as a miss.
    return ((~(logits <= own)).sum(1) < k).float().mean()


def ranked_contrast(
    local: Tensor,
    gathered: Tensor,
    temperature: float | Tensor,
    offset: int = 0,
    excluded: Tensor | None = None,
    memory: float = MEMORY,
) -> tuple[Tensor, ...]:
    """One direction of InfoNCE and its accuracies, in parts of rows if the logits take more than `memory`.

    Args:
        local, gathered, temperature: see `contrastive_logits`.
        offset, excluded: see `paired_cross_entropy`.
        memory: MiB of logits made at once.

    Returns:
        `paired_cross_entropy`, and, where they are read (`accuracies_read`), `in_batch_accuracy` at 1 and at
        5, 0-d each.
    """
    asked = (1, 5) if are_accuracies_read() else ()  # here: parts run again in the backward pass

    def part(start: int, rows: Tensor, left_out: Tensor | None) -> tuple[Tensor, ...]:
        logits = contrastive_logits(rows, gathered, temperature)
        loss = paired_cross_entropy(logits, offset + start, left_out)
        return loss, *(in_batch_accuracy(logits, offset + start, k) for k in asked)

    return mean_in_parts(part, (local, excluded), len(gathered), memory)
