"""Encoders that a config names (folders, the hub) as a run stores them: described, so nothing is fetched."""

import copy
import json
from typing import Any

import torch
import transformers
import xxhash
from torch import nn

from medvlp.config import Config
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.runs.identity import IdentityError, RunIdentity

#: Keys of a transformers config that say nothing about the network.
_NOT_SHAPE = frozenset({
    "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "problem_type", "torch_dtype",
    "transformers_version",
})  # fmt: skip
#: Arguments of timm.create_model that other keys of the config give.
_GIVEN_ELSEWHERE = frozenset({"img_size", "in_chans", "num_classes"})
#: Tensors that timm resamples to the image size, which ends in other last bits on other processors.
_RESAMPLED = ("pos", "patch_embed")


def describe_encoders(method: nn.Module, config: Config) -> dict[str, dict[str, Any]]:
    """What `described` builds the same networks from, without the places that the config names."""
    found: dict[str, dict[str, Any]] = {}
    text, image = _first(method, TextEncoder), _first(method, ImageEncoder)
    if config.text.name is not None and text is not None:
        settings = text.model.config
        known = transformers.AutoConfig.for_model(settings.model_type).to_dict()
        options = {
            name: value
            for name, value in settings.to_dict().items()
            if name in known and name not in _NOT_SHAPE and not name.startswith("_")
        }
        found["text"] = {"model_type": settings.model_type, "options": json.loads(json.dumps(options))}
    if ":" in config.image.name and image is not None:
        arguments = dict(getattr(image.backbone, "_model_args", {}))
        found["image"] = {
            "name": image.backbone.pretrained_cfg["architecture"],
            "options": {name: value for name, value in arguments.items() if name not in _GIVEN_ELSEWHERE},
        }
    return found


def described(config: Config, identity: RunIdentity | None) -> Config:
    """A copy of the config whose method has the run's networks at random; the weights are saved."""
    built = copy.deepcopy(config)
    built.image.pretrained, built.image.weights = False, None
    records = {} if identity is None else identity.encoders
    if "text" in records:
        built.text.name, built.text.layers = None, None
        built.text.model_type, built.text.options = records["text"]["model_type"], records["text"]["options"]
    if "image" in records:
        built.image.name, built.image.options = records["image"]["name"], records["image"]["options"]
    return built


def starting_weights(method: nn.Module, config: Config) -> dict[str, str]:
    """Hashes of the published weights that a method just built begins with; none for random ones."""
    text, image = _first(method, TextEncoder), _first(method, ImageEncoder)
    found = {}
    if image is not None and (config.image.pretrained or config.image.weights):
        found["image"] = _weights_hash(image.backbone)
    if text is not None and config.text.name is not None:
        found["text"] = _weights_hash(text.model)
    return found


def check_start(method: nn.Module, config: Config, identity: RunIdentity | None) -> None:
    """Refuse an untrained network that does not begin with the weights the run began with.

    Raises:
        IdentityError: published weights are others today; names the key.
    """
    now = starting_weights(method, config)
    for part, then in ({} if identity is None else identity.start).items():
        if part != "run" and now.get(part) != then:  # of a run: `medvlp.runs.start`
            key, value = ("text.name", config.text.name) if part == "text" else ("image.weights", None)
            if part == "image":
                value = config.image.weights or f"(published weights of {config.image.name})"
            raise IdentityError(
                f"{key}={value} holds other weights than those the run was started from, so the network "
                f"before training cannot stand beside it: give the old ones with {key}=PATH"
            )


def _first(method: nn.Module, kind: type[Any]) -> Any:
    return next((module for module in method.modules() if isinstance(module, kind)), None)


def _weights_hash(module: nn.Module) -> str:
    digest = xxhash.xxh3_128()
    for name, value in sorted(module.state_dict().items()):
        if not any(part in name for part in _RESAMPLED):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"xxh3:{digest.hexdigest()}"
