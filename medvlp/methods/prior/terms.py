"""SimSiam: each of two views predicts the other, whose side gets no gradient."""

from __future__ import annotations

from torch import Tensor

from medvlp.losses.normalise import unit_norm


def negative_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Minus the cosine of each pair of vectors; the target gets no gradient.

    Args:
        predicted, target: [..., D]. A zero vector has cosine 0 with everything.

    Returns:
        [...] in [-1, 1].
    """
    return -(unit_norm(predicted) * unit_norm(target.detach())).sum(-1)


def simsiam(first: Tensor, second: Tensor, first_predicted: Tensor, second_predicted: Tensor) -> Tensor:
    """Symmetric SimSiam loss of each pair of vectors.

    Args:
        first, second: [..., D] the two views.
        first_predicted, second_predicted: [..., D] the predictor's outputs for them.

    Returns:
        [...] losses in [-1, 1]. (Chen & He 2021; PRIOR section 3.2 for patches and their contexts.)
    """
    both = negative_cosine(first_predicted, second) + negative_cosine(second_predicted, first)
    return 0.5 * both
