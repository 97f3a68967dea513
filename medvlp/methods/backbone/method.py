"""An image or a text encoder alone, as `medvlp import timm` and `huggingface` make it: for probes."""

from functools import partial
from typing import NoReturn

from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.encoders.image import ImageEncoder, ImageFeatures
from medvlp.encoders.text import TextEncoder
from medvlp.methods.backbone.config import BackboneConfig
from medvlp.methods.base import Method, StepOutput
from medvlp.methods.registry import register
from medvlp.prototypes.table import PrototypeTable


class Backbone(Method):
    """One encoder under the name it has in every method, so that its weights can start one.

    Args:
        encoder: the image or the text encoder.
    """

    def __init__(self, encoder: ImageEncoder | TextEncoder) -> None:
        super().__init__()
        self.image_encoder = encoder if isinstance(encoder, ImageEncoder) else None
        self.text_encoder = encoder if isinstance(encoder, TextEncoder) else None

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        self._refuse("has no loss")

    def encode_image(self, image: Tensor) -> Tensor:
        self._refuse("embeds no images")

    def encode_text(self, text: Text) -> Tensor:
        self._refuse("embeds no reports")

    def image_features(self, image: Tensor) -> Tensor:
        if self.image_encoder is None:
            self._refuse("has no image encoder")
        features: ImageFeatures = self.image_encoder(image)
        return features.pooled

    @property
    def embeds_images(self) -> bool:
        return False

    @property
    def embeds_reports(self) -> bool:
        return False

    @property
    def has_image_features(self) -> bool:
        return self.image_encoder is not None

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise NotImplementedError(f"a backbone alone {what}: it shares no space with texts")


@register("backbone", BackboneConfig)
def build(config: Config, vocab_size: int) -> Backbone:
    """The one encoder that `method.side` names (see `medvlp.methods.registry.build_method`)."""
    method: BackboneConfig = config.method  # type: ignore[assignment]
    image = partial(ImageEncoder, config.image, config.data.image_size, method.batch_norm)
    return Backbone(image() if method.side == "image" else TextEncoder(config.text, vocab_size))
