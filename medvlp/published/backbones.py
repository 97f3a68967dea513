"""An image backbone of timm or a text model of transformers alone, as a run for probes and as a start."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import HFValidationError

from medvlp.data.text import Tokenizer
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.text import TextEncoder
from medvlp.hub import hub_reason, quiet_hub
from medvlp.methods.registry import build_method
from medvlp.published.card import Card
from medvlp.published.reading import PublishedFileError
from medvlp.published.recipe import Origin
from medvlp.published.run import Say, config_of, no_words
from medvlp.published.run_files import check_free, write_run

_UNKNOWN_DATA = "what its authors say of it; nothing of that is stored with the weights"


def import_timm(named: str, out: Path, say: Say) -> Path:
    """Make a run folder of an image backbone.

    Args:
        named: a name of timm with published weights, `hf-hub:` and a name of the hub, or a folder as timm's
            `save_for_hf` (and `medvlp export`, its `image/`) writes it.
        out: a folder that does not exist or is empty.
        say: receives one line of progress at a time.

    Raises:
        PublishedFileError: nothing there that timm builds, or `out` is in use.
        EncoderError: the weights do not fit.
    """
    check_free(out)
    name = _timm_name(named)
    say(f"loading {named} with timm")
    facts = _preprocessing(name, named)
    channels, height, width = facts["input_size"]
    if height != width:
        raise PublishedFileError(f"{named} takes images of {width} x {height}; only squares are read here")
    stored = _stored_side(facts, height)
    values = {
        "data": {
            "image_size": height,
            "transform": {"evaluation": "whole" if stored is None else "center"},
        },
        "image": {
            "name": name,
            "pretrained": True,
            "in_channels": channels,
            "mean": list(facts["mean"]),
            "std": list(facts["std"]),
        },
        "method": {"name": "backbone", "side": "image"},
    }
    config = config_of(values, out)
    tokenizer = no_words()
    method = build_method(config, tokenizer.vocab_size).eval()
    licence = facts.get("license") or "not stored with the weights: look where they are published"
    card = Card(
        _origin(facts.get("architecture") or named, named, licence, "none: there is no text encoder", stored),
        named,
    )
    return write_run(out, config, method, tokenizer, card)


def import_huggingface(named: str, out: Path, say: Say) -> Path:
    """Make a run folder of a text model and its tokenizer.

    Args:
        named: a name of the hub, or a folder as transformers (and `medvlp export`, its `text/`) writes it.
        out, say: as for `import_timm`.

    Raises:
        PublishedFileError: an image model, or `out` is in use.
        EncoderError, ConfigError: no text model or no tokenizer there.
    """
    check_free(out)
    say(f"loading {named} with transformers")
    _refuse_image_model(named)
    tokenizer = Tokenizer.load(_existing(named), ".")
    config = config_of(
        {"text": {"name": _existing(named)}, "method": {"name": "backbone", "side": "text"}}, out
    )
    method = build_method(config, tokenizer.vocab_size).eval()
    encoder = method.text_encoder
    assert isinstance(encoder, TextEncoder)
    if encoder.max_tokens is not None:
        config.data.max_tokens = min(config.data.max_tokens, encoder.max_tokens)
    title = f"{encoder.model.config.model_type} of {Path(named).name}"
    text = f"as the tokenizer takes them, up to {config.data.max_tokens} tokens"
    origin = _origin(title, named, "not stored with the weights: look where they are published", text)
    card = Card(origin, named, tokenizer=named, tokenizer_hash=tokenizer.content)
    return write_run(out, config, method, tokenizer, card)


def _origin(title: str, named: str, licence: str, text: str, stored: int | None = None) -> Origin:
    return Origin(title, "", "", named, f"Licence: {licence}.", _UNKNOWN_DATA, text, stored_side=stored)


def _stored_side(facts: Mapping[str, Any], side: int) -> int | None:
    """Side of the square of which timm's evaluation cuts the middle; None where it sees the whole image."""
    share = facts.get("crop_pct") or 1.0
    if facts.get("crop_mode", "center") != "center" or not 0.1 <= share < 1:
        return None
    return math.floor(side / share + 1e-6)  # as timm does; the share may be a rounded quotient


def _timm_name(named: str) -> str:
    """The name timm builds it by."""
    if Path(named).is_dir():
        if not (Path(named) / "config.json").is_file():
            raise PublishedFileError(
                f"{named} holds no config.json, as timm's folders do: for a single file use "
                "image.weights=FILE with image.name=ARCHITECTURE in a training"
            )
        return f"local-dir:{Path(named).resolve()}"
    if ":" not in named and not timm.is_model(named.split(".")[0]):
        raise PublishedFileError(f"{named} is no folder, no model of timm, and no hf-hub:NAME")
    return named


def _preprocessing(name: str, named: str) -> dict[str, Any]:
    """timm's `pretrained_cfg`: input size, mean, deviation, licence."""
    try:
        with quiet_hub():
            model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, HFValidationError) as error:
        raise PublishedFileError(f"{named} cannot be built by timm: {hub_reason(error)}") from error
    found: dict[str, Any] = model.pretrained_cfg
    return found


def _existing(named: str) -> str:
    return str(Path(named).resolve()) if Path(named).exists() else named


def _refuse_image_model(named: str) -> None:
    import transformers

    try:
        with quiet_hub():
            settings = transformers.AutoConfig.from_pretrained(_existing(named), trust_remote_code=False)
    except (OSError, ValueError, KeyError, HFValidationError) as error:
        raise EncoderError(f"{named} cannot be read: {hub_reason(error)}") from error
    if hasattr(settings, "image_size") or hasattr(settings, "vision_config"):
        raise PublishedFileError(
            f"{named} is an image model ({settings.model_type}): `medvlp import timm` reads image backbones, "
            "in timm's form"
        )
