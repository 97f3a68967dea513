"""The section `data` of a config: what is read, which samples are drawn, how images are seen.

Import it from `medvlp.config`, whose tree it is part of.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from medvlp.config_section import key


@dataclass
class TransformConfig:
    crop: Literal["random", "area", "center", "none"] = key(
        "random",
        "what training sees: a square of at most image_size, a part of the whole image by area and shape "
        "(torchvision's RandomResizedCrop), the center, or all",
    )
    evaluation: Literal["auto", "center", "whole"] = key(
        "auto", "what evaluation sees; auto: the whole image with crop area or none, else the center"
    )
    scale_min: float = key(
        1.0, "smallest side of the random crop as a share of the full crop, in (0, 1]", 0.01, 1
    )
    area_min: float = key(0.2, "with crop area: smallest share of the stored image's area", 1e-3, 1)
    area_max: float = key(1.0, "with crop area: largest share", 1e-3, 1)
    ratio_max: float = key(4 / 3, "with crop area: largest width to height, or inverse", 1, 10)
    interpolation: Literal["area", "bicubic"] = key(
        "area", "how a random part is resized: area averages (bilinear where it grows), or Pillow's bicubic"
    )
    reduced_decoding: bool = key(
        False,
        "true: with crop area or none, a JPEG of which training sees twice the pixels a side that it takes, "
        "or more, is decoded at 1/2, 1/4 or 1/8 (faster; pixels differ a little)",
    )
    rotate: float = key(0.0, "largest rotation of training images in degrees, to either side", 0, 180)
    rand_augment: int = key(0, "operations of RandAugment on a training image (MeDSLIP: 2); 0: none", 0, 10)
    rand_augment_level: float = key(7.0, "their strength, up to 10", 0, 10)
    flip: float = key(
        0.0, "probability of a horizontal flip; changes left and right, so 0 for reports with sides", 0, 1
    )
    flip_entities: Literal["swap", "keep"] = key(
        "swap", "left and right anatomies of a flipped image's entities change places, or stay (published)"
    )
    brightness: float = key(0.0, "largest relative change of brightness, in [0, 1)", 0, 0.99)
    contrast: float = key(0.0, "largest relative change of contrast, in [0, 1)", 0, 0.99)


@dataclass
class DataConfig:
    root: str = key(MISSING, "dataset folder or URL prefix (the place of index.json)")
    split: str = key("train", "split to train on")
    allow_changed: bool = key(
        False,
        "true: resume, and evaluate without --data, though the dataset's content is not what the run was "
        "trained on (added studies), or other samples of it can be read; said in a warning and in "
        "events.jsonl",
    )
    image_size: int = key(224, "side of the square image the encoder sees, in pixels", 8, 8192)
    transform: TransformConfig = field(default_factory=TransformConfig)
    sections: list[str] = key(["findings", "impression"], "report sections, in this order", items=(1, 32))
    cleaning: Literal["none", "mgca"] = key(
        "none", "mgca: lower case and no punctuation, as MGCA's preprocessing"
    )
    views: list[str] = key(
        [], "projections to train on, as the dataset names them (PA, AP, ...); none: all, named or not",
        items=(0, 32),
    )  # fmt: skip
    min_sentences: int = key(1, "sentences a report must have to be trained on", 1, 1000)
    min_tokens: int = key(
        1, "words (runs of letters, digits and _) a report must have to be trained on", 1, 10**6
    )
    images_per_study: Literal["all", "one"] = key(
        "all", "images of a study in an epoch; one: another each time, by chance"
    )
    shuffle_sentences: bool = key(False, "true: the sentences of a report in another order at every access")
    tokenizer: str | None = key(None, "folder or hub name; default: the dataset's tokenizer.json")
    max_tokens: int = key(112, "tokens of a report with [CLS] and [SEP]; longer ones are cut", 4, 1 << 16)
    pad_to_max: bool = key(
        False, "pad every batch to max_tokens instead of its longest report (published quirks)"
    )
    pad_multiple: int | None = key(
        None,
        "pad the reports of a batch to a multiple of so many tokens; default: 1, and 32 with train.compile",
        1,
        1 << 16,
    )
    shuffle_block: int = key(
        4096, "samples permuted together; bounds how far a sample can travel", 1, 1 << 40
    )
    partitions: int = key(
        1, "equal parts of the shards, so that a node reads only its part of a remote dataset", 1, 1 << 20
    )
    tail: Literal["drop", "wrap"] = key(
        "drop", "what happens to the samples that do not fill the last global batch of an epoch"
    )
    workers: int | None = key(
        None,
        "data-loading processes of each rank; 0 loads in the rank itself; default: 2, beside a GPU all but "
        "one of the rank's cores, up to 8",
        0,
        1024,
    )
    prefetch: int = key(2, "batches each worker prepares ahead", 1, 1024)
    max_bad_fraction: float = key(0.01, "share of corrupt samples above which the run stops", 0, 1)
    cache_dir: str | None = key(
        None,
        "node-local folder for remote shards and token ids; default: $MEDVLP_CACHE_DIR, else ~/.cache/medvlp",
    )
    cache_gigabytes: float = key(200.0, "size at which the oldest cached shards are removed", 0, 10**9)
    stall_seconds: float = key(
        60.0, "a remote file that brings less than 1 KiB/s for so long is tried again, three times in all",
        1, 3600,
    )  # fmt: skip
