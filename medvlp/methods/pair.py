"""Methods whose losses start from one encoding of image and report: two encoders and an alignment."""

import abc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from medvlp.config import Config, MethodConfig
from medvlp.data.batch import Batch, Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.text import TextEncoder, TextFeatures
from medvlp.methods.base import DividedMethod, Progress, StepOutput
from medvlp.prototypes.false_negatives import Exclusion
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import Embedder, PrototypeUser


class EncodedPair(NamedTuple):
    """What the encoders make of a batch (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        exclusion: pairs of samples that are no negatives of each other, where another alignment on the same
            encoders has decided that; None: the alignment decides for itself.
    """

    image: ImageFeatures
    text: TextFeatures
    batch: Batch
    exclusion: Exclusion | None = None


class Alignment(PrototypeUser, nn.Module, abc.ABC):
    """Heads and losses of a method on top of the two encoders, which it does not own.

    Alignments of different methods can share one pair of encoders (`medvlp.methods.combination`).

    Attributes:
        image_attention, text_attention: whether `forward` needs the encoders' attention maps.
        reads_pooled: whether a loss reads the images' pooled feature; if not, only their patches are trained.
        shapes_embeddings: config keys of the losses that shape embeddings of images and reports.
    """

    image_attention: bool = False
    text_attention: bool = False
    reads_pooled: bool = True
    shapes_embeddings: str = "the losses on whole samples"

    @abc.abstractmethod
    def forward(self, pair: EncodedPair, clusters: PrototypeTable | None = None) -> StepOutput:
        """As `Method.forward`, from encoded pairs."""

    @abc.abstractmethod
    def embed_image(self, features: ImageFeatures) -> Tensor:
        """[B, D] unit-norm float32 embeddings of images in the shared space."""

    @abc.abstractmethod
    def embed_text(self, features: TextFeatures, text: Text) -> Tensor:
        """[B, D] unit-norm float32 embeddings of texts in the shared space."""

    def on_progress(self, progress: Progress) -> None:
        """See `Method.on_progress`."""

    @property
    def loss_variant(self) -> str:
        """See `Method.loss_variant`."""
        return ""

    def parameters_without_decay(self) -> set[str]:
        """See `Method.parameters_without_decay`; names inside the alignment."""
        return set()

    @property
    def prototype_users(self) -> Sequence[PrototypeUser]:
        """See `Method.prototype_users`."""
        return () if self.learned_prototypes is None else (self,)

    def prototype_encodings(self, method: Embedder, batch: Batch) -> Any:
        """Those of both encoders."""
        assert isinstance(method, PairMethod)
        return method.image_encoder(batch.image), method.text_encoder(batch.text)

    def prototype_features(self, encodings: Any, batch: Batch) -> list[Tensor]:
        """By this alignment's own heads, which need not be those that embed for the method."""
        image, text = encodings
        return [self.embed_image(image), self.embed_text(text, batch.text)]

    @property
    def service_user(self) -> PrototypeUser:
        """See `Method.service_user`."""
        return self

    def exclude_in(
        self, pair: EncodedPair, clusters: PrototypeTable | None, config: MethodConfig, text: Tensor | None
    ) -> Exclusion:
        """`exclude`, unless another alignment on the same encoders has decided."""
        if pair.exclusion is not None:
            return pair.exclusion._replace(metrics={})
        return self.exclude(pair.batch, clusters, config, text)

    @property
    def embeds(self) -> bool:
        """Whether a loss shapes what `embed_image` and `embed_text` give."""
        return True

    @property
    def scores_by_embedding(self) -> bool:
        """See `Method.scores_by_embedding`."""
        return True

    def score(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """[B, N] scores of B images with N prompts (see `Method.score`); `text` are the prompts' tokens."""
        return self.embed_image(image) @ self.embed_text(prompts, text).T

    @property
    def grounds(self) -> bool:
        """See `Method.grounds`."""
        return False

    def ground(self, image: ImageFeatures, prompts: TextFeatures, text: Text) -> Tensor:
        """[B, N, P] maps over the patches (see `Method.ground`)."""
        raise NotImplementedError(f"{type(self).__name__} does not ground text in images")


class PairMethod(DividedMethod):
    """An image encoder, a text encoder and the alignment between them."""

    def __init__(self, image: ImageEncoder, text: TextEncoder, alignment: Alignment) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.alignment = image, text, alignment
        image.reads_patches = not alignment.reads_pooled

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return self.image_encoder, self.text_encoder

    def encode(self, batch: Batch) -> tuple[ImageFeatures, TextFeatures]:
        image = self.image_encoder(batch.image, attention=self.alignment.image_attention)
        return image, self.text_encoder(batch.text, attention=self.alignment.text_attention)

    def losses(
        self,
        encodings: tuple[ImageFeatures, TextFeatures],
        batch: Batch,
        clusters: PrototypeTable | None = None,
    ) -> StepOutput:
        output: StepOutput = self.alignment(EncodedPair(*encodings, batch), clusters)
        return output

    @property
    def embeds_images(self) -> bool:
        return self.alignment.embeds

    @property
    def embeds_reports(self) -> bool:
        return self.alignment.embeds

    def encode_image(self, image: Tensor) -> Tensor:
        return self._embedding().embed_image(self.image_encoder(image))

    def encode_text(self, text: Text) -> Tensor:
        return self._embedding().embed_text(self.text_encoder(text), text)

    def image_features(self, image: Tensor) -> Tensor:
        return self.image_encoder.summary(self.image_encoder(image))

    @property
    def scores_by_embedding(self) -> bool:
        return self.alignment.scores_by_embedding

    def score(self, image: Tensor, prompts: Text) -> Tensor:
        return self._embedding().score(self.image_encoder(image), self.text_encoder(prompts), prompts)

    @property
    def grounds(self) -> bool:
        return self.alignment.grounds

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        features: ImageFeatures = self.image_encoder(image)
        maps = self.alignment.ground(features, self.text_encoder(prompts), prompts)
        return maps.reshape(*maps.shape[:2], *features.grid)

    def on_progress(self, progress: Progress) -> None:
        self.alignment.on_progress(progress)

    @property
    def loss_variant(self) -> str:
        return self.alignment.loss_variant

    def parameters_without_decay(self) -> set[str]:
        return {f"alignment.{name}" for name in self.alignment.parameters_without_decay()}

    @property
    def prototype_users(self) -> Sequence[PrototypeUser]:
        return self.alignment.prototype_users

    @property
    def service_user(self) -> PrototypeUser:
        return self.alignment.service_user

    def _embedding(self) -> Alignment:
        if not self.alignment.embeds:
            raise NotImplementedError(
                f"with {self.alignment.shapes_embeddings} of 0 no loss shapes embeddings of images and "
                "reports"
            )
        return self.alignment


ImageType = TypeVar("ImageType", bound=ImageEncoder)
TextType = TypeVar("TextType", bound=TextEncoder)


def build_encoders(
    config: Config, vocab_size: int, reads_pooled: bool = True
) -> tuple[ImageEncoder, TextEncoder]:
    """Image and text encoder as the config describes them.

    Args:
        config: the whole config. vocab_size: number of tokens of the tokenizer.
        reads_pooled: whether a loss reads the images' pooled feature; if not, the image encoder ends at
            `image.local_stage`, because nothing after it would be trained.

    Raises:
        EncoderError: one of them cannot be built, or the text model is too short for `data.max_tokens`.
    """
    image_encoder = partial(ImageEncoder, ends_at_local=not reads_pooled)
    return build_encoders_of(image_encoder, TextEncoder, config, vocab_size)


def build_encoders_of(
    image_encoder: Callable[..., ImageType],
    text_encoder: Callable[..., TextType],
    config: Config,
    vocab_size: int,
) -> tuple[ImageType, TextType]:
    """As `build_encoders`, for encoders that take the same arguments as the plain ones."""
    image = image_encoder(config.image, config.data.image_size, config.method.batch_norm)
    text = text_encoder(config.text, vocab_size)
    if text.max_tokens is not None and config.data.max_tokens > text.max_tokens:
        raise EncoderError(
            f"data.max_tokens={config.data.max_tokens} exceeds the text model's {text.max_tokens} positions"
        )
    return image, text
