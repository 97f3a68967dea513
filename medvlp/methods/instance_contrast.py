"""Whole images against whole reports: the contrast MGCA, MPMA and PLACE share."""

from torch import Tensor

from medvlp import distributed
from medvlp.losses.contrastive import ranked_contrast
from medvlp.losses.parts import MEMORY


def instance_contrast(
    image: Tensor,
    report: Tensor,
    temperature: float | Tensor,
    negatives: str,
    excluded: Tensor | None = None,
    memory: float = MEMORY,
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE in both directions, with the negatives of all ranks or of this one.

    Args:
        image, report: [B, D] unit-norm embeddings; row i belongs to row i, B is equal on all ranks.
        temperature: positive number or tensor of one element.
        negatives: "global" or "local".
        excluded: [B, N] bool, samples that are no negatives of each other in either direction, see
            `medvlp.prototypes.false_negatives.Exclusion`; None: all are.
        memory: MiB of logits that are made at once.

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
    to_reports = ranked_contrast(image, reports, temperature, offset, excluded, memory)
    to_images = ranked_contrast(report, images, temperature, offset, excluded, memory)
    hits = zip(("retrieval/top1", "retrieval/top5"), to_reports[1:], to_images[1:], strict=False)
    return to_reports[0] + to_images[0], {name: 0.5 * (first + second) for name, first, second in hits}
