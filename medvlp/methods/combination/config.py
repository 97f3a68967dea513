"""The keys of the combination: a weight for each part, and the part's own keys."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from medvlp.config import Config, ConfigError, MethodConfig, key
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

    @property
    def weights(self) -> dict[str, float]:
        """Part -> factor of its loss, of the parts that have one above 0."""
        weights = {"mgca": self.mgca_weight, "prior": self.prior_weight, "place": self.place_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def clustered(self) -> MethodConfig:
        """The part whose embeddings the service clusters: MGCA where clusters are its prototypes."""
        if "mgca" in self.weights and self.mgca.clusters_are_prototypes:
            return self.mgca
        parts: dict[str, MethodConfig] = {"mgca": self.mgca, "prior": self.prior, "place": self.place}
        return parts[self.embeds_with]

    @property
    def reads_pooled(self) -> bool:
        """Whether a part with a weight reads the images' pooled feature."""
        return any(part in self.weights and getattr(self, part).embeds for part in ("mgca", "place"))

    def check(self, config: Config) -> None:
        if self.embeds_with not in self.weights:
            raise ConfigError(
                f"method.embeds_with={self.embeds_with}, but method.{self.embeds_with}_weight is 0"
            )
        staged = bool(config.optimizer.phases)
        for name in self.weights:
            try:
                if name == "prior":
                    self.prior.check_terms(staged)
                    self.prior.check_start(config)
                else:
                    (self.mgca if name == "mgca" else self.place).check_terms()
            except ConfigError as error:
                raise ConfigError(str(error).replace("method.", f"method.{name}.")) from error
        if config.prototypes.anchors and self.clustered is self.mgca and self.embeds_with != "mgca":
            raise ConfigError(
                "prototypes.anchors are embedded as the method's texts, but "
                "method.mgca.prototype_source=clusters has MGCA's embeddings clustered, not those of "
                f"method.embeds_with={self.embeds_with}"
            )
        super().check(config)

    def loss_changes(self, config: Config) -> str | None:
        return self._first(lambda part: part.loss_changes(config))

    def training_loss_changes(self, config: Config) -> str | None:
        return self._first(lambda part: part.training_loss_changes(config))

    def _first(self, ask: Callable[[MethodConfig], str | None]) -> str | None:
        """The first answer of a part, with its keys as they are named here."""
        answers = ((name, ask(getattr(self, name))) for name in self.weights)
        return next((why.replace("method.", f"method.{name}.") for name, why in answers if why), None)

    def sample_contrasts(self, config: Config) -> list[str]:
        found = []
        for name in self.weights:
            part: MethodConfig = getattr(self, name)
            found += [key.replace("method.", f"method.{name}.") for key in part.sample_contrasts(config)]
        return found

    def embedding_need(self, config: Config) -> str | None:
        need = self.clustered.embedding_need(config)
        return None if need is None else need.replace("method.", f"method.{self.clustered.name}.")

    def service_clusters(self, config: Config) -> int | None:
        return self.clustered.service_clusters(config)
