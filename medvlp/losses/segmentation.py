"""Losses and metric of binary segmentation as MGCA trains it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.normalise import at_least_float32


def focal_loss(logits: Tensor, masks: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy of every pixel times (1 - probability of the truth) ** gamma, averaged.

    Args:
        logits: pixels of any shape; masks: the same shape, 0 or 1.
        gamma: how much well classified pixels count less.

    Returns:
        0-d loss. (Lin et al. 2017, without class weight.)
    """
    logits, masks = at_least_float32(logits), at_least_float32(masks)
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    # log of the probability that the prediction is wrong, stable for large logits
    wrong = F.logsigmoid(-logits * (2 * masks - 1))
    return ((gamma * wrong).exp() * entropy).mean()


def soft_dice(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """Dice coefficient of probabilities over the whole batch as one set of pixels, in (0, 1]; a 0-d tensor.

    Args:
        logits, masks: as in `focal_loss`.
        smooth: added to numerator and denominator.
    """
    probability, masks = at_least_float32(logits).sigmoid(), at_least_float32(masks)
    overlap = (probability * masks).sum()
    return (2 * overlap + smooth) / (probability.sum() + masks.sum() + smooth)


def mixed_loss(logits: Tensor, masks: Tensor, alpha: float = 10.0, gamma: float = 2.0) -> Tensor:
    """alpha * focal loss - log(soft Dice); a 0-d tensor. (MGCA's published segmentation loss.)"""
    return alpha * focal_loss(logits, masks, gamma) - soft_dice(logits, masks).log()


@torch.no_grad()
def dice_score(logits: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Mean over images of the Dice coefficient of thresholded predictions, in [0, 1]; a 0-d tensor.

    An image with an empty mask scores 1 when nothing is predicted and 0 otherwise.

    Args:
        logits, masks: [B, ...]; threshold: on probabilities and masks.
    """
    predicted = (logits.sigmoid() > threshold).flatten(1)
    truth = (masks > threshold).flatten(1)
    size = predicted.sum(1) + truth.sum(1)
    dice = 2 * (predicted & truth).sum(1) / size.clamp(min=1)
    return torch.where(truth.any(1), dice, (size == 0).to(dice.dtype)).mean()
