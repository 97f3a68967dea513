"""MeDSLIP: medical dual-stream language-image pre-training (2024)."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.text import Tokenizer
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.positions import sincos_positions
from medvlp.encoders.text import TextEncoder
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import DividedMethod, StepOutput
from medvlp.methods.medslip.book import TextBook
from medvlp.methods.medslip.config import MeDSLIPConfig
from medvlp.methods.medslip.losses import MeDSLIPLosses, Negatives, Read
from medvlp.methods.medslip.modules import Decoded, QueryDecoder, Streams, TwoStreams
from medvlp.methods.pair import build_encoders_of
from medvlp.methods.registry import register
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import PrototypeUser, to_cluster

logger = logging.getLogger(__name__)


class ImageStreams(NamedTuple):
    """An image's two streams and the (rows, columns) of their tokens."""

    streams: Streams
    grid: tuple[int, int]


class MeDSLIP(DividedMethod, PrototypeUser):
    """Frozen texts ask an image's pathology and anatomy streams what is there.

    Reports enter only as the batch field `entities`, the anatomy-observation matrix. `prepare` must have been
    called.

    Args:
        config: keys of the method.
        image: backbone whose local features are the image tokens.
        text: frozen backbone of the text book and the prompts.
        max_tokens: longest text of the book.

    Raises:
        EncoderError: positions do not fit the width of the image tokens.
    """

    def __init__(
        self, config: MeDSLIPConfig, image: ImageEncoder, text: TextEncoder, max_tokens: int
    ) -> None:
        super().__init__()
        if config.positions == "sine" and image.local_width % 4:
            raise EncoderError(
                f"method.positions=sine needs image tokens of a width that 4 divides, not {image.local_width}"
            )
        self.config, self.max_tokens = config, max_tokens
        self.image_encoder, self.text_encoder = image, text
        image.reads_patches = True
        self.book = TextBook(text.width, config.text_pooling, config.standardise_book)
        self.streams = TwoStreams(image.local_width, config.width, config.gate)
        self.queries = nn.Linear(text.width, config.width)
        sizes = (config.width, config.layers, config.heads, config.expansion, config.dropout)
        self.pathology_decoder = QueryDecoder(*sizes)
        self.anatomy_decoder = QueryDecoder(*sizes)
        if config.shared_norm:
            self.anatomy_decoder.norm = self.pathology_decoder.norm
        self.objective = MeDSLIPLosses(config, text.width)
        own = self.streams, self.queries, self.pathology_decoder, self.anatomy_decoder, self.objective
        for part in own:
            part.apply(_normal_start if config.initialisation == "normal" else _scaled_start)

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Write the text book with the frozen encoder."""
        self.book.write(self.text_encoder, tokenizer, self.max_tokens)

    def write_book(self, tokenizer: Tokenizer, descriptions: Sequence[str]) -> None:
        """As `prepare`, with other descriptions of the 75 observations (those of published weights)."""
        self.book.write(self.text_encoder, tokenizer, self.max_tokens, descriptions)

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return (self.image_encoder,)

    def encode(self, batch: Batch) -> ImageFeatures:
        features: ImageFeatures = self.image_encoder(batch.image)
        return features

    def losses(
        self,
        encodings: ImageFeatures,
        batch: Batch,
        clusters: PrototypeTable | None = None,
        negatives: Negatives | None = None,
    ) -> StepOutput:
        """Losses "loss/existence_pathology", ".../existence_anatomy", "loss/prototype_pathology",
        ".../prototype_anatomy", "loss/relation".

        Args:
            encodings: of the images.
            batch: with entities.
            clusters: not used: the losses contrast texts with parts of one image, never two samples.
            negatives: of the prototype losses; None: drawn.

        Raises:
            ValueError: the batch holds no entities.
        """
        if "entities" not in batch.fields:
            raise ValueError("medslip reads the batch field entities: name it when the loader is built")
        streams = self._streams_of(encodings).streams
        pathology: Decoded = self._read(self.pathology_decoder, self._book().pathology, streams.pathology)
        anatomy: Decoded = self._read(self.anatomy_decoder, self._book().anatomy, streams.anatomy)
        read = Read(pathology.features, anatomy.features, self.book.pathology, self.book.anatomy)
        output: StepOutput = self.objective(read, batch.fields["entities"], negatives)
        return output._replace(embeddings=to_cluster(_embedding(streams), None))

    @property
    def service_user(self) -> PrototypeUser:
        return self

    @property
    def embeds_reports(self) -> bool:
        return False

    @property
    def scores_prompts(self) -> bool:
        return self.config.existence_weight > 0

    @property
    def scores_by_embedding(self) -> bool:
        return False

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, width] unit-norm mean over the tokens of the pathology stream (no query has read them yet)."""
        return unit_norm(_embedding(self._image_streams(image).streams))

    def embedding_width(self) -> int | None:
        """The streams are trained by every loss."""
        return self.config.width

    def mask_false_negatives(self, clusters: int | None) -> None:
        """Have images clustered; there are no contrasts between samples, so no loss changes."""
        super().mask_false_negatives(clusters)
        logger.warning(
            "prototypes.false_negatives=mask changes no loss of MeDSLIP, which never contrasts two samples%s",
            "" if clusters is None else "; its images are clustered all the same",
        )

    def encode_text(self, text: Text) -> Tensor:
        raise NotImplementedError("MeDSLIP embeds no reports: they enter training as entities only")

    def image_features(self, image: Tensor) -> Tensor:
        """Pooled features of the backbone, which ends at the stage whose map the method reads.

        Of a transformer the mean of its patches: no loss reads the class token.
        """
        return self.image_encoder.summary(self.image_encoder(image))

    def score(self, image: Tensor, prompts: Text) -> Tensor:
        """[B, N] probabilities that what the prompts say is present.

        A prompt asks beside the 75 descriptions, as in training: it attends to them but is seen by nobody, so
        its score depends on no other prompt, and a prompt that repeats a description scores as that one.
        """
        if not self.scores_prompts:
            raise NotImplementedError("method.existence_weight=0: MeDSLIP does not learn what is present")
        streams = self._image_streams(image).streams
        return self.objective.probability(self._ask(streams, prompts).features)

    @property
    def grounds(self) -> bool:
        return True

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        """[B, N, rows, columns] attention of each prompt's query to the image tokens, mean over layers.

        With `ground_by_anatomy` times the mean attention of the anatomies' queries (equal to the published
        mean of the products with each of them). Maps are not divided by the batch's maximum, as the published
        script does: a map then does not depend on its neighbours.
        """
        streams, grid = self._image_streams(image)
        maps = mean_attention(self._ask(streams, prompts, attention=True))
        if self.config.ground_by_anatomy:
            book = self._book().anatomy
            anatomies = self._read(self.anatomy_decoder, book, streams.anatomy, attention=True)
            maps = fuse_anatomies(maps, mean_attention(anatomies))
        return maps.reshape(*maps.shape[:2], *grid)

    def _image_streams(self, image: Tensor) -> ImageStreams:
        return self._streams_of(self.image_encoder(image))

    def _streams_of(self, features: ImageFeatures) -> ImageStreams:
        tokens = features.local
        if self.config.positions == "sine":
            tokens = tokens + sincos_positions(features.grid, tokens.shape[2], tokens.device).to(tokens.dtype)
        return ImageStreams(self.streams(tokens), features.grid)

    def _ask(self, streams: Streams, prompts: Text, attention: bool = False) -> Decoded:
        """What the prompts read, in the company of the pathology book."""
        book = self._book()
        texts = self.book.look_up(self.text_encoder, prompts)
        rows = len(book.pathology)
        decoded = self._read(
            self.pathology_decoder, torch.cat([book.pathology, texts]), streams.pathology, attention, rows
        )
        maps = None if decoded.attention is None else decoded.attention[:, :, rows:]
        return Decoded(decoded.features[:, rows:], maps)

    def _read(
        self,
        decoder: QueryDecoder,
        texts: Tensor,
        tokens: Tensor,
        attention: bool = False,
        context: int | None = None,
    ) -> Decoded:
        queries = self.queries(texts.to(tokens.dtype)).expand(len(tokens), -1, -1)
        decoded: Decoded = decoder(queries, tokens, attention, context)
        return decoded

    def _book(self) -> TextBook:
        if not self.book.written:
            raise RuntimeError("MeDSLIP.prepare(tokenizer) has not been called: the text book is empty")
        return self.book


