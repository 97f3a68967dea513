"""The keys of PLACE. Only the paper's abstract is public: every number here is our choice."""

from dataclasses import dataclass
from typing import Literal

from medvlp.config import Config, ConfigError, MethodConfig, key


@dataclass
class PLACEConfig(MethodConfig):
    name: str = key("place", "registered method; its own keys stand beside this one")
    embedding: int = key(128, "width of the shared embedding space", 1, 1 << 16)
    head_hidden: int = key(2048, "width of the middle layer of the projection heads", 1, 1 << 16)
    report_pool: Literal["cls", "attention"] = key(
        "cls", "report embedding: the first token, or an attention pool over all tokens"
    )

    instance_weight: float = key(1.0, "factor of the image-report contrastive loss", 0, 10**6)
    observation_weight: float = key(1.0, "factor of the contrast of observations and sentences", 0, 10**6)
    correlation_weight: float = key(1.0, "factor of the loss of predicted patch correlations", 0, 10**6)
    diversity_weight: float = key(
        0.01, "factor of the penalty on equal observations; needs observation_weight above 0", 0, 10**6
    )
    token_weight: float = key(0.0, "factor of MGCA's word and patch losses", 0, 10**6)
    instance_temperature: float = key(0.07, "temperature of the image-report contrast", 1e-4, 100)
    observation_temperature: float = key(0.1, "temperature of the contrast of observations", 1e-4, 100)
    token_temperature: float = key(0.1, "temperature of the contrast of words and of patches", 1e-4, 100)
    attention_temperature: float = key(
        0.1, "temperature of the attention between words and patches", 1e-4, 100
    )

    queries: int = key(16, "number of pathology query tokens", 1, 4096)
    decoder_width: int = key(768, "width of the query decoder and of the correlation branch", 4, 1 << 16)
    decoder_heads: int = key(12, "attention heads of both; must divide decoder_width", 1, 1024)
    query_layers: int = key(3, "layers of the query decoder", 1, 1024)
    patch_positions: bool = key(True, "the query decoder sees fixed sin-cos positions of the patches")

    max_sentences: int = key(16, "sentences of a report that are used; later ones are left out", 1, 4096)
    matching: Literal["hungarian", "soft"] = key(
        "hungarian", "how sentences get their observation: one each, or a mixture of all"
    )
    soft_epochs: int = key(
        1, "first epochs that train with soft matching, whatever `matching` says", 0, 10**6
    )
    assignment_temperature: float = key(0.1, "temperature of soft matching", 1e-4, 100)
    negative_scope: Literal["batch", "report"] = key(
        "batch",
        "observations and sentences that are negatives: of the batch (see `negatives`) or of one report",
    )
    false_negatives: Literal["tokens", "features", "keep"] = key(
        "tokens",
        "sentences that are no negatives of each other: of equal tokens; features: also those the text "
        "encoder finds alike; keep: none",
    )
    false_negative_threshold: float = key(
        0.9, "features: cosine above which two sentences are alike, their mean taken off", -1, 1
    )
    false_negative_share: float = key(
        0.5, "features: largest share of the other sentences that one can be alike to", 0, 1
    )

    correlation_layers: int = key(1, "cross-attention layers from patches to words", 1, 1024)
    correlation_target: Literal["pixels", "teacher"] = key(
        "pixels", "correlations to predict: of the patches' pixels, or of their features by a slow teacher"
    )
    teacher_momentum: float = key(0.996, "share of the teacher that stays at each step", 0, 1)
    huber_delta: float = key(0.0, "Huber's threshold of correlation errors; 0: the squared error", 0, 2)
    patch_drop: float = key(
        0.5, "share of patches the correlation branch has to infer; 0: it can read all off the image", 0, 1
    )

    observation_score: float = key(
        0.0, "factor of the best observation's cosine in zero-shot scores; 0: embeddings alone", 0, 10**6
    )
    grounding: Literal["observation", "patch"] = key(
        "observation",
        "map of a prompt: attention of its best observation, or patch similarity (needs token_weight)",
    )

    @property
    def embeds(self) -> bool:
        """Whether a loss shapes the embeddings of images and reports."""
        return self.instance_weight > 0

    def check(self, config: Config) -> None:
        self.check_terms()
        super().check(config)

    def check_terms(self) -> None:
        """What holds for a part of a combination too (`ConfigError`)."""
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ConfigError(
                f"method.decoder_width={self.decoder_width} must be a multiple of 4 and of "
                f"method.decoder_heads={self.decoder_heads}"
            )
        weights = ("instance_weight", "observation_weight", "correlation_weight", "token_weight")
        if not any(getattr(self, name) > 0 for name in weights):
            raise ConfigError(f"no loss is left: set one of method.{', method.'.join(weights)} above 0")
        if self.observation_score > 0 and self.observation_weight == 0:
            raise ConfigError("method.observation_score needs method.observation_weight above 0")
        if self.grounding == "patch" and self.token_weight == 0:
            raise ConfigError("method.grounding=patch needs method.token_weight above 0")

    def embedding_need(self, config: Config) -> str | None:
        return None if self.embeds else "method.instance_weight above 0"

    def training_loss_changes(self, config: Config) -> str | None:
        if self.matching == "soft" or self.soft_epochs == 0 or self.observation_weight == 0:
            return None
        return f"method.matching={self.matching} begins after method.soft_epochs={self.soft_epochs}"

    def sample_contrasts(self, config: Config) -> list[str]:
        return ["method.instance_weight"] if self.instance_weight > 0 else []
