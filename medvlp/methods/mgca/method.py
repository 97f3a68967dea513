"""MGCA: multi-granularity cross-modal alignment (Wang et al., NeurIPS 2022)."""

import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.projection import ProjectionHead
from medvlp.encoders.text import TextEncoder, TextFeatures
from medvlp.encoders.words import aggregate_words
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress, StepOutput
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.mgca.losses import MGCAEmbeddings, MGCALosses, MGCATokens
from medvlp.methods.pair import Alignment, EncodedPair, PairMethod, build_encoders
from medvlp.methods.registry import register
from medvlp.prototypes.learned import LearnedPrototypes
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import to_cluster


class MGCA(Alignment):
    """Images and reports aligned as a whole, token by token, and through prototypes.

    Modules of terms whose weight is 0 do not exist.

    Args:
        config: keys of the method.
        image: image backbone; text: text backbone (only their sizes are read).

    Raises:
        EncoderError: attention weights are asked for and a backbone has none.
    """

    shapes_embeddings = "method.instance_weight and method.prototype_weight"

    def __init__(self, config: MGCAConfig, image: ImageEncoder, text: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.reads_pooled = config.embeds
        synchronise = config.batch_norm == "global"
        sizes = (config.head_hidden, config.embedding, synchronise)
        self.image_head = ProjectionHead(image.width, *sizes)
        self.report_head = ProjectionHead(text.width, *sizes)
        self.objective = MGCALosses(config)
        if config.token_weight > 0:
            self.patch_head = ProjectionHead(image.local_width, *sizes)
            self.word_head = ProjectionHead(text.width, *sizes)
            self.image_attention = _wants_attention(
                "patch_weights", config.patch_weights, image.has_attention
            )
            self.text_attention = _wants_attention("word_weights", config.word_weights, text.has_attention)

    def forward(self, pair: EncodedPair, clusters: PrototypeTable | None = None) -> StepOutput:
        """Losses of a batch: "loss/instance", "loss/word", "loss/patch", "loss/prototype".

        A term whose weight is 0 is left out. Besides the losses: "retrieval/top1" and "retrieval/top5",
        in-batch accuracy of both directions in [0, 1], and the metrics of `exclude_false_negatives`.
        """
        embeddings = MGCAEmbeddings(
            image=self.image_head(pair.image.pooled),
            report=self.report_head(pair.text.hidden[:, 0]),
            tokens=self._tokens(pair) if self.config.token_weight > 0 else None,
        )
        exclusion = self.exclude_in(pair, clusters, self.config, embeddings.report)
        output: StepOutput = self.objective(embeddings, clusters, exclusion.pairs)
        shared = to_cluster(embeddings.image, embeddings.report)
        return StepOutput(output.loss, output.terms | exclusion.metrics, shared, exclusion)

    def _tokens(self, pair: EncodedPair) -> MGCATokens:
        image = pair.image
        words, valid, attention = self._words(pair.text, pair.batch.text)
        return MGCATokens(
            patches=self.patch_head(image.local),
            words=words,
            word_valid=valid,
            word_attention=attention,
            patch_attention=None if image.attention is None else image.attention.mean(1),
        )

    def _words(self, features: TextFeatures, text: Text) -> tuple[Tensor, Tensor, Tensor | None]:
        """Projected words [B, W, D], which of them there are [B, W], and their attention [B, W] if any."""
        config, attention = self.config, features.cls_attention
        words = aggregate_words(
            features.hidden,
            text.attention_mask.float() if attention is None else attention,
            text,
            config.separator_word,
            config.attention_off_by_one,
            config.lost_last_word,
        )
        counted = None if config.padding_statistics else words.valid
        projected = self.word_head(words.features, counted)
        return projected, words.valid, None if attention is None else words.attention

    @property
    def embeds(self) -> bool:
        return self.config.embeds

    def embed_image(self, features: ImageFeatures) -> Tensor:
        return unit_norm(self.image_head(features.pooled)).float()

    def embed_text(self, features: TextFeatures, text: Text) -> Tensor:
        return unit_norm(self.report_head(features.hidden[:, 0])).float()

    @property
    def grounds(self) -> bool:
        return self.config.token_weight > 0

    def ground(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """[B, N, P] mean cosine of every patch with the words of N prompts, in [-1, 1].

        The paper publishes no such map; this is the similarity its word and patch losses shape.
        """
        if not self.grounds:
            raise NotImplementedError("method.token_weight=0: MGCA without token losses does not ground")
        words, valid, _ = self._words(prompts, text)
        mean = (unit_norm(words) * valid[:, :, None]).sum(1) / valid.sum(1).clamp(min=1)[:, None]
        return torch.einsum("bpd,nd->bnp", unit_norm(self.patch_head(image.local)), mean).float()

    def on_progress(self, progress: Progress) -> None:
        """Learned prototypes stay frozen during the first `freeze_epochs` epochs."""
        self.objective.frozen = progress.epoch < self.config.freeze_epochs

    def parameters_without_decay(self) -> set[str]:
        """The prototypes: frozen ones must not move, and their length has no meaning afterwards."""
        return {"objective.prototypes.weight"} if self.objective.prototypes is not None else set()

    def prototype_size(self) -> tuple[int, int] | None:
        return None if self.objective.prototypes is None else (self.config.prototypes, self.config.embedding)

    @property
    def learned_prototypes(self) -> LearnedPrototypes | None:
        return self.objective.prototypes

    def service_size(self) -> tuple[int, int] | None:
        """Clusters that are prototypes have the method's own number; those that mask negatives share them."""
        if self.config.clusters_are_prototypes:
            return self.config.prototypes, self.config.embedding
        return super().service_size()

    @property
    def assigns_softly(self) -> bool:
        return self.config.clusters_are_prototypes

    def embedding_width(self) -> int | None:
        return self.config.embedding if self.config.embeds else None


def _wants_attention(name: str, choice: str, available: bool) -> bool:
    if choice == "attention" and not available:
        raise EncoderError(
            f"method.{name}=attention: this backbone has no attention map; use auto or uniform"
        )
    return choice != "uniform" and available


@register("mgca", MGCAConfig)
def build(config: Config, vocab_size: int) -> PairMethod:
    """MGCA as the config describes it (see `medvlp.methods.registry.build_method`)."""
    method: MGCAConfig = config.method  # type: ignore[assignment]
    image, text = build_encoders(config, vocab_size, reads_pooled=method.embeds)
    return PairMethod(image, text, MGCA(method, image, text))
