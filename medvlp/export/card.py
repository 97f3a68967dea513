"""The model card: `README.md` of an export."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from medvlp.config import Config
from medvlp.data.transforms import evaluation_crop
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.export.data_facts import DataFacts
from medvlp.export.encoders import load_options
from medvlp.runs.manifest import WEIGHTS, Manifest

#: Sections of the config the card repeats; config.yaml has all of them. None of these keys names a place.
_SUMMARY = {
    "image": ("name", "pretrained", "options", "in_channels", "resize_to", "local_stage", "frozen"),
    "text": ("model_type", "options", "layers", "dropout", "positions", "token_types", "frozen"),
    "data": ("split", "image_size", "sections", "cleaning", "max_tokens", "tail"),
    "optimizer": ("name", "lr", "min_lr", "betas", "weight_decay"),
    "train": ("seed", "gradient_clip"),
}


@dataclass(frozen=True)
class Results:
    """An evaluation of the run: step and checksum of the weights, and its tables as Markdown."""

    step: int
    markdown: str
    weights: str = ""  # of files of versions that stored none


@dataclass(frozen=True)
class Card:
    """Everything the card tells of.

    Attributes:
        name: of the run.
        config, manifest: of the run and the checkpoint.
        data: what it was trained on.
        image, text: the encoders; text is None where the method trains none of its own.
        heads: name -> tensor of everything else.
        results: the run's evaluation, or None.
        stored: side of the square that images are fitted into before the view of the network is cut.
        origin: of imported weights, where they come from (`RunIdentity.origin`); {} of trained ones.
        start_origin: of trained ones, that of the run they began with (`RunIdentity.start_origin`).
    """

    name: str
    config: Config
    manifest: Manifest
    data: DataFacts
    image: ImageEncoder
    text: TextEncoder | None
    heads: Mapping[str, Tensor]
    results: Results | None
    stored: int
    origin: Mapping[str, str] = field(default_factory=dict)
    start_origin: Mapping[str, str] = field(default_factory=dict)


def model_card(card: Card) -> str:
    """The Markdown text; its Python block runs as it is inside the exported folder."""
    code = loading_code(card.config, card.image, card.text)
    sections = {
        "Intended use and limits": _intended_use(),
        "Files": _files(card),
        "How to load": f"In this folder:\n\n```python\n{code}```\n",
        "Preprocessing": _preprocessing(card),
        "Training data": _data(card.data),
        "Training": _training(card),
        "Evaluation": _evaluation(card),
        "Licence": _licence(card),
    }
    tags = ("medical", "image-text", card.config.method.name)
    header = "".join(["---\nlibrary_name: timm\ntags:\n", *(f"- {tag}\n" for tag in tags), "---\n"])
    body = "\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"{header}\n# {card.name}\n\n{_summary(card)}\n\n{body}"


def _summary(card: Card) -> str:
    text = f" and {card.text.model.config.model_type} (text)" if card.text is not None else ""
    if card.origin:
        return (
            f"Encoders of published weights, {card.origin['title']}: {card.config.image.name} (image){text}. "
            "Read by `medvlp import`, written by `medvlp export`; not trained in between."
        )
    return (
        f"Encoders pre-trained on image-report pairs with the method {card.config.method.name}: "
        f"{card.config.image.name} (image){text}, after {card.manifest.step:,} optimiser steps. "
        "Made by `medvlp export`."
    )


def _intended_use() -> str:
    return (
        "For research: as a starting point for training, for feature extraction, for comparison of methods. "
        "**Not for clinical use**: this is no medical device, and nothing here was validated for diagnosis, "
        "triage or any decision about a patient.\n\n"
        "Expect it to fail outside its training data: other devices, views, populations, languages and "
        "reporting habits. It takes over whatever errors and biases the reports have. Measure it on your own "
        "data, by subgroup, before relying on a number.\n"
    )


def _files(card: Card) -> str:
    lines = [
        f"- `image/`: image encoder for timm, {_size(card.image.backbone)}; {card.image.width} features",
    ]
    if card.text is not None:
        lines.append(
            f"- `text/`: text encoder and tokenizer for transformers, {_size(card.text.model)}; "
            f"{card.text.width} features a token"
        )
    count = sum(value.numel() for value in card.heads.values())
    lines += [
        f"- `heads.safetensors`: everything else of the method under its names there, {count:,} values",
        "- `config.yaml`: the whole config of the run",
    ]
    lines += ["", *_remarks(card)]
    rows = [f"| `{name}` | {values:,} |" for name, values in _modules(card.heads).items()]
    table = ["", "| in heads.safetensors | values |", "|---|---:|", *rows] if rows else []
    return "\n".join([*lines, *table]) + "\n"


def _remarks(card: Card) -> list[str]:
    """What is missing from the folder, and what in it was not trained here."""
    method = card.config.method.name
    remarks = ["Left out: optimiser, scheduler and random states; the run's checkpoint has them."]
    if card.text is None:
        remarks.append(f"Left out: `text/`; the method {method} has no text encoder of this form.")
    frozen = [
        ("image/", card.config.image.frozen),
        ("text/", card.config.text.frozen and card.text is not None),
    ]
    return remarks + [
        f"`{part}` was frozen: it holds the weights training started from." for part, fixed in frozen if fixed
    ]


def _modules(heads: Mapping[str, Tensor]) -> dict[str, int]:
    """First two parts of the names -> number of values below them."""
    sizes: dict[str, int] = {}
    for name, value in heads.items():
        module = ".".join(name.split(".")[:2])
        sizes[module] = sizes.get(module, 0) + value.numel()
    return sizes


def _preprocessing(card: Card) -> str:
    config, side = card.config, card.config.data.image_size
    crop = (
        "the whole image is resized"
        if evaluation_crop(config.data.transform) == "none"
        else "the center is cut out (a smaller image is resized)"
    )
    channels = f", repeated to {config.image.in_channels} channels" if config.image.in_channels > 1 else ""
    stored = card.data.data.image_size if card.data.data else card.stored
    lines = [
        f"- Images: 8-bit gray, stored fitted into a square of {stored} pixels; of that "
        f"{crop} to {side}×{side}. Divided by 255, minus {config.image.mean}, divided by "
        f"{config.image.std}{channels}.",
    ]
    if config.image.resize_to is not None:
        lines.append(
            f"- Then resized to {config.image.resize_to}×{config.image.resize_to}, bilinear, corners aligned."
        )
    if card.text is not None:
        cleaning = (
            "as they are"
            if config.data.cleaning == "none"
            else "lower case, without punctuation (MGCA's cleaning)"
        )
        lines.append(
            f"- Reports: sections {', '.join(config.data.sections)}, {cleaning}, sentences joined by one "
            f"space, cut at {config.data.max_tokens} tokens."
        )
    return "\n".join(lines) + "\n"


def _data(facts: DataFacts) -> str:
    data = facts.data
    if data is None:
        return "Not stored with the weights, which were imported: see what their authors say.\n"
    totals = data.splits[data.split]
    known = [licence for licence in data.licences if licence]
    licence = "; ".join(known) if known else "not stored with the samples"
    if known and "" in data.licences:
        licence += "; of some samples not stored"
    if not data.asked:
        licence = "not looked at: `medvlp export --data` does"
    earlier = "".join(
        f"- from step {record.from_step:,}: dataset {record.name}, `{record.fingerprint}`\n"
        for record in facts.earlier
    )
    since = f", from step {data.from_step:,}" if facts.earlier else ""
    return (
        f"{earlier}- dataset {data.name}, `{data.fingerprint}`, split {data.split}{since}\n"
        f"- {totals['samples']:,} samples of {totals['studies']:,} studies and "
        f"{totals['patients']:,} patients\n"
        f"- licence as stored (read from {data.asked} samples): {licence}\n"
        f"- tokenizer: {_tokenizer(facts)}\n\n"
        "No image, report or identifier of the data is in this folder, apart from what weights and the words "
        "of the tokenizer may hold.\n"
    )


def _tokenizer(facts: DataFacts) -> str:
    """What the tokenizer was trained on, and whose words may be in it."""
    record = facts.tokenizer_from
    if record is None or record.trained_tokenizer is None:
        return (
            "not trained on the reports of this data as far as is stored; what it was trained on is not known"
        )
    patients, least = record.trained_tokenizer["patients"], record.trained_tokenizer["min_patients"]
    trained = f"WordPiece trained on the reports of {patients:,} patients (train split of {record.name})"
    if least is None or least <= 1:
        return f"{trained}, with words of single patients: **do not publish it if the reports are private**"
    return (
        f"{trained}; only words in the reports of at least {least} patients took part, others are spelled by "
        "characters and pieces of such words"
    )


def _training(card: Card) -> str:
    manifest, config = card.manifest, card.config
    master = (
        "" if manifest.precision == "fp32" else " with float32 master weights, which are the ones exported"
    )
    facts = {
        **(
            _imported(card)
            if card.origin
            else {
                "optimiser steps": f"{manifest.step:,} (epoch {manifest.epoch + 1})",
                "samples seen": f"{manifest.step * manifest.global_batch:,}, {manifest.global_batch} a step",
                "precision": f"{manifest.precision}{master}",
                "ranks, ZeRO stage": f"{manifest.world_size}, {manifest.zero_stage}",
                "saved": manifest.created,
            }
        ),
        "config": f"xxh3-128 `{manifest.config_hash}`",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    tree = dataclasses.asdict(config)
    values = {f"method.{key}": value for key, value in tree["method"].items()}
    values |= {f"{section}.{key}": tree[section][key] for section, keys in _SUMMARY.items() for key in keys}
    told = "".join(f"- {name}: {value}\n" for name, value in facts.items() if value)
    rows = "".join(f"| `{key}` | {_plain(value)} |\n" for key, value in values.items())
    return f"{told}\n| config | |\n|---|---|\n{rows}"


def _imported(card: Card) -> dict[str, str]:
    """In place of what a training would say."""
    file, sha256 = card.origin["file"], card.origin.get("sha256", "")
    return {
        "trained": "elsewhere; the config repeats what is published of it",
        "imported": card.manifest.created,
        "read from": f"{file}, sha256 `{sha256}`" if sha256 else file,
    }


def _evaluation(card: Card) -> str:
    if card.results is None:
        return "None is stored with the run.\n"
    if card.results.step != card.manifest.step:
        return (
            f"The evaluation stored with the run is of step {card.results.step:,}, not of these weights "
            f"(step {card.manifest.step:,}), and is left out.\n"
        )
    if card.results.weights not in ("", card.manifest.files[WEIGHTS]["xxh3_128"]):
        return (
            "The evaluation stored with the run is of other weights after as many steps, and is left out.\n"
        )
    return card.results.markdown


def _licence(card: Card) -> str:
    image, text = card.config.image, card.config.text
    if card.origin:
        return f"{card.origin['licence']}\n"
    started = [f"published weights of {image.name}"] if image.pretrained else []
    started += ["weights from a local file (image)"] if image.weights else []
    if card.text is not None and text.name is not None:
        started.append("a published text model (`text.name` in config.yaml)")
    if card.config.train.start is not None:
        started.append(_start(card.start_origin))
    start = (
        f"Training started from {', '.join(started)}."
        if started
        else "All weights were trained from scratch."
    )
    return (
        f"{start} This program chooses no licence for the result: the terms of the data and of such weights "
        "hold. Set one here before you publish, and look through config.yaml, which names paths of the "
        "machine it was trained on.\n"
    )


def _start(origin: Mapping[str, str]) -> str:
    """The run of `train.start`; versions before stored nothing of it."""
    run = f"the run {origin['run']}" if "run" in origin else "another run"
    said = f"the weights of {run} (`train.start`), whose own terms and training data hold too"
    if "licence" not in origin:
        return said
    sha256 = f", sha256 `{origin['sha256']}`" if origin.get("sha256") else ""
    return (
        f"{said}. It goes back to {origin.get('title', 'imported weights')} "
        f"({origin.get('file', 'a file')}{sha256}), whose training data are not stored here; licence of "
        f"those weights: {origin['licence'].rstrip('.')}"
    )


def _size(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters"


def _plain(value: Any) -> str:
    """A value inside a table cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


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
