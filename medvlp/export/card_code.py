"""The Python in a model card: loads the encoders with plain libraries and computes features."""

from __future__ import annotations

from medvlp.config import Config
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.export.text import load_options

_IMPORTS = """\
import numpy as np
import timm
import torch
from PIL import Image
"""

_IMAGE = """
encoder = timm.create_model("local-dir:image", pretrained=True).eval()
# A square film; "Preprocessing" says how training cut and fitted its own.
film = Image.open("film.png").convert("L").resize(({side}, {side}), Image.Resampling.BILINEAR)
pixels = torch.from_numpy(np.array(film, dtype=np.float32))[None, None] / 255
pixels = (pixels - {mean}) / {std}
"""

_RESIZE = """\
pixels = torch.nn.functional.interpolate(pixels, size=({side}, {side}), mode="bilinear", align_corners=True)
"""

_REPEAT = """\
pixels = pixels.repeat(1, {channels}, 1, 1)
"""

_FEATURES = """\
with torch.no_grad():
    image_features = encoder(pixels)  # [1, {width}]
"""

_TEXT = """
tokenizer = AutoTokenizer.from_pretrained("text")
text_encoder = AutoModel.from_pretrained("text"{options}).eval()
tokens = tokenizer(["no pleural effusion"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    text_features = text_encoder(**tokens).last_hidden_state  # [1, tokens, {width}]
"""

_HEADS = """
heads = load_file("heads.safetensors")  # name in the method -> tensor
"""


def loading_code(config: Config, image: ImageEncoder, text: TextEncoder | None) -> str:
    """Code that runs as it is in the exported folder, beside an image `film.png`."""
    parts = [_IMPORTS, "from safetensors.torch import load_file\n"]
    if text is not None:
        parts.append("from transformers import AutoModel, AutoTokenizer\n")
    mean, std = (_constant(value) for value in (config.image.mean, config.image.std))
    parts.append(_IMAGE.format(side=config.data.image_size, mean=mean, std=std))
    if config.image.resize_to is not None:
        parts.append(_RESIZE.format(side=config.image.resize_to))
    one_channel = not any(isinstance(value, list) for value in (config.image.mean, config.image.std))
    if config.image.in_channels > 1 and one_channel:
        parts.append(_REPEAT.format(channels=config.image.in_channels))
    parts.append(_FEATURES.format(width=image.width))
    if text is not None:
        options = "".join(f", {name}={value}" for name, value in load_options(text).items())
        parts.append(_TEXT.format(options=options, width=text.width))
    return "".join([*parts, _HEADS])


def _constant(value: float | list[float]) -> str:
    """Python of a mean or deviation; one per channel turns one channel into as many."""
    return f"torch.tensor({value})[:, None, None]" if isinstance(value, list) else str(value)
