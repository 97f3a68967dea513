"""The keys of PRIOR; those that reproduce unsound behaviour of the published code say (published)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medvlp.config import Config, ConfigError, MethodConfig, key

#: Stages of the training, from 1.
STAGES = 3
#: Terms that need sentences from the bank whatever the stage.
BANKED = {"bank", "sentence", "score", "generated"}
#: Terms that need generated sentences.
GENERATED = {"sentence", "score", "generated"}


@dataclass
class PRIORConfig(MethodConfig):
    name: str = key("prior", "registered method; its own keys stand beside this one")
    embedding: int = key(768, "width of the shared embedding space", 1, 1 << 16)
    pool_heads: int = key(8, "heads of the attention pools of images and reports", 1, 1024)
    head_norm: Literal["none", "batch"] = key(
        "none", "batch: projections and reports end in a batch norm; for encoders without published weights"
    )
    stage: int = key(3, "stage of the whole run; with optimizer.phases, phase i is stage i", 1, STAGES)

    global_weights: list[float] = key(
        [1.0, 1.0, 10.0], "image-report contrast: factor in each stage", 0, 1e6, (STAGES, STAGES)
    )
    local_image_weights: list[float] = key(
        [1.0, 1.0, 1.0], "patches and their contexts: factors", 0, 1e6, (STAGES, STAGES)
    )
    local_text_weights: list[float] = key(
        [1.0, 1.0, 1.0], "sentences and their contexts: factors", 0, 1e6, (STAGES, STAGES)
    )
    bank_weights: list[float] = key(
        [0.0, 10.0, 10.0], "distance of sentences to the bank's mixtures: factors", 0, 1e6, (STAGES, STAGES)
    )
    image_weights: list[float] = key(
        [0.0, 0.0, 1.0], "reconstruction of the image: factors", 0, 1e6, (STAGES, STAGES)
    )
    sentence_weights: list[float] = key(
        [0.0, 0.0, 10.0], "generation of sentence prototypes: factors", 0, 1e6, (STAGES, STAGES)
    )
    score_weights: list[float] = key(
        [0.0, 0.0, 1.0], "prototype scores of generated sentences: factors", 0, 1e6, (STAGES, STAGES)
    )
    generated_weights: list[float] = key(
        [0.0, 0.0, 1.0], "generated reports against true ones: factors", 0, 1e6, (STAGES, STAGES)
    )
    temperature: float = key(0.07, "learned temperatures of the contrasts start here", 1e-4, 100)
    temperature_min: float = key(
        0.001, "learned temperatures do not fall below it; 0: no bound (published)", 0, 100
    )

    bank_stage: int = key(
        2,
        "first stage whose sentences and embeddings are the bank's mixtures; 4: none (an auxiliary loss)",
        1,
        STAGES + 1,
    )
    bank_detached: bool = key(
        False, "true: loss/bank moves the prototypes towards the sentences, and no sentence towards them"
    )
    prototypes: int = key(512, "sentence prototypes in the bank", 1, 1 << 22)
    bank_temperature: float = key(0.9, "temperature of the bank's softmax", 1e-3, 100)
    bank_schedule: Literal["fixed", "linear", "exponential"] = key(
        "fixed", "how the bank's temperature falls to a tenth over the run"
    )
    bank_noise: Literal["training", "always", "never"] = key(
        "training", "when Gumbel noise is added to the bank's scores; always: at test time too (published)"
    )
    max_sentences: int = key(64, "sentences of a report that take part where none are generated", 1, 4096)

    queries: int = key(16, "generated sentences; where they are, reports are cut to as many", 1, 4096)
    decoder_layers: int = key(8, "layers of the sentence decoder", 1, 1024)
    decoder_heads: int = key(12, "attention heads of the sentence decoder", 1, 1024)
    decoder_hidden: int = key(3072, "width of the sentence decoder's feed-forward layers", 1, 1 << 16)
    decoder_dropout: float = key(0.1, "dropout of the sentence decoder", 0, 1)
    image_decoder_width: int = key(768, "channels of the image decoder's first block; they halve", 1, 1 << 16)
    reconstruction_size: int | None = key(
        None, "side of the reconstructed image in pixels; default: the image's", 8, 8192
    )
    channel_dropout: float = key(0.5, "share of the image's feature channels that the decoder misses", 0, 1)

    local_layout: Literal["correct", "official_view"] = key(
        "correct", "official_view: patches are slices across channels and places (published)"
    )
    wrong_permutation: bool = key(False, "true: matched sentences change places the wrong way (published)")
    causal_decoder: bool = key(False, "true: generated sentence i sees only those before it (published)")
    rank_means: bool = key(False, "true: means over sentences are those of each rank alone (published)")
    zero_shot: Literal["embedding", "official"] = key(
        "embedding", "scores of prompts: cosines, or cosines and local attention without exp (published)"
    )

    def weights(self, stage: int) -> dict[str, float]:
        """The terms of stage 1, 2 or 3 that are computed, with their factors."""
        factors = {
            "global": self.global_weights,
            "local_image": self.local_image_weights,
            "local_text": self.local_text_weights,
            "bank": self.bank_weights,
            "image": self.image_weights,
            "sentence": self.sentence_weights,
            "score": self.score_weights,
            "generated": self.generated_weights,
        }
        return {term: values[stage - 1] for term, values in factors.items() if values[stage - 1]}

    def stages(self, staged: bool) -> Sequence[int]:
        """Stages of the training to come; `staged`: they follow the optimiser phases."""
        return range(1, STAGES + 1) if staged else [self.stage]

    def embeds(self, stages: Sequence[int]) -> bool:
        """Whether a loss shapes the embeddings of images and reports in each of the stages."""
        return all("global" in self.weights(stage) for stage in stages)

    def has_bank(self, stages: Sequence[int]) -> bool:
        """Whether sentences go through the bank in any of the stages."""
        return any(self.uses_bank(stage) for stage in stages)

    def uses_bank(self, stage: int) -> bool:
        """Whether sentences go through the bank in this stage."""
        return stage >= self.bank_stage or bool(BANKED & self.weights(stage).keys())

    def bank_phase(self, staged: bool) -> int:
        """The first optimiser phase that uses the bank, from 0; 0 also where none does."""
        phases = (phase for phase, stage in enumerate(self.stages(staged)) if self.uses_bank(stage))
        return next(phases, 0)

    def check(self, config: Config) -> None:
        staged = bool(config.optimizer.phases)
        self.check_terms(staged)
        super().check(config)
        if config.prototypes.init != "random" and not self.has_bank(self.stages(staged)):
            raise ConfigError(
                f"prototypes.init={config.prototypes.init} starts PRIOR's bank of sentences, and "
                f"method.stage={self.stage} has none: set prototypes.init=random or a stage from "
                "method.bank_stage on"
            )
        self.check_start(config)

    def check_start(self, config: Config) -> None:
        """Refuse, before a run, a start of the bank that would fail in the middle of it (`ConfigError`)."""
        samples = config.prototypes.init_samples
        late = self.bank_phase(bool(config.optimizer.phases)) > 0
        # Every sample that can be trained on has a sentence at least.
        if config.prototypes.init == "kmeans" and late and samples < self.prototypes:
            raise ConfigError(
                f"prototypes.init_samples={samples} are too few to start method.prototypes={self.prototypes} "
                "from when the bank is first used: give as many at least"
            )

    def check_terms(self, staged: bool) -> None:
        """What holds for a part of a combination too (`ConfigError`)."""
        for name in [name for name in vars(self) if name.endswith("_weights")]:
            values = getattr(self, name)
            if len(values) != STAGES or min(values) < 0:
                raise ConfigError(
                    f"method.{name}={values}: give one factor of at least 0 for each of {STAGES} stages"
                )
        if self.temperature < self.temperature_min:
            raise ConfigError(
                f"method.temperature={self.temperature} is below method.temperature_min="
                f"{self.temperature_min}: start above it, or lower the bound"
            )
        terms = {term for stage in self.stages(staged) for term in self.weights(stage)}
        if terms & {"global", "generated"} and self.embedding % self.pool_heads:
            raise ConfigError(
                f"method.pool_heads={self.pool_heads} does not divide method.embedding={self.embedding}"
            )
        if terms & GENERATED and self.embedding % self.decoder_heads:
            raise ConfigError(
                f"method.decoder_heads={self.decoder_heads} does not divide method.embedding={self.embedding}"
            )
        if self.zero_shot == "official" and not terms >= {"global", "local_text"}:
            raise ConfigError(
                "method.zero_shot=official scores by embeddings and local attention: set "
                "method.global_weights and method.local_text_weights above 0 in a stage, or "
                "method.zero_shot=embedding"
            )
        for stage in self.stages(staged):
            if not self.weights(stage):
                raise ConfigError(
                    f"every method.*_weights is 0 in stage {stage}, which leaves no loss to train on"
                )

    def loss_changes(self, config: Config) -> str | None:
        stages = self.stages(bool(config.optimizer.phases))
        if all(self.weights(stage) == self.weights(stages[0]) for stage in stages):
            return None
        return "the weights of PRIOR's terms change with the stages (optimizer.phases)"

    def sample_contrasts(self, config: Config) -> list[str]:
        stages = self.stages(bool(config.optimizer.phases))
        return ["method.global_weights"] if any("global" in self.weights(stage) for stage in stages) else []

    def embedding_need(self, config: Config) -> str | None:
        embeds = self.embeds(self.stages(bool(config.optimizer.phases)))
        return None if embeds else "method.global_weights above 0 in every stage"
