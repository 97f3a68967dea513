"""What image and text backbones are built with: options, local weight files, and the error of either."""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medvlp.config import ImageConfig
from medvlp.tensor_files import TensorFileError, read_torch_file
from shards.errors import MedvlpError


class EncoderError(MedvlpError, ValueError):
    """A backbone, its weights or its input do not fit the config; the message names the config key."""

    exit_code = 2


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A dict without OmegaConf containers, which timm and transformers would not take for lists."""
    if OmegaConf.is_config(options):
        return OmegaConf.to_container(options, resolve=True)  # type: ignore[return-value]
    return dict(options)


def at_size(name: str, size: int, options: Mapping[str, Any]) -> Any:
    """A timm model with these options, for images of `size` pixels where it has an input size."""
    try:
        return timm.create_model(name, **{"img_size": size, **options})
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def wrong_option(config: ImageConfig, size: int) -> str:
    """Of the options of a timm model that cannot be built the one without which it can; else all of them."""
    given = plain_options(config.options)
    for name, value in given.items():
        others = {of: given[of] for of in given if of != name}
        with suppress(Exception), torch.device("meta"):  # what timm raises differs by network
            at_size(config.name, size, {"num_classes": 0, "in_chans": config.in_channels, **others})
            return f"image.options.{name}={str(value)[:100]}, without which it can"
    return "image.options"


#: Keys under which training scripts wrap a model's weights.
WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or a torch file, names as stored ("module." of DDP removed).

    Raises:
        EncoderError: no such file, not a weight file, or one that needs unpickling of arbitrary objects.
    """
    file = Path(path)
    if not file.is_file():
        raise EncoderError(f"weights file {path} does not exist")
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = read_torch_file(file)
    except (SafetensorError, TensorFileError, OSError) as error:
        raise EncoderError(f"weights file {path} cannot be read as tensors: {error}") from error
    while isinstance(content, dict):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise EncoderError(f"weights file {path} holds no named tensors")
    return {
        name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)
    }


def unknown_model(name: str) -> str:
    """What is said of an `image.name` that timm does not know, with names like it."""
    base = name.split(".")[0]
    similar = difflib.get_close_matches(base, timm.list_models(), n=3)
    similar += [model for model in timm.list_models(f"*{base.split('_')[0]}*") if model not in similar]
    shown = f"similar names: {', '.join(similar[:5])}" if similar else "`timm.list_models()` lists them"
    return f"image.name={name} is not a timm model; {shown}"
