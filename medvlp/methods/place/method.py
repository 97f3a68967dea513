"""PLACE: pathological-level alignment and correlation exploration (2025), reconstructed from its abstract."""

import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Text
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.projection import ProjectionHead
from medvlp.encoders.text import TextEncoder, TextFeatures
from medvlp.encoders.words import aggregate_words, sentence_identity, sentence_means
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress, StepOutput
from medvlp.methods.instance_contrast import instance_contrast
from medvlp.methods.pair import Alignment, EncodedPair, PairMethod, build_encoders
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.correlation import ConditionedPatches
from medvlp.methods.place.losses import Sentences, observation_terms, token_terms
from medvlp.methods.place.observations import ObservationExtractor, TokenPool
from medvlp.methods.place.terms import (
    correlation_loss,
    diversity_penalty,
    feature_correlation,
    pixel_correlation,
)
from medvlp.methods.registry import register
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import to_cluster


class PLACE(Alignment):
    """Images and reports aligned as a whole and by observations; patches compared given the report.

    From the paper's abstract: query tokens extract visual observations from patch tokens; they are made
    consistent with the observations in the report without any labels; and a proxy task predicts
    patch-level covariance given the report. Everything else (layers, matching, losses, targets, weights)
    is our reconstruction.

    Modules of terms whose weight is 0 do not exist.

    Args:
        config: keys of the method.
        image: image backbone; text: text backbone (only their sizes are read).
    """

    shapes_embeddings = "method.instance_weight"

    def __init__(self, config: PLACEConfig, image: ImageEncoder, text: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.reads_pooled = config.embeds
        self.soft = config.soft_epochs > 0
        synchronise = config.batch_norm == "global"
        sizes = (config.head_hidden, config.embedding, synchronise)
        self.image_head = ProjectionHead(image.width, *sizes)
        self.report_head = ProjectionHead(text.width, *sizes)
        self.report_pool = TokenPool(text.width) if config.report_pool == "attention" else None
        self.extractor: ObservationExtractor | None = None
        if config.observation_weight > 0:
            self.extractor = ObservationExtractor(
                image.local_width,
                config.decoder_width,
                config.queries,
                config.query_layers,
                config.decoder_heads,
                config.patch_positions,
            )
            self.observation_head = ProjectionHead(config.decoder_width, *sizes)
            self.sentence_head = ProjectionHead(text.width, *sizes)
        self.correlation: ConditionedPatches | None = None
        if config.correlation_weight > 0:
            self.correlation = ConditionedPatches(
                image.local_width,
                text.width,
                config.decoder_width,
                config.embedding,
                config.correlation_layers,
                config.decoder_heads,
                config.patch_drop,
                config.teacher_momentum if config.correlation_target == "teacher" else None,
            )
        if config.token_weight > 0:
            self.patch_head = ProjectionHead(image.local_width, *sizes)
            self.word_head = ProjectionHead(text.width, *sizes)

    def forward(self, pair: EncodedPair, clusters: PrototypeTable | None = None) -> StepOutput:
        """Losses of a batch: "loss/..." of the terms with a weight.

        These are "instance", "observation", "diversity", "correlation", "word" and "patch". Besides them:
        "retrieval/top1" and "retrieval/top5" (see MGCA), "observation/similarity" and
        "observation/excluded" (see `losses.observation_terms`), "correlation/shuffled", the same loss with
        the report of another image of this rank (what the report adds is the difference), and the metrics
        of `exclude_false_negatives`.
        """
        config, (image, text, batch) = self.config, pair[:3]
        terms: dict[str, Tensor] = {}
        exclusion, shared, embeddings = NOTHING_EXCLUDED, {}, None
        if config.instance_weight > 0:
            embeddings = self._image(image), self._report(text, batch.text)
            shared = to_cluster(*embeddings)
        if config.instance_weight > 0 or config.observation_weight > 0:
            report = None if embeddings is None else embeddings[1]
            exclusion = self.exclude_in(pair, clusters, config, report)
        if embeddings is not None:
            both, accuracies = instance_contrast(
                *embeddings,
                config.instance_temperature,
                config.negatives,
                exclusion.pairs,
                config.loss_memory,
            )
            terms |= {"loss/instance": 0.5 * both} | accuracies | exclusion.metrics
        if self.extractor is not None:
            observations = self._observations(self.extractor(image.local, image.grid).features)
            sentences = self._said(text, batch.text)
            # Not by the epoch in a validation: each is compared with the others.
            soft = self._matching == "soft" if self.training else config.matching == "soft"
            terms |= observation_terms(observations, sentences, soft, config, exclusion.pairs)
            if config.diversity_weight > 0:
                terms["loss/diversity"] = diversity_penalty(observations)
        if self.correlation is not None:
            terms |= self._correlation(self.correlation, pair)
        if config.token_weight > 0:
            words, word_valid = self._words(text, batch.text)
            terms |= token_terms(self.patch_head(image.local), words, word_valid, config)
        weights = {
            "instance": config.instance_weight,
            "observation": config.observation_weight,
            "diversity": config.diversity_weight,
            "correlation": config.correlation_weight,
            "word": config.token_weight,
            "patch": config.token_weight,
        }
        weighted = [
            weight * terms[f"loss/{name}"] for name, weight in weights.items() if f"loss/{name}" in terms
        ]
        return StepOutput(sum(weighted[1:], start=weighted[0]), terms, shared, exclusion)

    @property
    def embeds(self) -> bool:
        return self.config.embeds

    def embed_image(self, features: ImageFeatures) -> Tensor:
        return self._image(features).float()

    def embed_text(self, features: TextFeatures, text: Text) -> Tensor:
        return self._report(features, text).float()

    @property
    def scores_by_embedding(self) -> bool:
        return self.config.observation_score == 0

    def score(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """Cosine of the embeddings; with `observation_score` > 0 that factor times the cosine between each
        sentence of the prompt and the observation most like it is added (mean over its sentences)."""
        scores = super().score(image, prompts, text)
        if self.config.observation_score == 0 or self.extractor is None:
            return scores
        observations = self._observations(self.extractor(image.local, image.grid).features)
        sentences, valid = self._sentences(prompts, text)
        best = torch.einsum("bmd,nsd->bnsm", observations, sentences).amax(3)
        mean = (best * valid).sum(2) / valid.sum(1).clamp(min=1)
        return scores + self.config.observation_score * mean.float()

    @property
    def grounds(self) -> bool:
        if self.config.grounding == "patch":
            return self.config.token_weight > 0
        return self.extractor is not None

    def ground(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """[B, N, P] maps of N prompts.

        grounding=observation: attention (last decoder layer, mean over heads, sums to 1) of the query whose
        observation is most like the prompt. grounding=patch: cosine between each patch and the mean word of
        the prompt in the space of the token-wise losses.
        """
        if self.config.grounding == "patch":
            words, valid = self._words(prompts, text)
            prompt = unit_norm((unit_norm(words) * valid[:, :, None]).sum(1))
            similarity: Tensor = unit_norm(self.patch_head(image.local)) @ prompt.T
            return similarity.transpose(1, 2).float()
        if self.extractor is None:
            return super().ground(image, prompts, text)
        found = self.extractor(image.local, image.grid, attention=True)
        sentences, valid = self._sentences(prompts, text)
        prompt = unit_norm((sentences * valid[:, :, None]).sum(1))
        best = (self._observations(found.features) @ prompt.T).argmax(1)
        assert found.attention is not None
        maps: Tensor = found.attention.gather(1, best[:, :, None].expand(-1, -1, found.attention.shape[2]))
        return maps.float()

    def on_progress(self, progress: Progress) -> None:
        """Soft matching in the first epochs; the teacher moves once a step."""
        self.soft = progress.epoch < self.config.soft_epochs
        if self.correlation is not None:
            self.correlation.new_step()

    @property
    def loss_variant(self) -> str:
        """How sentences get their observation."""
        return "" if self.extractor is None else f"{self._matching} matching"

    @property
    def _matching(self) -> str:
        return "soft" if self.soft else self.config.matching

    def embedding_width(self) -> int | None:
        return self.config.embedding if self.embeds else None

    def _image(self, features: ImageFeatures) -> Tensor:
        """[B, D] unit-norm images."""
        return unit_norm(self.image_head(features.pooled))

    def _report(self, features: TextFeatures, text: Text) -> Tensor:
        """[B, D] unit-norm reports."""
        if self.report_pool is None:
            return unit_norm(self.report_head(features.hidden[:, 0]))
        pooled = self.report_pool(features.hidden, text.attention_mask.bool())
        return unit_norm(self.report_head(pooled))

    def _observations(self, features: Tensor) -> Tensor:
        """[B, M, width] features of the queries -> [B, M, D] unit-norm."""
        return unit_norm(self.observation_head(features))

    def _sentences(self, features: TextFeatures, text: Text) -> tuple[Tensor, Tensor]:
        """[B, S, D] unit-norm sentences and [B, S] bool which slots hold one."""
        means, valid = sentence_means(features.hidden, text, self.config.max_sentences)
        return unit_norm(self.sentence_head(means, valid)), valid

    def _said(self, features: TextFeatures, text: Text) -> Sentences:
        """The sentences as the contrast of observations takes them."""
        means, valid = sentence_means(features.hidden, text, self.config.max_sentences)
        identity = sentence_identity(text, self.config.max_sentences)
        kept = means.detach() if self.config.false_negatives == "features" else None
        return Sentences(unit_norm(self.sentence_head(means, valid)), valid, identity, kept)

    def _words(self, features: TextFeatures, text: Text) -> tuple[Tensor, Tensor]:
        """[B, W, D] words, not normalised, and [B, W] bool which slots hold one."""
        words = aggregate_words(features.hidden, text.attention_mask.float(), text)
        return self.word_head(words.features, words.valid), words.valid

    def _correlation(self, branch: ConditionedPatches, pair: EncodedPair) -> dict[str, Tensor]:
        image, text, batch = pair[:3]
        others = None
        if len(batch.sample) > 1:  # by their numbers, so that the order of a batch does not matter
            order = batch.sample.argsort(stable=True)
            others = torch.empty_like(order).scatter(0, order, order.roll(-1))
        tokens = branch(image.local, image.grid, text.hidden, batch.text.attention_mask.bool(), others)
        if tokens.taught is None:
            target, usable = pixel_correlation(batch.image, image.grid)
        else:
            target, usable = feature_correlation(tokens.taught)
        huber = self.config.huber_delta or None
        terms = {"loss/correlation": correlation_loss(tokens.conditioned, target, usable, huber)}
        if tokens.control is not None:
            terms["correlation/shuffled"] = correlation_loss(tokens.control, target, usable, huber)
        return terms


@register("place", PLACEConfig)
def build(config: Config, vocab_size: int) -> PairMethod:
    """PLACE as the config describes it (see `medvlp.methods.registry.build_method`)."""
    method: PLACEConfig = config.method  # type: ignore[assignment]
    image, text = build_encoders(config, vocab_size, reads_pooled=method.embeds)
    return PairMethod(image, text, PLACE(method, image, text))
