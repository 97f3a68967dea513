"""PLACE's terms as functions of tensors: observations against sentences, and correlations of patches."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medvlp.losses.matching import match
from medvlp.losses.normalise import at_least_float32, unit_norm


class ObservationPairs(NamedTuple):
    """Sentences and what the image says to each.

    Attributes:
        image: [B, S, D] unit-norm observation of the image paired with each sentence.
        text: [B, S, D] unit-norm sentences.
        kept: [B, S] bool, sentences that have a pair.
    """

    image: Tensor
    text: Tensor
    kept: Tensor


def hungarian_pairs(observations: Tensor, sentences: Tensor, valid: Tensor) -> ObservationPairs:
    """Pair each sentence with an observation of its own so that the summed cosine is greatest.

    Args:
        observations: [B, M, D] unit-norm, of the image.
        sentences: [B, S, D] unit-norm. valid: [B, S] bool, slots that hold a sentence.

    Returns:
        The pairs; of more than M sentences the first M have one. No gradient flows through the choice.
    """
    chosen = match(-(observations @ sentences.transpose(1, 2)), valid)
    index = chosen.clamp(min=0)[:, :, None].expand(-1, -1, observations.shape[2])
    return ObservationPairs(observations.gather(1, index), sentences, chosen >= 0)


def soft_pairs(
    observations: Tensor, sentences: Tensor, valid: Tensor, temperature: float = 0.1
) -> ObservationPairs:
    """Pair each sentence with a mixture of the observations, weighted by how alike they are.

    Args:
        observations, sentences, valid: as in `hungarian_pairs`.
        temperature: of the softmax over the observations.

    Returns:
        The pairs; every valid sentence has one.
    """
    weights = (sentences @ observations.transpose(1, 2) / temperature).softmax(2)
    return ObservationPairs(unit_norm(weights @ observations), sentences, valid)


@torch.no_grad()
def alike(
    sentences: Tensor, others: Tensor, others_kept: Tensor, threshold: float = 0.9, share: float = 0.5
) -> Tensor:
    """Which candidates are worded much like which sentence, by features of the encoder.

    Never by the outputs of a head that the loss trains through these very pairs: were all of them equal, no
    negative would be left, and the loss would be 0. For the same reason never more than a share of them.

    Args:
        sentences: [..., N, D] features. others: [..., C, D] those of the candidates. Their mean over the
            candidates that exist is taken off: a text encoder's states have most of their length in common.
        others_kept: [..., C] bool, candidates that exist.
        threshold: of the cosine.
        share: of the existing candidates that a sentence can be alike to, those with the highest cosine.

    Returns:
        [..., N, C] bool.
    """
    kept = others_kept[..., None]
    values = at_least_float32(others)
    mean = (values * kept).sum(-2, keepdim=True) / kept.sum(-2, keepdim=True).clamp(min=1)
    own = unit_norm(at_least_float32(sentences) - mean)
    cosines = own @ unit_norm(values - mean).transpose(-1, -2)
    cosines = cosines.masked_fill(~others_kept[..., None, :], -torch.inf)
    # The cosine of the first candidate beyond the share: only greater ones are within it.
    beyond = (share * others_kept.sum(-1)).floor().long().clamp(max=others.shape[-2] - 1)
    ordered = cosines.sort(-1, descending=True).values
    index = beyond[..., None, None].expand(*ordered.shape[:-1], 1)
    return (cosines > threshold) & (cosines > ordered.gather(-1, index))


def observation_contrast(
    pairs: ObservationPairs,
    candidates: ObservationPairs,
    allowed: Tensor,
    own: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """InfoNCE between sentences and their observations, half of it in each direction.

    Args:
        pairs: N anchors with any leading dimensions: [..., N, D], [..., N, D], [..., N].
        candidates: C candidates for each, with the same leading dimensions.
        allowed: [..., N, C] bool, candidates that act as negatives.
        own: [N] position of each anchor among the candidates; its own pair always takes part.
        temperature: of the contrast.

    Returns:
        [..., N] loss of each anchor, 0 for those that are not kept. (PLACE's "pathological-level cross-modal
        alignment"; the paper's formula is not public, this form is our reconstruction.)
    """
    itself = torch.zeros_like(allowed).scatter(-1, own.expand(allowed.shape[:-1])[..., None], True)
    excluded = ~(allowed | itself)

    def direction(anchors: Tensor, others: Tensor) -> Tensor:
        logits = (anchors @ others.transpose(-1, -2) / temperature).masked_fill(excluded, -torch.inf)
        return logits.logsumexp(-1) - (anchors * others[..., own, :]).sum(-1) / temperature

    both = direction(pairs.text, candidates.image) + direction(pairs.image, candidates.text)
    return 0.5 * both * pairs.kept


def mean_of_reports(losses: Tensor, kept: Tensor) -> Tensor:
    """[B, S] losses of sentences -> 0-d mean over the kept ones of a report, then over reports.

    A report without any adds 0. So the mean over ranks with equally many reports is the global one.
    """
    return ((losses * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


def diversity_penalty(observations: Tensor) -> Tensor:
    """Mean squared cosine between different observations of an image, 0-d in [0, 1].

    Keeps the queries from all finding the same. (Our reconstruction.)

    Args:
        observations: [B, M, D] unit-norm; a single one has penalty 0.
    """
    count = observations.shape[1]
    squares = (observations @ observations.transpose(1, 2)).square()
    itself = torch.eye(count, dtype=torch.bool, device=observations.device)
    return squares.masked_fill(itself, 0.0).sum((1, 2)).mean() / max(1, count * (count - 1))


@torch.no_grad()
def pixel_correlation(image: Tensor, grid: tuple[int, int], flat: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Pearson correlation between the pixels of any two cells of a grid over the image.

    Args:
        image: [B, C, H, W], uint8, or floating point in [0, 1].
        grid: (rows, columns); a cell is the part of the image that one patch token or one pixel of a
            feature map stands for. Where the grid does not divide the image, or cells would have a side of
            one pixel, the image is enlarged (bilinear) to the next size at which they have at least two.
        flat: cells whose pixels have a standard deviation of at most this have no correlation (1/255 is one
            gray level).

    Returns:
        correlation [B, P, P] float32 or better in [-1, 1], 0 where a cell is flat; and usable [B, P] bool,
        cells that are not flat. P = rows * columns, row-major. (Our reconstruction of PLACE's target.)
    """
    values = image.float() / 255 if image.dtype == torch.uint8 else at_least_float32(image)
    (batch, channels), (rows, columns) = values.shape[:2], grid
    height, width = (max(2, -(-size // cells)) for size, cells in zip(values.shape[2:], grid, strict=True))
    if values.shape[2:] != (rows * height, columns * width):
        values = F.interpolate(
            values, size=(rows * height, columns * width), mode="bilinear", align_corners=False
        )
    cells = values.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    vectors = cells.reshape(batch, rows * columns, channels * height * width)
    centred = vectors - vectors.mean(2, keepdim=True)
    usable = centred.square().mean(2) > flat**2
    unit = unit_norm(centred) * usable[:, :, None]
    return unit @ unit.transpose(1, 2), usable


@torch.no_grad()
def feature_correlation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation between patch features, which are centred over the patches of their image.

    Args:
        features: [B, P, D] of a teacher; no gradient flows to them.

    Returns:
        As `pixel_correlation`; patches whose centred feature is only rounding are not usable.
    """
    values = at_least_float32(features)
    centred = values - values.mean(1, keepdim=True)
    usable = centred.abs().amax(2) > 1e-5 * values.abs().amax((1, 2))[:, None]
    unit = unit_norm(centred) * usable[:, :, None]
    return unit @ unit.transpose(1, 2), usable


def correlation_loss(tokens: Tensor, target: Tensor, usable: Tensor, huber: float | None = None) -> Tensor:
    """Mean error of the cosines between tokens as predictions of the correlations between patches.

    Args:
        tokens: [B, P, D], not normalised.
        target: [B, P, P] correlations in [-1, 1]. usable: [B, P] bool, patches that have one.
        huber: errors above this count linearly (Huber's loss, which is half the square below); None: the
            square.

    Returns:
        0-d loss: mean over the pairs i < j of usable patches of an image, then over images; an image
        without such a pair adds 0. (PLACE: our reconstruction of "patch-level covariance".)
    """
    unit = unit_norm(tokens)
    predicted = unit @ unit.transpose(1, 2)
    target = target.to(predicted.dtype)
    if huber is None:
        error = (predicted - target).square()
    else:
        error = F.huber_loss(predicted, target, reduction="none", delta=huber)
    pairs = (usable[:, :, None] & usable[:, None, :]).triu(1)
    total = (error * pairs).sum((1, 2))
    return (total / pairs.sum((1, 2)).clamp(min=1)).mean()
