"""PRIOR: prototype representation joint learning from images and reports (Cheng et al., ICCV 2023)."""

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.encoders.image import ImageEncoder, ImageFeatures, normalise_image
from medvlp.encoders.text import TextEncoder, TextFeatures
from medvlp.encoders.words import sentence_means
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress, StepOutput
from medvlp.methods.pair import Alignment, EncodedPair, PairMethod, build_encoders
from medvlp.methods.prior.attention import AttentionPool
from medvlp.methods.prior.bank import SentenceBank
from medvlp.methods.prior.config import STAGES, PRIORConfig
from medvlp.methods.prior.losses import PRIORLosses, PRIORParts
from medvlp.methods.prior.modules import LinearHead, patch_vectors
from medvlp.methods.registry import register
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import Embedder


class PRIOR(Alignment):
    """Images and reports aligned as a whole and sentence by sentence, with a bank of sentence prototypes.

    Args:
        config: keys of the method.
        image: image backbone; text: text backbone (only their sizes and the normalisation are read).
        staged: the stage is the optimiser phase + 1; false: `config.stage` throughout.

    Raises:
        EncoderError: sizes that do not fit the encoders.
    """

    reached: Tensor
    reads_pooled = False
    shapes_embeddings = "method.global_weights"

    def __init__(
        self, config: PRIORConfig, image: ImageEncoder, text: TextEncoder, staged: bool = False
    ) -> None:
        super().__init__()
        self.config, self.staged = config, staged
        self._normalisation = (image.config.mean, image.config.std)
        self.size = config.reconstruction_size or image.image_size
        self.stages = config.stages(staged)
        self.patch_projection = _head(image.local_width, config)
        self.sentence_projection = _head(text.width, config)
        self.objective = PRIORLosses(config, self.stages, image.grid, self.size)
        self.image_pool: AttentionPool | None = None
        if any("global" in config.weights(stage) for stage in self.stages):
            places = image.grid[0] * image.grid[1]
            self.image_pool = AttentionPool(image.local_width, config.pool_heads, places)
            self.image_projection = _head(image.local_width, config)
        # Where training stood, kept with the weights: evaluation needs the stage and the bank's temperature.
        self.register_buffer("reached", torch.tensor([self.objective.stage, 0, 1]))
        self.register_load_state_dict_post_hook(_follow_reached)  # type: ignore[no-untyped-call]

    def forward(self, pair: EncodedPair, clusters: PrototypeTable | None = None) -> StepOutput:
        """Losses of a batch by the terms of the stage, retrieval accuracies and temperatures.

        The terms: "loss/global", "loss/local_image", "loss/local_text", "loss/bank", "loss/image",
        "loss/sentence", "loss/score", "loss/generated". Besides them the metrics of
        `exclude_false_negatives`. With "sentence", "score" or "generated" the host waits for the device
        once, for the matching.
        """
        weights = self.config.weights(self.objective.stage)
        sentences, valid = self._sentences(pair.text, pair.batch.text)
        parts = PRIORParts(
            image=self._image(pair.image) if "global" in weights else None,
            patches=self._patches(pair.image),
            sentences=sentences,
            valid=valid,
            target=self._target(pair.batch.image) if "image" in weights else None,
        )
        exclude = partial(self.exclude_in, pair, clusters, self.config)
        output: StepOutput = self.objective(parts, exclude)
        return output

    @property
    def embeds(self) -> bool:
        """Whether a stage contrasts images with reports."""
        return self.image_pool is not None

    def embed_image(self, features: ImageFeatures) -> Tensor:
        return unit_norm(self._image(features)).float()

    def embed_text(self, features: TextFeatures, text: Text) -> Tensor:
        sentences, valid = self._mixed_sentences(features, text)
        return unit_norm(self.objective.report(sentences, valid)).float()

    @property
    def scores_by_embedding(self) -> bool:
        return self.config.zero_shot == "embedding"

    def score(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """Cosines, or as the published code: they depend on the other prompts given in the same call."""
        cosine = self.embed_image(image) @ self.embed_text(prompts, text).T
        if self.config.zero_shot == "embedding":
            return cosine
        assert self.objective.scale is not None
        sentences, valid = self._mixed_sentences(prompts, text)
        context = self.objective.cross_attention(
            self._patches(image), sentences[None, :, 0], valid[None, :, 0]
        )
        attention = 0.5 * (context.image_weights.float().mean(1) + context.text_weights.float().mean(2))
        scaled = self.objective.scale(cosine, exponential=False)
        scores: Tensor = scaled.softmax(1) + 0.5 * attention.softmax(1)
        return scores

    @property
    def grounds(self) -> bool:
        """Whether patches have a place, and a stage trains what sentences see of them."""
        trained = any("local_text" in self.config.weights(stage) for stage in self.stages)
        return trained and self.config.local_layout == "correct"

    def ground(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """[B, N, P] sigmoid attention in [0, 1] of prompts to patches, mean over a prompt's sentences."""
        if not self.grounds:
            raise NotImplementedError(
                "PRIOR grounds with method.local_text_weights above 0 and without method.local_layout="
                "official_view, which leaves patches without a place"
            )
        sentences, valid = self._mixed_sentences(prompts, text)
        flat = sentences.flatten(0, 1)[None], valid.flatten()[None]
        weights = self.objective.cross_attention(self._patches(image), *flat).text_weights.float()
        maps = weights.view(len(weights), *valid.shape, -1).masked_fill(~valid[None, :, :, None], 0)
        mean: Tensor = maps.sum(2) / valid.sum(1).clamp(min=1)[None, :, None]
        return mean

    def prototype_size(self) -> tuple[int, int] | None:
        """Of the bank of sentences; None where no stage has it."""
        bank = self.objective.bank
        return None if bank is None else (self.config.prototypes, self.config.embedding)

    @property
    def learned_prototypes(self) -> SentenceBank | None:
        return self.objective.bank

    def prototype_phase(self) -> int:
        """That of the first stage with a term of the bank: stage 1 trains the sentences without it."""
        return self.config.bank_phase(self.staged)

    def prototype_encodings(self, method: Embedder, batch: Batch) -> Any:
        """Those of the reports."""
        assert isinstance(method, PairMethod)
        return method.text_encoder(batch.text)

    def prototype_features(self, encodings: Any, batch: Batch) -> list[Tensor]:
        """[B, S, E] sentences, as the bank gets them; zero in empty slots."""
        sentences, valid = self._sentences(encodings, batch.text)
        return [sentences.masked_fill(~valid[:, :, None], 0)]

    def on_progress(self, progress: Progress) -> None:
        """Set the stage and the bank's temperature of the next step."""
        stage = min(progress.phase + 1, STAGES) if self.staged else self.config.stage
        self._reach(stage, progress.step, progress.steps)
        for slot, value in enumerate((stage, progress.step, progress.steps)):
            self.reached[slot].fill_(value)  # a copy from the host would wait for the device

    @property
    def loss_variant(self) -> str:
        """The stage."""
        return f"stage {self.objective.stage}"

    def embedding_width(self) -> int | None:
        return self.config.embedding if self.config.embeds(self.stages) else None

    def _reach(self, stage: int, step: int, steps: int) -> None:
        share = step / max(1, steps)
        factor = {"fixed": 1.0, "linear": 1 - 0.9 * share, "exponential": 0.1**share}
        self.objective.stage = stage
        self.objective.temperature = self.config.bank_temperature * factor[self.config.bank_schedule]

    def _image(self, features: ImageFeatures) -> Tensor:
        assert self.image_pool is not None, "a stage contrasts images with reports"
        projected: Tensor = self.image_projection(self.image_pool(features.local))
        return projected

    def _patches(self, features: ImageFeatures) -> Tensor:
        projected: Tensor = self.patch_projection(patch_vectors(features.local, self.config))
        return projected

    def _sentences(self, features: TextFeatures, text: Text, generated: bool = True) -> tuple[Tensor, Tensor]:
        """[B, S, E] projected means of the tokens of each sentence, and [B, S] which slots hold one.

        The projection is linear (its batch norm sees sentences): means are projected instead of tokens.
        `generated`: cut reports to the number of generated sentences, where there are any.
        """
        if generated and self.objective.generates:
            slots = self.config.queries
        else:
            slots = min(self.config.max_sentences, text.sentence_index.shape[1])
            # On a CPU their number is there without waiting; a plan on fake tensors is one for GPUs.
            if not text.sentence_index.is_cuda and not isinstance(text.sentence_index, FakeTensor):
                slots = max(1, min(slots, int(text.sentence_index.max()) + 1))
        means, valid = sentence_means(features.hidden, text, slots)
        return self.sentence_projection(means, valid), valid

    def _mixed_sentences(self, features: TextFeatures, text: Text) -> tuple[Tensor, Tensor]:
        """Sentences as the losses see them: from the bank, where the stage has it."""
        if self.config.zero_shot == "official":
            # A prompt is one sentence, to which [SEP] belongs.
            tokens = F.pad(text.attention_mask[:, 1:] - 1, (1, 0), value=-1)
            text = dataclasses.replace(text, sentence_index=tokens)
        # As published: only training cuts the sentences, which it compares with generated ones.
        sentences, valid = self._sentences(features, text, generated=False)
        if self.objective.stage >= self.config.bank_stage:
            sentences = self.objective.banked(sentences).sentences.to(sentences.dtype)
        return sentences, valid

    def _target(self, image: Tensor) -> Tensor:
        """[B, 1, size, size] normalised image in float32."""
        target = normalise_image(image, *self._normalisation).mean(1, keepdim=True)
        if target.shape[-1] != self.size:
            target = F.interpolate(target, size=(self.size, self.size), mode="area")
        return target


def _head(width: int, config: PRIORConfig) -> LinearHead:
    return LinearHead(width, config.embedding, config.head_norm == "batch", config.batch_norm == "global")


def _follow_reached(module: nn.Module, incompatible: object) -> None:
    """After loading weights: the stage and temperature they were trained with."""
    assert isinstance(module, PRIOR)
    module._reach(*module.reached.tolist())


@register("prior", PRIORConfig)
def build(config: Config, vocab_size: int) -> PairMethod:
    """PRIOR as the config describes it (see `medvlp.methods.registry.build_method`)."""
    method: PRIORConfig = config.method  # type: ignore[assignment]
    image, text = build_encoders(config, vocab_size, reads_pooled=PRIOR.reads_pooled)
    return PairMethod(image, text, PRIOR(method, image, text, staged=bool(config.optimizer.phases)))
