"""Large JPEGs decoded smaller: nothing is enlarged that was not before, and places stay where they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medvlp.config import Config, TransformConfig
from medvlp.data import augment
from medvlp.data.batch import Batch
from medvlp.data.dataset import TrainingDataset
from medvlp.data.loader import build_loader
from medvlp.data.text import Tokenizer
from medvlp.data.transforms import DRAWS, SampleRandom, training_view
from medvlp.data.views import Reduced
from shards.errors import DataError
from shards.images import decode_image
from shards.reader import ShardReader

ConfigFactory = Callable[..., Config]
Pixels = NDArray[np.uint8]

UNCHANGED = [0.0, 0.0, 0.0, 1.0, 0.5, 0.5]


def smaller(image: Pixels, factor: int) -> Pixels:
    """An image of the size that a decoder makes."""
    return np.ascontiguousarray(image[::factor, ::factor])


@given(
    height=st.integers(1, 700), width=st.integers(1, 700), size=st.integers(8, 80),
    area_min=st.floats(0.01, 1), ratio_max=st.floats(1, 4), sample=st.integers(0, 1000),
    crop=st.sampled_from(["area", "none"]),
)  # fmt: skip
def test_what_is_seen_keeps_its_resolution_and_its_place(
    height: int, width: int, size: int, area_min: float, ratio_max: float, sample: int, crop: str
) -> None:
    config = TransformConfig(crop=crop, area_min=area_min, ratio_max=ratio_max)  # type: ignore[arg-type]
    image = np.zeros((height, width), dtype=np.uint8)
    number = augment.draws(config)
    draws = SampleRandom(1, 0, stream=1).uniform(sample, number) if number else None
    _, whole = training_view(image, size, config, UNCHANGED, draws)
    factor = augment.reduction(image.shape, size, config, draws)
    seen, view = training_view(
        smaller(image, factor), size, config, UNCHANGED, draws, Reduced(image.shape, factor)
    )
    assert seen.shape == (size, size)
    if factor == 1:
        assert view == whole
        assert min(whole.width, whole.height) < 2 * size
        return
    # Pixels of the smaller image that are seen: never fewer than are shown.
    assert min(view.width, view.height) >= factor * size
    assert factor == 8 or min(whole.width, whole.height) < 2 * factor * size
    if crop == "none":
        assert view == whole
    starts = whole.left - view.left, whole.top - view.top
    ends = (
        whole.left + whole.width - view.left - view.width,
        whole.top + whole.height - view.top - view.height,
    )
    assert all(0 <= distance < factor for distance in starts + ends)


@pytest.mark.parametrize("crop", ["random", "center"])
def test_stored_pixels_are_not_made_fewer(crop: str) -> None:
    config = TransformConfig(crop=crop)  # type: ignore[arg-type]
    assert augment.reduction((2048, 2048), 224, config, None) == 1


def dataset_of(image: bytes, side: int) -> TrainingDataset:
    """A dataset whose samples are all this image; it says of none that it is larger than `side`."""
    dataset = object.__new__(TrainingDataset)
    dataset.reader = SimpleNamespace(  # type: ignore[assignment]
        image=lambda split, position: image, locate=lambda *at: (SimpleNamespace(file="a.tar"), 0)
    )
    dataset.split, dataset._unreadable = "train", frozenset()
    dataset.store = SimpleNamespace(keys=lambda rows: ["key"])  # type: ignore[assignment]
    dataset._pixels = np.empty((side, side, 1), dtype=np.uint8)
    return dataset


def gradient(height: int, width: int) -> Pixels:
    return np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(256, 256), (251, 197), (64, 255)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_at_a_share_of_its_sides(shape: tuple[int, int], factor: int) -> None:
    image = gradient(*shape)
    dataset = dataset_of(simplejpeg.encode_jpeg(image[:, :, None], 95, "GRAY"), 256)
    asked: list[tuple[int, int]] = []

    def by(found: tuple[int, int]) -> int:
        asked.append(found)
        return factor

    pixels, reduced = dataset.decode_reduced(0, by)
    assert asked == [shape]
    assert reduced == (None if factor == 1 else Reduced(shape, factor))
    assert pixels.shape == tuple(-(-side // factor) for side in shape)
    middles = (np.arange(shape[1] // factor) + 0.5) * factor - 0.5
    expected = np.interp(middles, np.arange(shape[1]), image[shape[0] // 2].astype(float))
    row = pixels[shape[0] // 2 // factor, : len(middles)]
    np.testing.assert_allclose(row, expected, atol=3 + factor / 2)


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    import cv2

    image = gradient(64, 64)
    pixels, reduced = dataset_of(cv2.imencode(".png", image)[1].tobytes(), 64).decode_reduced(0, lambda _: 2)
    assert reduced is None
    np.testing.assert_array_equal(pixels, image)


def test_an_image_larger_than_the_index_says_is_refused() -> None:
    bomb = simplejpeg.encode_jpeg(np.zeros((2000, 2000, 1), np.uint8), 1, "GRAY")
    with pytest.raises(DataError, match="its image cannot be decoded"):
        dataset_of(bomb, 256).decode_reduced(0, lambda _: 8)


def first_batch(config: Config, root: Path, tokenizer: Tokenizer) -> Batch:
    return next(itertools.islice(build_loader(config, ShardReader(root), tokenizer, 0, 1, 16), 1))


@pytest.mark.parametrize("crop", ["area", "none"])
def test_batches_differ_a_little_with_it_and_not_at_all_without(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, crop: str
) -> None:
    config = make_config(image_size=16)
    config.data.transform = transform = TransformConfig(crop=crop, area_min=0.5)  # type: ignore[arg-type]
    off = first_batch(config, dataset, tokenizer)
    reader, plain, more = ShardReader(dataset), SampleRandom(0, 0), SampleRandom(0, 0, stream=1)
    number = augment.draws(transform)
    for position, image in zip(off.sample.tolist(), off.image[:, 0].numpy(), strict=True):
        stored = decode_image(reader.image("train", position))
        draws = more.uniform(position, number) if number else None
        uniform = plain.uniform(position, DRAWS)
        np.testing.assert_array_equal(image, training_view(stored, 16, transform, uniform, draws)[0])
    transform.reduced_decoding = True
    on = first_batch(config, dataset, tokenizer)
    assert on.keys == off.keys
    distance = (on.image.float() - off.image.float()).abs().mean().item()
    print(f"crop {crop}: {distance:.2f} of 255 apart")
    assert 0 < distance < 6
