"""The keys of MPMA. None of the paper's numbers is public: every default is ours or a relative's."""

from dataclasses import dataclass
from typing import Literal

from medvlp.config import Config, ConfigError, MethodConfig, key


@dataclass
class MPMAConfig(MethodConfig):
    name: str = key("mpma", "registered method; its own keys stand beside this one")
    embedding: int = key(256, "width of the shared embedding space", 1, 1 << 16)
    head_hidden: int = key(768, "width of the middle layer of the global heads", 1, 1 << 16)
    head: Literal["mlp", "batch_norm"] = key(
        "batch_norm", "global heads: Linear-GELU-Linear, or with batch norms as MGCA's (learns from scratch)"
    )

    image_weight: float = key(1.0, "factor of the reconstruction of hidden patches", 0, 10**6)
    report_weight: float = key(1.0, "factor of the reconstruction of hidden words", 0, 10**6)
    global_weight: float = key(
        1.0, "factor of the image-report contrast; 0 with local_weight 0: no GLA", 0, 10**6
    )
    local_weight: float = key(1.0, "factor of the alignment of patches and words", 0, 10**6)

    masking: Literal["paired", "separate"] = key(
        "paired",
        "paired: one masked pair for every task; separate: each reconstruction sees the other modality whole",
    )
    image_mask_ratio: float = key(0.75, "share of hidden patches (MRM, M3AE)", 0, 0.99)
    text_mask_ratio: float = key(0.5, "share of hidden words (MRM; M3AE: 0.15)", 0, 1)
    mask_token: int | None = key(
        None,
        "token whose embedding the learned mask embedding starts from; default: the mean of all",
        0,
        1 << 24,
    )

    temperature: float = key(0.07, "temperature the image-report contrast starts from", 1e-4, 100)
    temperature_min: float = key(0.01, "lower bound of the learned temperature", 1e-4, 100)
    temperature_max: float = key(0.5, "upper bound of the learned temperature", 1e-4, 100)
    token_temperature: float = key(0.1, "temperature of the contrast of words and of patches", 1e-4, 100)
    attention_temperature: float = key(
        0.1, "temperature of the attention between words and patches", 1e-4, 100
    )
    summary: Literal["cls", "mean"] = key(
        "cls", "what the global heads read: the pooled feature and [CLS], or the mean of the visible tokens"
    )
    project_first: bool = key(
        False, "with summary=mean: the heads project every token, and the mean is of the projections"
    )
    calibration_steps: int = key(
        8,
        "steps between passes over whole pairs, which alone move the running averages of batch-norm heads "
        "(training sees masked pairs, evaluation whole ones)",
        1,
        10**6,
    )

    fixed_positions: bool = key(True, "fixed 2-D sin-cos positions in the image encoder, as in MAE's weights")
    fusion_layers: int = key(4, "layers in which the report reads the image", 1, 1024)
    fusion_heads: int = key(12, "attention heads of these layers", 1, 1024)
    fusion_hidden: int = key(3072, "width of their feed-forward part", 1, 1 << 16)
    fusion_dropout: float = key(0.1, "their dropout", 0, 1)
    memory: Literal["slots", "retrieval", "none"] = key(
        "slots",
        "slots beside keys and values; retrieval from one matrix; none: plain cross-attention (no MA-CMF)",
    )
    memory_slots: int = key(
        64, "memory slots of each layer, or rows of the matrix (R2Gen-CMN: 2048)", 1, 1 << 20
    )
    memory_highest: int = key(32, "rows a token reads with memory=retrieval", 1, 1 << 20)
    tie_words: bool = key(False, "the report head's last layer is the text encoder's embedding")

    decoder_width: int = key(512, "width of the image decoder", 4, 1 << 16)
    decoder_layers: int = key(8, "layers of the image decoder", 1, 1024)
    decoder_heads: int = key(16, "attention heads of the image decoder", 1, 1024)
    decoder_reads_report: bool = key(False, "the image decoder also attends to the report")
    normalise_pixels: bool = key(True, "reconstruct pixels normalised in each patch")

    def check(self, config: Config) -> None:
        if not (self.image_weight or self.report_weight or self.global_weight or self.local_weight):
            raise ConfigError("method.image_weight, report_weight, global_weight and local_weight are all 0")
        for weight, ratio in (("image_weight", "image_mask_ratio"), ("report_weight", "text_mask_ratio")):
            if getattr(self, weight) and not getattr(self, ratio):
                raise ConfigError(
                    f"method.{ratio}=0 hides nothing, so nothing is left to reconstruct: set it above 0, or "
                    f"method.{weight}=0"
                )
        if not self.temperature_min < self.temperature < self.temperature_max:
            raise ConfigError(
                f"method.temperature={self.temperature} must lie between method.temperature_min="
                f"{self.temperature_min} and method.temperature_max={self.temperature_max}"
            )
        if self.project_first and self.summary != "mean":
            raise ConfigError("method.project_first=true projects tokens for a mean: set method.summary=mean")
        if self.image_weight and (self.decoder_width % self.decoder_heads or self.decoder_width % 4):
            raise ConfigError(
                f"method.decoder_width={self.decoder_width} must be a multiple of 4 and of "
                f"method.decoder_heads={self.decoder_heads}"
            )
        super().check(config)

    def embedding_need(self, config: Config) -> str | None:
        return None if self.global_weight else "method.global_weight above 0"

    def sample_contrasts(self, config: Config) -> list[str]:
        return ["method.global_weight"] if self.global_weight > 0 else []
