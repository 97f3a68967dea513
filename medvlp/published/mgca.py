"""MGCA's `vit_base.ckpt` and `resnet_50.ckpt`: Lightning checkpoints of the whole model."""

from collections.abc import Collection
from typing import Any

from medvlp.published.recipe import BERT_BASE, MIMIC_WINDOW, Origin, Recipe
from medvlp.published.renaming import Rule, same, without_last_axis

WRAPPERS = ("state_dict",)

_IMAGE, _TEXT = "img_encoder_q", "text_encoder_q"
#: Our layer of a projection head -> its number in the published one, and whether it has weights of 1x1
#: convolutions.
_LAYERS = {"linear1": 0, "norm1": 1, "linear2": 3, "norm2": 4}
_HEADS = {
    "image_head": f"{_IMAGE}.global_embed",
    "patch_head": f"{_IMAGE}.local_embed",
    "report_head": f"{_TEXT}.global_embed",
    "word_head": f"{_TEXT}.local_embed",
}
_RULES = (
    Rule(r"image_encoder\.backbone\.(.+)", [rf"{_IMAGE}.model.\1"]),
    Rule(r"text_encoder\.model\.(.+)", [rf"{_TEXT}.model.\1"]),
    Rule(r"alignment\.objective\.prototypes\.weight", ["prototype_layer.weight"]),
    *(
        Rule(
            rf"alignment\.{ours}\.{layer}\.(.+)",
            [rf"{published}.head.{number}.\1"],
            without_last_axis if layer.startswith("linear") else same,
        )
        for ours, published in _HEADS.items()
        for layer, number in _LAYERS.items()
    ),
)
_UNUSED = {
    rf"{_TEXT}\.model\.embeddings\.position_ids": "positions are counted",
    rf"{_TEXT}\.model\..*\.crossattention\..+": "no forward of the text encoder reads it",
    r"(patch|word)_local_atten_layer\..+": "built and never called in the published code",
}
_IMAGES: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit_base_patch16_224"},
    "resnet": {"name": "resnet50", "resize_to": 299, "local_stage": 3},
}


def recipe(keys: Collection[str]) -> Recipe:
    """The recipe of a file with these keys, which tell its image encoder."""
    kind = "resnet" if any(key.startswith(f"{_IMAGE}.model.layer1.") for key in keys) else "vit"
    values = {
        "data": {
            "image_size": 224,
            "views": ["PA", "AP"],
            "min_tokens": 3,
            "sections": ["impression", "findings"],
            "cleaning": "mgca",
            "max_tokens": 112,
            "pad_to_max": True,
        },
        "image": {**_IMAGES[kind], "mean": 0.5, "std": 0.5},
        "text": {"options": BERT_BASE, "layers": 6, "positions": False, "token_types": False},
        "method": {
            "name": "mgca",
            "embedding": 128,
            "head_hidden": 2048,
            "prototypes": 500,
            "batch_norm": "local",
            "negatives": "local",
            "same_study": "negatives",
            "normalise_patch_context": kind == "resnet",
            "separator_word": True,
            "padding_negatives": True,
            "padding_statistics": True,
            "attention_off_by_one": True,
            "lost_last_word": True,
        },
        "train": {"seed": 42, "epochs": 50, "global_batch": 144},
        "optimizer": {"lr": 2e-5, "min_lr": 1e-8, "warmup": 0.4, "weight_decay": 0.05, "decay_all": True},
        "precision": "fp32",
    }
    origin = Origin(
        title=f"MGCA with {'ResNet-50' if kind == 'resnet' else 'ViT-B/16'}",
        paper="Wang et al., Multi-Granularity Cross-modal Alignment for Generalized Medical Visual "
        "Representation Learning, NeurIPS 2022",
        code="HKU-MedAI/MGCA on GitHub",
        weights="a Google Drive folder that its README links to",
        licence="The repository states no licence, so none is granted: ask its authors before you pass these "
        "weights on or build a product on them. They were trained on MIMIC-CXR, whose data use agreement "
        "binds who has the data.",
        data="MIMIC-CXR 2.0, frontal views with their reports (217 k pairs by the paper)",
        text="lower case without punctuation (data.cleaning=mgca), 112 tokens",
        remarks=[
            "The config holds the published code's behaviour, quirks included "
            "(configs/methods/mgca-official.yaml lists them): every token is at position 0, words take the "
            "next token's attention.",
        ],
        stored_side=256,
        window=MIMIC_WINDOW,
    )
    return Recipe(values, _RULES, origin, _UNUSED)
