"""Whole images against whole reports: the contrast MGCA, MPMA and PLACE share."""

from torch import Tensor

from medvlp import distributed
from medvlp.losses.contrastive import (
    are_accuracies_read,
    contrastive_logits,
    in_batch_accuracy,
    paired_cross_entropy,
)


def instance_contrast(
    image: Tensor,
    report: Tensor,
    temperature: float | Tensor,
    negatives: str,
    excluded: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE in both directions, with the negatives of all ranks or of this one.

    Args:
        image, report: [B, D] unit-norm embeddings; row i belongs to row i, B is equal on all ranks.
        temperature: positive number or tensor of one element.
        negatives: "global" or "local".
        excluded: [B, N] bool, samples that are no negatives of each other in either direction, see
            `medvlp.prototypes.false_negatives.Exclusion`; None: all are.

    Returns:
        The sum of both directions (0-d, mean over this rank's rows), and the in-batch accuracies
        "retrieval/top1" and "retrieval/top5", means of both directions in [0, 1], among all candidates
        ({} where nobody reads them).
    """
    if negatives == "global":
        images = distributed.gather_with_gradient(image)
        reports = distributed.gather_with_gradient(report)
        offset = distributed.rank() * image.shape[0]
    else:
        images, reports, offset = image, report, 0
    to_reports = contrastive_logits(image, reports, temperature)
    to_images = contrastive_logits(report, images, temperature)
    loss = paired_cross_entropy(to_reports, offset, excluded)
    loss = loss + paired_cross_entropy(to_images, offset, excluded)
    accuracies = {}
    for k in (1, 5) if are_accuracies_read() else ():
        hits = in_batch_accuracy(to_reports, offset, k) + in_batch_accuracy(to_images, offset, k)
        accuracies[f"retrieval/top{k}"] = 0.5 * hits
    return loss, accuracies
