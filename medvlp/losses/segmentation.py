"""Losses of segmentation into masks that may overlap, one logit a pixel and mask: published ones, and ours.

A published soft Dice is one ratio over all pixels of the batch, so that such a loss depends on which images
are in a micro-batch; `per_image_loss` does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.normalise import at_least_float32


def focal_loss(logits: Tensor, masks: Tensor, gamma: float = 2.0, known: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every pixel times (1 - probability of the truth) ** gamma, averaged.

    Args:
        logits: pixels of any shape; masks: the same shape, 0 or 1.
        gamma: how much well classified pixels count less.
        known: bool, of a shape that broadcasts to theirs: the pixels that count; None: all. Without one that
            does, losses are 0.

    Returns:
        0-d loss. (Lin et al. 2017, without class weight.)
    """
    logits, masks = at_least_float32(logits), at_least_float32(masks)
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    # log of the probability that the prediction is wrong, stable for large logits
    wrong = F.logsigmoid(-logits * (2 * masks - 1))
    return _mean((gamma * wrong).exp() * entropy, known)


def soft_dice(logits: Tensor, masks: Tensor, smooth: float = 1.0, known: Tensor | None = None) -> Tensor:
    """Dice coefficient of probabilities over the whole batch as one set of pixels, in (0, 1]; a 0-d tensor.

    Args:
        logits, masks, known: as in `focal_loss`.
        smooth: added to numerator and denominator.
    """
    probability, masks = at_least_float32(logits).sigmoid(), at_least_float32(masks)
    if known is not None:
        probability, masks = torch.where(known, probability, 0.0), torch.where(known, masks, 0.0)
    overlap = (probability * masks).sum()
    return (2 * overlap + smooth) / (probability.sum() + masks.sum() + smooth)


def mixed_loss(
    logits: Tensor, masks: Tensor, alpha: float = 10.0, gamma: float = 2.0, known: Tensor | None = None
) -> Tensor:
    """alpha * focal loss - log(soft Dice); a 0-d tensor. (MGCA's published segmentation loss.)"""
    return alpha * focal_loss(logits, masks, gamma, known) - soft_dice(logits, masks, known=known).log()


def dice_cross_entropy(logits: Tensor, masks: Tensor, known: Tensor | None = None) -> Tensor:
    """Cross-entropy averaged over pixels + 1 - soft Dice; a 0-d tensor. (MedKLIP's and MeDSLIP's loss.)"""
    logits, masks = at_least_float32(logits), at_least_float32(masks)
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return _mean(entropy, known) + 1 - soft_dice(logits, masks, known=known)


def per_image_loss(logits: Tensor, masks: Tensor, known: Tensor, focal: float = 10.0) -> Tensor:
    """focal * focal loss, + 1 - soft Dice where the mask is not empty, of every image and mask by itself.

    The soft Dice of an empty mask is 1 / (1 + sum of probabilities): over the pixels of an image it is flat
    near 0 until nothing at all is called. Whether leaving it out helps rare findings is not measured.

    The sum over known pairs is divided by the number of all pairs, so that the mean over micro-batches or
    ranks of one size is the loss of their images together.

    Args:
        logits: [B, C, H, W]. masks: the same shape, 0 or 1; any value where nothing is known.
        known: [B, C] bool, whether it is known where in the image the finding is.
        focal: weight of the focal loss.

    Returns:
        0-d loss.
    """
    logits = at_least_float32(logits)
    truth = torch.where(known[..., None, None], masks.to(logits.dtype), 0.0)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    wrong = F.logsigmoid(-logits * (2 * truth - 1))
    focused = ((2 * wrong).exp() * entropy).mean((2, 3))
    probability = logits.sigmoid()
    shared = (probability * truth).sum((2, 3))
    dice = (2 * shared + 1) / (probability.sum((2, 3)) + truth.sum((2, 3)) + 1)
    missed = torch.where(truth.flatten(2).any(2), 1 - dice, 0.0)
    return torch.where(known, focal * focused + missed, 0.0).mean()


def _mean(values: Tensor, known: Tensor | None) -> Tensor:
    """Mean of the values that are known, by weights: to choose them would wait for the device."""
    if known is None:
        return values.mean()
    counted = known.expand_as(values)
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)