def _embedding(streams: Streams) -> Tensor:
    """[B, width] mean over the tokens of the pathology stream, in float32."""
    return streams.pathology.float().mean(1)


def mean_attention(decoded: Decoded) -> Tensor:
    """[B, N, T] attention of the queries to the tokens, mean over the layers."""
    assert decoded.attention is not None, "the decoder has been asked for attention"
    return decoded.attention.mean(0)


def fuse_anatomies(pathology: Tensor, anatomy: Tensor) -> Tensor:
    """[B, N, T] maps times each of the [B, A, T] maps of anatomies, mean over the anatomies."""
    return pathology * anatomy.mean(1, keepdim=True)


@torch.no_grad()
def _scaled_start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _normal_start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)


@register("medslip", MeDSLIPConfig, fields=["entities"])
def build(config: Config, vocab_size: int) -> MeDSLIP:
    """MeDSLIP as the config describes it (see `medvlp.methods.registry.build_method`)."""
    method: MeDSLIPConfig = config.method  # type: ignore[assignment]
    # Nothing after the stage that is read would be trained.
    image_encoder = partial(ImageEncoder, ends_at_local=True)
    image, text = build_encoders_of(image_encoder, TextEncoder, config, vocab_size)
    return MeDSLIP(method, image, text, config.data.max_tokens)
