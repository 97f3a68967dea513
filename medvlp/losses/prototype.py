"""Cross-modal prototype loss: each modality predicts the other's assignment."""

from __future__ import annotations

from torch import Tensor

from medvlp.losses.normalise import at_least_float32


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum_k targets[k] * log softmax(logits)[k].

    Args:
        logits: [B, K].
        targets: [B, K] probabilities, rows sum to 1; no gradient flows to them.

    Returns:
        0-d loss.
    """
    return -(targets.detach() * at_least_float32(logits).log_softmax(1)).sum(1).mean()


def swapped_prediction(
    image_scores: Tensor,
    text_scores: Tensor,
    image_codes: Tensor,
    text_codes: Tensor,
    temperature: float = 0.2,
) -> Tensor:
    """Half the sum of: texts predict the images' codes, images predict the texts' codes.

    Args:
        image_scores, text_scores: [B, K] cosine similarities with the prototypes.
        image_codes, text_codes: [B, K] assignments of the same samples.
        temperature: of the predicted distributions.

    Returns:
        0-d loss. (MGCA section 3.3, eq. 8 with the minus sign the paper lacks.)
    """
    text_to_image = soft_cross_entropy(text_scores / temperature, image_codes)
    image_to_text = soft_cross_entropy(image_scores / temperature, text_codes)
    return 0.5 * (text_to_image + image_to_text)


def score_divergence(target_scores: Tensor, scores: Tensor) -> Tensor:
    """KL(p || q) of each row, p = softmax(target_scores) and q = softmax(scores); both sides get gradient.

    Args:
        target_scores, scores: [..., K].

    Returns:
        [...] divergences in nats, at least 0. (The "kl" loss of PRIOR's published code.)
    """
    target = at_least_float32(target_scores).log_softmax(-1)
    predicted = at_least_float32(scores).log_softmax(-1)
    return (target.exp() * (target - predicted)).sum(-1)
