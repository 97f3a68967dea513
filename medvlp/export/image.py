"""The image encoder as timm's hub layout has it: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

from medvlp.encoders.image import ImageEncoder
from medvlp.export.agreement import check_agreement
from medvlp.export.errors import ExportError

#: What timm's config says about the published weights of an architecture, which these weights are not.
_OF_OTHER_WEIGHTS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "description", "notes")


def input_side(encoder: ImageEncoder) -> int:
    """Side in pixels of the images the backbone itself sees (after `image.resize_to`)."""
    return encoder.config.resize_to or encoder.image_size


def write_image(encoder: ImageEncoder, folder: Path) -> None:
    """Write the backbone so that `timm.create_model("local-dir:FOLDER", pretrained=True)` is that backbone.

    `GlobalBatchNorm` has the parameter names of timm's own batch norms, so the state dict needs no renaming.
    What `ImageEncoder` does around the backbone (normalising, repeating the gray channel, upsampling) is in
    `pretrained_cfg` as far as timm has words for it, and in the model card.

    Raises:
        ExportError: a shortened backbone, options that cannot be written, or what was written gives other
            features.
    """
    config, side = encoder.config, input_side(encoder)
    if encoder.shortened:
        raise ExportError(
            f"this method trains image.name={config.name} only up to stage {config.local_stage} "
            "(image.local_stage), and timm loads whole architectures; its weights are in the checkpoint "
            "(medvlp checkpoints RUN --to-safetensors OUT)"
        )
    preprocessing = {
        "input_size": (config.in_channels, side, side),
        "mean": _per_channel(config.mean, config.in_channels),
        "std": _per_channel(config.std, config.in_channels),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    try:
        save_for_hf(encoder.backbone, str(folder), safe_serialization=True, data_config=preprocessing)
    except (ValueError, TypeError) as error:
        raise ExportError(f"image.name={config.name} cannot be described for timm: {error}") from error
    file = folder / "config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    for key in _OF_OTHER_WEIGHTS:
        described["pretrained_cfg"].pop(key, None)
    file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _check(encoder, folder)


def _per_channel(value: float | list[float], channels: int) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,) * channels


@torch.no_grad()
def _check(encoder: ImageEncoder, folder: Path) -> None:
    """Load what was written with plain timm and compare pooled features of noise."""
    try:
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"timm cannot read image.name={encoder.config.name} back: {reason}") from error
    side = input_side(encoder)
    image = torch.randn(2, encoder.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    check_agreement(
        encoder(image).pooled, plain(encoder.prepare(image)), f"image.name={encoder.config.name} in timm"
    )
