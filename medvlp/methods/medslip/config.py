"""The keys of MeDSLIP; those that reproduce the published code where ours differs say (published)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medvlp.config import Config, ConfigError, MethodConfig, key


@dataclass
class MeDSLIPConfig(MethodConfig):
    name: str = key("medslip", "registered method; its own keys stand beside this one")
    width: int = key(256, "width of both streams, their queries and decoders", 4, 1 << 16)
    layers: int = key(4, "layers of each query decoder", 1, 1024)
    heads: int = key(4, "attention heads of the decoders", 1, 1024)
    expansion: int = key(4, "middle width of the decoders' feed-forward parts over width", 1, 64)
    dropout: float = key(0.1, "dropout of the decoders and of their outputs before the heads", 0, 0.99)
    shared_norm: bool = key(False, "true: one final norm for both decoders (published)")
    gate: Literal["sigmoid", "linear"] = key(
        "sigmoid", "how the gate between the streams is bounded; linear: not at all (published)"
    )
    positions: Literal["none", "sine"] = key(
        "none", "sine: fixed 2-D positions on the image tokens (a CNN's carry few of their own)"
    )
    initialisation: Literal["scaled", "normal"] = key(
        "scaled", "scaled: by the width of each layer's input; normal: deviation 0.02 (published)"
    )

    existence_weight: float = key(1.0, "factor of the existence losses", 0, 10**6)
    prototype_weight: float = key(1.0, "factor of the prototype losses (the paper's alpha)", 0, 10**6)
    relation_weight: float = key(
        1.0, "factor of the anatomy-observation relation loss (the paper's beta)", 0, 10**6
    )
    prototype_negatives: int = key(
        7, "texts drawn against each prototype; fewer where there are fewer", 1, 1 << 16
    )
    prototype_normalise: bool = key(True, "cosines in the prototype losses; false: dot products (published)")
    prototype_temperature: float = key(0.1, "temperature of the prototype losses; 1: published", 1e-4, 100)
    relation_scale: Literal["root", "one", "learned"] = key(
        "root", "factor of the relation's dot products: width**-0.5, learned from there, or one (published)"
    )

    text_pooling: Literal["first", "mean"] = key(
        "first", "text embedding: the first token's hidden state, or the mean over the tokens"
    )
    standardise_book: bool = key(
        True,
        "each vocabulary's texts minus their mean, at unit variance; false: as they are (published)",
    )
    ground_by_anatomy: bool = key(
        False, "grounding: multiply a prompt's attention with that of every anatomy and average"
    )

    embeds_reports: ClassVar[bool] = False

    def check(self, config: Config) -> None:
        if not config.text.frozen:
            raise ConfigError("method.name=medslip: its text encoder is never trained; set text.frozen=true")
        if self.existence_weight == self.prototype_weight == self.relation_weight == 0:
            raise ConfigError(
                "no loss is left: set one of method.existence_weight, method.prototype_weight, "
                "method.relation_weight above 0"
            )
        if self.width % self.heads:
            raise ConfigError(f"method.width={self.width} does not divide into method.heads={self.heads}")
        super().check(config)

    def embedding_need(self, config: Config) -> str | None:
        return None  # the streams are trained by every loss
