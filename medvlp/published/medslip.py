"""MeDSLIP's `MeDSLIP_resnet50.pth`: the trained parts; BERT and the text book come from elsewhere."""

from collections.abc import Collection
from pathlib import Path

from medvlp.published.reading import PublishedFileError
from medvlp.published.recipe import MIMIC_WINDOW, Origin, Recipe
from medvlp.published.renaming import Rule, part
from shards.entities.vocabulary import OBSERVATIONS
from shards.strict_json import JsonError, parse_json, read_limited

WRAPPERS = ("model",)
_BOOK_LIMIT = 1 << 20

#: Module of timm's ResNet-50 -> its number in the published trunk.
_TRUNK = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6}
_LAYER = r"(pathology|anatomy)_decoder\.layers\.(\d+)\."
_ATTENTIONS = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
_MODULES = {
    "self_norm": "norm1", "query_norm": "norm2", "feed_norm": "norm3",
    "feed_forward.0": "linear1", "feed_forward.3": "linear2",
}  # fmt: skip
_RULES = (
    *(
        Rule(rf"image_encoder\.backbone\.{module}\.(.+)", [rf"res_features.{number}.\1"])
        for module, number in _TRUNK.items()
    ),
    Rule(r"streams\.gate\.(.+)", [r"mask_generator.\1"]),
    Rule(r"streams\.(pathology|anatomy)\.0\.(.+)", [r"res_l1_\1.\2"]),
    Rule(r"streams\.(pathology|anatomy)\.2\.(.+)", [r"res_l2_\1.\2"]),
    Rule(r"queries\.(.+)", [r"pathology_embedding_layer.\1"]),
    *(
        Rule(
            rf"{_LAYER}{ours}\.{name}\.(weight|bias)",
            [rf"decoder_\1.layers.\2.{published}.in_proj_\3"],
            part(number),
        )
        for ours, published in _ATTENTIONS.items()
        for number, name in enumerate(("query", "key", "value"))
    ),
    *(
        Rule(rf"{_LAYER}{ours}\.output\.(.+)", [rf"decoder_\1.layers.\2.{published}.out_proj.\3"])
        for ours, published in _ATTENTIONS.items()
    ),
    *(
        Rule(rf"{_LAYER}{ours}\.(weight|bias)", [rf"decoder_\1.layers.\2.{published}.\3"])
        for ours, published in _MODULES.items()
    ),
    Rule(r"(pathology|anatomy)_decoder\.norm\.(.+)", [r"decoder_\1.norm.\2"]),
    Rule(r"objective\.(pathology|anatomy)_existence\.(.+)", [r"classifier_\1.\2"]),
    Rule(r"objective\.(pathology|anatomy)_projection\.(.+)", [r"cl_fc_\1.\2"]),
)


def recipe(keys: Collection[str]) -> Recipe:
    """The recipe of the published file."""
    values = {
        "data": {
            "image_size": 224,
            "transform": {
                "crop": "area", "area_min": 0.2, "interpolation": "bicubic", "evaluation": "whole",
                "flip": 0.5, "flip_entities": "keep", "rand_augment": 2, "rand_augment_level": 7,
            },
            "max_tokens": 128,
        },
        "image": {
            "name": "resnet50",
            "options": {"zero_init_last": False},
            "local_stage": 3,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "text": {"frozen": True},
        "method": {
            "name": "medslip",
            "width": 256,
            "layers": 4,
            "heads": 4,
            "dropout": 0.1,
            "shared_norm": True,
            "gate": "linear",
            "initialisation": "normal",
            "negatives": "local",
            "batch_norm": "local",
            "prototype_normalise": False,
            "prototype_temperature": 1.0,
            "relation_scale": "one",
            "standardise_book": False,
        },
        "train": {"epochs": 100, "global_batch": 64},
        "optimizer": {
            "lr": 1e-4, "min_lr": 1e-5, "schedule": "epoch_cosine", "warmup_steps": 500, "warmup_stair": 100,
            "weight_decay": 0.02,
        },
        "precision": "fp32",
    }  # fmt: skip
    origin = Origin(
        title="MeDSLIP with ResNet-50",
        paper="MeDSLIP: Medical Dual-Stream Language-Image Pre-training with Pathology-Anatomy Semantic "
        "Alignment, 2024",
        code="pykale/MeDSLIP on GitHub",
        weights="pykale/MeDSLIP on the Hugging Face hub, MeDSLIP_resnet50.pth",
        licence="Look at the licence of that repository and model page. The weights were trained on "
        "MIMIC-CXR, whose data use agreement binds who has the data.",
        data="MIMIC-CXR 2.0 with entities of its reports (RadGraph)",
        text="prompts of up to 128 tokens; the 75 descriptions are the authors' own",
        remarks=[
            "The text encoder and the text book are not in the published file: they were made here of the "
            "text model and the file of descriptions named above.",
            "The published grounding script leaves out the gate and draws its query layer at random, so its "
            "maps cannot be reproduced; the maps here are those of the training model.",
        ],
        window=MIMIC_WINDOW,
    )
    return Recipe(values, _RULES, origin, own=r"(text_encoder|book)\..+")


def read_descriptions(path: Path) -> list[str]:
    """The 75 descriptions of the authors' `observation explanation.json`, in the order of our vocabulary.

    Raises:
        PublishedFileError: not that file. Its order counts; one of its keys is misspelt ("eumonia").
    """
    try:
        values = parse_json(read_limited(path, _BOOK_LIMIT), _BOOK_LIMIT)
    except (OSError, JsonError) as error:
        raise PublishedFileError(f"--book {path} cannot be read as JSON ({error})") from error
    texts = list(values.values()) if isinstance(values, dict) else []
    if len(texts) != len(OBSERVATIONS) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise PublishedFileError(
            f"--book {path} is not MeDSLIP's `observation explanation.json`, which maps "
            f"{len(OBSERVATIONS)} observations to descriptions"
        )
    for number, (key, ours) in enumerate(zip(values, OBSERVATIONS, strict=True)):
        if key != ours and not (len(key) > 4 and ours.endswith(key)):
            raise PublishedFileError(
                f"--book {path}: entry {number + 1} is not {ours!r}; the order of the published file counts"
            )
    return texts
