"""The networks that are evaluated, and one pass over a split: what each makes of images and reports, and the
32x32 pixels."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.text import Tokenizer
from medvlp.evaluation.task import EvaluationError
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method
from medvlp.runs import saved_run
from medvlp.runs.encoder_records import check_start
from medvlp.runs.randomness import random_state, restore_random_state, seed_weights
from medvlp.runs.saved_run import SavedRun
from medvlp.runs.start import begin_again
from shards.errors import NotFiniteError

#: Side of the images of the pixel baseline.
PIXELS = 32


@dataclass(frozen=True)
class Wanted:
    """What a pass computes; pixels always."""

    image: bool = False
    text: bool = False
    features: bool = False
    #: Sets of prompts, tokenised, for methods that score pairs in their own way (see
    #: `Method.scores_by_embedding`). Each is scored by itself, so that no set changes the numbers of another.
    prompts: Mapping[tuple[str, ...], Text] = field(default_factory=dict)


@dataclass
class ModelArrays:
    """What one model makes of a split; fields not asked for are None.

    Attributes:
        image, text: [N, D] unit-norm embeddings; no `text` of methods that embed no reports.
        features: [N, F] backbone features.
        scores: set of prompts -> [N, prompts] similarities, only for methods with their own `score`.
    """

    image: NDArray[Any] | None = None
    text: NDArray[Any] | None = None
    features: NDArray[Any] | None = None
    scores: dict[tuple[str, ...], NDArray[Any]] = field(default_factory=dict)


@dataclass
class SplitArrays:
    """A split in numbers: positions `sample` [N] in the split, `pixels` [N, 1024], each model's arrays."""

    sample: NDArray[Any]
    pixels: NDArray[Any]
    models: dict[str, ModelArrays] = field(default_factory=dict)


def exact_kernels() -> AbstractContextManager[None]:
    """Inside, convolutions on a GPU are made in float32 (torch's default is TF32, whatever matrix products
    are made in) and are the same every time.

    Slower than training's choice of kernels by trial; the numbers of the CPU are worth more in an evaluation.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


@torch.no_grad()
def embed(
    models: Mapping[str, Method], batches: Iterable[Batch], wanted: Wanted, device: torch.device
) -> SplitArrays:
    """Run all models over the batches once, in evaluation mode and float32.

    Args:
        models: methods by name, on `device`; their training mode is restored afterwards.
        batches: an evaluation loader's batches.
        wanted: what to compute.
        device: where the models are.

    Raises:
        EvaluationError: the loader yields no batch.
        NotFiniteError: a model gives values that are not finite.
    """
    training = {name: method.training for name, method in models.items()}
    for method in models.values():
        method.eval()
    prompts = {sentences: text.to(device) for sentences, text in wanted.prompts.items()}
    parts: dict[str, dict[str | tuple[str, ...], list[NDArray[Any]]]] = {name: {} for name in models}
    samples, pixels = [], []
    with exact_kernels():
        for batch in batches:
            samples.append(batch.sample.numpy().copy())
            batch = batch.to(device)
            pixels.append(shrink(batch.image))
            for name, method in models.items():
                for key, value in _forward(method, batch, wanted, prompts).items():
                    parts[name].setdefault(key, []).append(value.float().cpu().numpy())
    for name, method in models.items():
        method.train(training[name])
    if not samples:
        raise EvaluationError("the split holds no readable sample")
    arrays = {}
    for name, of in parts.items():
        joined = {key: np.concatenate(rows) for key, rows in of.items()}
        for key, array in joined.items():
            if not np.isfinite(array).all():
                what = key if isinstance(key, str) else "scores of prompts"
                raise NotFiniteError(f"{what} of the {name} network")
        found = {key: array for key, array in joined.items() if isinstance(key, str)}
        scores = {key: array for key, array in joined.items() if isinstance(key, tuple)}
        arrays[name] = ModelArrays(**found, scores=scores)
    return SplitArrays(np.concatenate(samples), np.concatenate(pixels), arrays)


def _forward(
    method: Method, batch: Batch, wanted: Wanted, prompts: Mapping[tuple[str, ...], Text]
) -> dict[str | tuple[str, ...], torch.Tensor]:
    found: dict[str | tuple[str, ...], torch.Tensor] = {}
    if wanted.image:
        found["image"] = method.encode_image(batch.image)
    if wanted.text and method.embeds_reports:
        found["text"] = method.encode_text(batch.text)
    if wanted.features:
        found["features"] = method.image_features(batch.image)
    for sentences, text in prompts.items() if not method.scores_by_embedding else ():
        found[sentences] = method.score(batch.image, text)
    return found


def shrink(image: torch.Tensor) -> NDArray[Any]:
    """[B, 1, H, W] uint8 images -> [B, 1024] float32 means over a grid of 32x32 areas, in [0, 1]."""
    small = F.interpolate(image.float() / 255, size=(PIXELS, PIXELS), mode="area")
    return small.flatten(1).cpu().numpy()


@torch.no_grad()
def embed_texts(method: Method, text: Text, device: torch.device, batch: int = 64) -> NDArray[Any]:
    """[N, D] embeddings of tokenised texts, in evaluation mode and float32."""
    training = method.training
    method.eval()
    rows = [
        method.encode_text(_rows(text, slice(start, start + batch)).to(device)).float().cpu().numpy()
        for start in range(0, len(text.input_ids), batch)
    ]
    method.train(training)
    return np.concatenate(rows)


def _rows(text: Text, rows: slice) -> Text:
    return Text(
        text.input_ids[rows], text.attention_mask[rows], text.word_index[rows], text.sentence_index[rows]
    )


def load_models(
    source: SavedRun, config: Config, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Method]:
    """The trained network and the same one as it was before the first step (same config, same seed).

    Parts that the config starts from published weights have them in the untrained network too.

    Raises:
        IdentityError: those are not the weights the run was started from.
    """
    before = random_state()
    trained = saved_run.load_method(source, config, tokenizer)
    seed_weights(config.train.seed)
    untrained = build_method(config, tokenizer.vocab_size)
    identity = None if source.stored is None else source.stored[0]
    check_start(untrained, config, identity)
    untrained.prepare(tokenizer)
    begin_again(untrained, config, identity)
    restore_random_state(before)
    return {"trained": trained.to(device), "untrained": untrained.to(device).eval()}
