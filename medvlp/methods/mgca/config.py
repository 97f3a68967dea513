"""The keys of MGCA; those that reproduce unsound behaviour of the published code say (published)."""

from dataclasses import dataclass
from typing import Literal

from medvlp.config import Config, ConfigError, MethodConfig, key


@dataclass
class MGCAConfig(MethodConfig):
    name: str = key("mgca", "registered method; its own keys stand beside this one")
    same_study: Literal["excluded", "negatives"] = key(
        "excluded", "images of one study: no negatives of each other, or some (published)"
    )
    embedding: int = key(128, "width of the shared embedding space", 1, 1 << 16)
    head_hidden: int = key(2048, "width of the middle layer of the projection heads", 1, 1 << 16)

    instance_weight: float = key(1.0, "factor of the image-report contrastive loss", 0, 10**6)
    token_weight: float = key(1.0, "factor of the word and patch losses", 0, 10**6)
    prototype_weight: float = key(1.0, "factor of the prototype loss", 0, 10**6)
    instance_temperature: float = key(0.07, "temperature of the image-report contrast", 1e-4, 100)
    token_temperature: float = key(0.1, "temperature of the contrast of words and of patches", 1e-4, 100)
    attention_temperature: float = key(
        0.1, "temperature of the attention between words and patches", 1e-4, 100
    )

    prototypes: int = key(500, "number of prototypes", 1, 1 << 22)
    prototype_source: Literal["learned", "clusters"] = key(
        "learned", "weights of the model, or clusters of the prototype service"
    )
    prototype_temperature: float = key(0.2, "temperature of the predicted prototype distributions", 1e-4, 100)
    sinkhorn_epsilon: float = key(0.05, "entropy regularisation of Sinkhorn; smaller is harder", 1e-4, 100)
    sinkhorn_iterations: int = key(3, "Sinkhorn rounds", 1, 10000)
    freeze_epochs: int = key(1, "first epochs in which learned prototypes stay as they are", 0, 10**6)

    word_weights: Literal["auto", "attention", "uniform"] = key(
        "auto", "weights of words; auto: [CLS] attention where the model has it, else uniform"
    )
    patch_weights: Literal["auto", "attention", "uniform"] = key(
        "auto", "weights of patches; auto: class-token attention where the model has it, else uniform"
    )
    weight_quantile: float = key(
        0.1, "attention weights are clamped to this quantile and its mirror image", 0, 0.5
    )

    normalise_patch_context: bool = key(True, "false: contexts of patches keep their length (published ViT)")
    separator_word: bool = key(False, "true: [SEP] is a word (published)")
    padding_negatives: bool = key(False, "true: empty word slots are negatives of the word loss (published)")
    padding_statistics: bool = key(False, "true: empty word slots enter batch-norm statistics (published)")
    attention_off_by_one: bool = key(False, "true: words take the next token's attention (published)")
    lost_last_word: bool = key(False, "true: reports cut at max_tokens lose their last word (published)")

    @property
    def embeds(self) -> bool:
        """Whether a loss shapes the embeddings of images and reports."""
        return self.instance_weight > 0 or self.prototype_weight > 0

    @property
    def clusters_are_prototypes(self) -> bool:
        """Whether the prototypes are clusters of the service."""
        return self.prototype_weight > 0 and self.prototype_source == "clusters"

    def check(self, config: Config) -> None:
        self.check_terms()
        if self.clusters_are_prototypes and self.instance_weight == self.token_weight == 0:
            raise ConfigError(
                "method.prototype_source=clusters with method.instance_weight=0 and method.token_weight=0 "
                "leaves no loss before the first refresh of the clusters: set one of the two above 0"
            )
        super().check(config)
        if config.prototypes.false_negatives == "mask" and self.instance_weight == 0:
            raise ConfigError(
                "prototypes.false_negatives=mask: method.instance_weight=0 switches off MGCA's only contrast "
                "between samples; set it above 0, or prototypes.false_negatives=keep"
            )

    def check_terms(self) -> None:
        """What holds for a part of a combination too (`ConfigError`)."""
        if self.instance_weight == self.token_weight == self.prototype_weight == 0:
            raise ConfigError(
                "no loss is left: set one of method.instance_weight, method.token_weight, "
                "method.prototype_weight above 0"
            )

    def embedding_need(self, config: Config) -> str | None:
        return None if self.embeds else "method.instance_weight or method.prototype_weight above 0"

    def sample_contrasts(self, config: Config) -> list[str]:
        return ["method.instance_weight"] if self.instance_weight > 0 else []

    def loss_changes(self, config: Config) -> str | None:
        if not self.clusters_are_prototypes:
            return None
        return "method.prototype_source=clusters adds the prototype loss at the first refresh"

    def service_clusters(self, config: Config) -> int | None:
        return self.prototypes if self.clusters_are_prototypes else super().service_clusters(config)
