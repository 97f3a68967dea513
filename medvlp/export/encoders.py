"""Both encoders in the layouts of timm and transformers, each read back and compared with the trained one."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers.utils import logging

from medvlp.data.text import Tokenizer
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.encoders.text_model import NoTokenTypes
from medvlp.export.folder import ExportError

#: Largest difference between the features, as a share of the largest of them: other kernels, same weights.
TOLERANCE = 1e-4


def check_agreement(trained: Tensor, exported: Tensor, what: str) -> None:
    """Compare features of the trained network with those of what was written.

    Raises:
        ExportError: other shapes or other numbers.
    """
    if trained.shape != exported.shape:
        raise ExportError(
            f"{what} gives features of shape {list(exported.shape)}, training had {list(trained.shape)}"
        )
    difference, size = (trained - exported).abs().max().item(), trained.abs().max().item()
    # Written so that NaN fails too.
    if not difference <= TOLERANCE * size:
        raise ExportError(f"{what} gives other features than in training (by {difference:.2g} of {size:.2g})")


#: What timm's config says about the published weights of an architecture, which these weights are not.
_OF_OTHER_WEIGHTS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "description", "notes")


def input_side(encoder: ImageEncoder) -> int:
    """Side in pixels of the images the backbone itself sees (after `image.resize_to`)."""
    return encoder.config.resize_to or encoder.image_size


def write_image(encoder: ImageEncoder, folder: Path, seen: float = 1.0) -> None:
    """Write the backbone so that `timm.create_model("local-dir:FOLDER", pretrained=True)` is that backbone.

    `GlobalBatchNorm` has the parameter names of timm's own batch norms, so the state dict needs no renaming.
    What `ImageEncoder` does around the backbone (normalising, repeating the gray channel, upsampling) is in
    `pretrained_cfg` as far as timm has words for it, and in the model card.

    Args:
        encoder: the image encoder. folder: an existing one.
        seen: share of the side of a square image, about its middle, that evaluation sees.

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
        "crop_pct": seen,
        "crop_mode": "center",
    }
    try:
        save_for_hf(
            encoder.backbone,
            str(folder),
            safe_serialization=True,
            data_config=preprocessing,
        )
    except (ValueError, TypeError) as error:
        raise ExportError(f"image.name={config.name} cannot be described for timm: {error}") from error
    file = folder / "config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    for key in _OF_OTHER_WEIGHTS:
        described["pretrained_cfg"].pop(key, None)
    backbone: Any = encoder.backbone
    if encoder.summarises_patches or (
        getattr(backbone, "global_pool", None) == "avg"
        and isinstance(getattr(backbone, "fc_norm", None), nn.Identity)
    ):
        # The norm stays before the mean: timm's own choice for this pooling would move it behind.
        described.setdefault("model_args", {}).update(global_pool="avg", fc_norm=False)
        described["global_pool"] = "avg"
    file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _read_image_back(encoder, folder)


def _per_channel(value: float | list[float], channels: int) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else (value,) * channels


@torch.no_grad()
def _read_image_back(encoder: ImageEncoder, folder: Path) -> None:
    """Load what was written with plain timm and compare the features that stand for images of noise."""
    try:
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"timm cannot read image.name={encoder.config.name} back: {reason}") from error
    side = input_side(encoder)
    image = torch.randn(2, encoder.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    check_agreement(
        encoder.summary(encoder(image)),
        plain(encoder.prepare(image)),
        f"image.name={encoder.config.name} in timm",
    )


#: Two texts of different length, one with a special token's name in it, for the comparison after writing.
_SENTENCES = ("The heart is enlarged; no [SEP] pleural effusion.", "Normal.")


def load_options(encoder: TextEncoder) -> dict[str, bool]:
    """Arguments of `AutoModel.from_pretrained` that keep it from adding an untrained pooling layer."""
    accepted = inspect.signature(type(encoder.model).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def write_text(encoder: TextEncoder, tokenizer: Tokenizer, max_tokens: int, folder: Path) -> None:
    """Write model and tokenizer so that `AutoModel` and `AutoTokenizer` `.from_pretrained(FOLDER)` are they.

    Args:
        encoder: the text backbone; `text.layers` and `text.options` are in its transformers config already.
        tokenizer: the run's.
        max_tokens: `data.max_tokens`, where the tokenizer cuts with `truncation=True`.
        folder: an existing folder.

    Raises:
        ExportError: weights cannot express an option of the config, or what was written gives other features.
    """
    with _quiet_transformers():
        encoder.model.save_pretrained(folder, state_dict=plain_weights(encoder))
        tokenizer.to_transformers(max_tokens).save_pretrained(str(folder))
        _read_text_back(encoder, tokenizer, max_tokens, folder)


def plain_weights(encoder: TextEncoder) -> dict[str, Tensor]:
    """State dict for an unchanged transformers model that computes the same.

    Without token types the table of them is zero; without positions every row of that table is row 0.

    Raises:
        ExportError: `text.positions=false` in a model without a table of positions.
    """
    weights = dict(encoder.model.state_dict())
    settings = encoder.model.config
    width = encoder.model.get_input_embeddings().embedding_dim
    for name, module in encoder.model.named_modules():
        if isinstance(module, NoTokenTypes):
            weights[f"{name}.weight"] = torch.zeros(settings.type_vocab_size, width)
    if not encoder.config.positions:
        tables = [
            f"{name}.weight"
            for name, module in encoder.model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        ]
        if not tables:
            raise ExportError(
                f"text.positions=false cannot be written as weights: {settings.model_type} models have no "
                "table of positions"
            )
        for name in tables:
            weights[name] = weights[name][:1].expand_as(weights[name]).contiguous()
    return weights


@torch.no_grad()
def _read_text_back(encoder: TextEncoder, tokenizer: Tokenizer, max_tokens: int, folder: Path) -> None:
    """Load what was written with plain transformers and compare token ids and hidden states."""
    what = f"text.model_type={encoder.model.config.model_type} in transformers"
    try:
        plain: Any = transformers.AutoModel.from_pretrained(folder, **load_options(encoder)).eval()
        plain_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{what} cannot be read back: {' '.join(str(error).split())[:300]}") from error
    text = tokenizer.tokenize([[sentence] for sentence in _SENTENCES], max_tokens)
    tokens = plain_tokenizer(list(_SENTENCES), padding=True, truncation=True, return_tensors="pt")
    if not torch.equal(text.input_ids, tokens["input_ids"]):
        raise ExportError(f"the tokenizer gives other token ids in transformers than in training ({folder})")
    keep = text.attention_mask[..., None]
    check_agreement(encoder(text).hidden * keep, plain(**tokens).last_hidden_state * keep, what)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars for a second's work, and no load reports: what was loaded is compared here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
