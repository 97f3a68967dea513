"""Figures of losses alone, at published sizes and with inputs of no meaning: milliseconds and memory."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp import distributed
from medvlp.losses.contrastive import ranked_contrast
from medvlp.losses.matching import match
from medvlp.losses.parts import parts_of, sums_in_parts
from medvlp.losses.sinkhorn import sinkhorn
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.mgca.losses import MGCALosses, MGCATokens
from medvlp.methods.mpma.losses import masked_token_loss
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.losses import Sentences, observation_terms
from medvlp.methods.prior.terms import reorder, set_distance
from tests.cuda.figures import measure
from tests.cuda.place import Place, free_memory
from tests.cuda.runner import Note

#: Ranks whose candidates a contrast sees.
RANKS = 4


def losses(place: Place, note: Note) -> None:
    """Milliseconds forward and backward of loss heads alone, and the memory they take beside their inputs."""
    free_memory(place.device)
    for name, make in HEADS.items():
        action = make(_Inputs(place))
        given = torch.cuda.memory_allocated() >> 20 if place.device.type == "cuda" else 0
        found = measure(action, place)
        note(name, {"milliseconds": 1e3 * found.seconds, "peak_mib": found.allocated - given})


class _Inputs:
    """Seeded unit vectors, on the device; small ones on a dry run."""

    def __init__(self, place: Place) -> None:
        self.device, self.dry = place.device, place.dry
        self.rows = 8 if place.dry else 256
        self._generator = torch.Generator().manual_seed(0)

    def unit(self, *shape: int) -> Tensor:
        made = torch.randn(*shape, generator=self._generator).to(self.device)
        return F.normalize(made, dim=-1).requires_grad_()

    def all(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool, device=self.device)


def _instance(inputs: _Inputs) -> Callable[[], object]:
    image, text = (inputs.unit(inputs.rows, 128) for _ in range(2))
    images, texts = (inputs.unit(32 * inputs.rows, 128) for _ in range(2))

    def run() -> None:
        both = ranked_contrast(image, texts, 0.07)[0] + ranked_contrast(text, images, 0.07)[0]
        both.backward()

    return run


def _tokens(inputs: _Inputs) -> Callable[[], object]:
    patches, words = inputs.unit(inputs.rows, 196, 128), inputs.unit(inputs.rows, 111, 128)
    objective = MGCALosses(MGCAConfig(name="mgca", prototype_weight=0))
    tokens = MGCATokens(patches, words, inputs.all(inputs.rows, 111))

    def run() -> None:
        terms = objective.tokens(tokens)
        (terms["loss/word"] + terms["loss/patch"]).backward()

    return run


def _sinkhorn(inputs: _Inputs) -> Callable[[], object]:
    scores = inputs.unit(inputs.rows, 500).detach()
    return lambda: sinkhorn(scores)


def _observations(inputs: _Inputs) -> Callable[[], object]:
    """Softly matched, against the sentences of four ranks; the other ranks' are copies of this one's."""
    config, slots = PLACEConfig(name="place", false_negatives="keep"), 16
    observations, sentences = (inputs.unit(inputs.rows, slots, 128) for _ in range(2))
    valid = inputs.all(inputs.rows, slots)
    said = Sentences(sentences, valid, torch.arange(valid.numel(), device=inputs.device).view_as(valid))

    def everyone(values: Tensor) -> Tensor:
        return torch.cat([values] * RANKS)

    def run() -> None:
        with mock.patch.multiple(distributed, gather_with_gradient=everyone, gather_rows=everyone):
            observation_terms(observations, said, True, config)["loss/observation"].backward()

    return run


def _words(inputs: _Inputs) -> Callable[[], object]:
    """What MPMA asks its vocabulary: of hidden words alone, half of 112 tokens, in parts."""
    width, words, places = (32, 60, 8) if inputs.dry else (768, 28_996, 56)
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, words))
    head.to(inputs.device, torch.bfloat16)
    tokens = inputs.unit(inputs.rows * places, width).detach().bfloat16().requires_grad_()
    true, scored = torch.arange(len(tokens), device=inputs.device) % words, inputs.all(len(tokens))
    count = scored.sum().float()

    def part(chosen: Tensor, true: Tensor, scored: Tensor) -> tuple[Tensor, ...]:
        return (masked_token_loss(head(chosen), true, scored, count),)

    number = len(parts_of(len(tokens), words))
    return lambda: sums_in_parts(part, (tokens, true, scored), number)[0].backward()


def _sets(inputs: _Inputs) -> Callable[[], object]:
    predicted, target = (inputs.unit(inputs.rows, 16, 768) for _ in range(2))
    return lambda: set_distance(reorder(predicted, target), target.detach()).mean().backward()


def _matching(inputs: _Inputs) -> Callable[[], object]:
    costs, valid = inputs.unit(inputs.rows, 16, 16).detach(), inputs.all(inputs.rows, 16)
    return lambda: match(costs, valid)


HEADS: dict[str, Callable[[_Inputs], Callable[[], object]]] = {
    "instance contrast, 8,192 candidates": _instance,
    "MGCA's tokens": _tokens,
    "sinkhorn of 500 prototypes": _sinkhorn,
    "PLACE's observations, 16,384 candidates": _observations,
    "MPMA's words": _words,
    "PRIOR's sentences, matched": _sets,
    "of that the matching, for which a step waits": _matching,
}
