"""The keys of the combination: a weight for each part, and the part's own keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medvlp.config import MethodConfig, key
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.prior.config import PRIORConfig


@dataclass
class CombinationConfig(MethodConfig):
    name: str = key("combination", "registered method; its own keys stand beside this one")
    mgca_weight: float = key(1.0, "factor of MGCA's loss; 0 leaves MGCA out", 0, 10**6)
    prior_weight: float = key(1.0, "factor of PRIOR's loss; 0 leaves PRIOR out", 0, 10**6)
    place_weight: float = key(1.0, "factor of PLACE's loss; 0 leaves PLACE out", 0, 10**6)
    embeds_with: Literal["mgca", "prior", "place"] = key(
        "mgca", "part whose embeddings, scores and maps are the method's"
    )
    mgca: MGCAConfig = field(default_factory=MGCAConfig)
    prior: PRIORConfig = field(default_factory=PRIORConfig)
    place: PLACEConfig = field(default_factory=PLACEConfig)
