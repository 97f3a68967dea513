"""Crops and intensity changes: sizes, limits, and randomness by (seed, epoch, sample) alone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medvlp.config import TransformConfig
from medvlp.data.transforms import DRAWS, SampleRandom, evaluation_view, training_view

Image = NDArray[np.uint8]


@pytest.fixture
def ramp() -> Image:
    """[32, 32] pixels, every one different from its neighbours."""
    return (np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) * 7 % 256).astype(np.uint8)


def views(image: Image, size: int, config: TransformConfig, count: int) -> list[Image]:
    random = SampleRandom(seed=1, epoch=0)
    return [training_view(image, size, config, random.uniform(i, DRAWS))[0] for i in range(count)]


def test_random_numbers_depend_on_seed_epoch_and_sample_only() -> None:
    random = SampleRandom(seed=5, epoch=2)
    random.uniform(99, 3)
    first = random.uniform(7, DRAWS)
    assert first == SampleRandom(5, 2).uniform(7, DRAWS)
    assert first[:2] == SampleRandom(5, 2).uniform(7, 2)
    others = [
        SampleRandom(6, 2).uniform(7, DRAWS),
        SampleRandom(5, 3).uniform(7, DRAWS),
        random.uniform(8, 6),
    ]
    assert all(first != other for other in others)
    numbers = np.array([random.uniform(i, DRAWS) for i in range(2000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    np.testing.assert_allclose(numbers.mean(axis=0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(DRAWS)).max() < 0.1


def test_random_crop_is_a_window_of_the_image_at_every_place(ramp: Image) -> None:
    places = set()
    for view in views(ramp, 28, TransformConfig(), 400):
        assert view.shape == (28, 28)
        match = cv2.matchTemplate(ramp, np.ascontiguousarray(view), cv2.TM_SQDIFF)
        top, left = np.unravel_index(match.argmin(), match.shape)
        np.testing.assert_array_equal(view, ramp[top : top + 28, left : left + 28])
        places.add((int(top), int(left)))
    assert len(places) == 25


def test_resized_crop_keeps_the_size_and_varies_the_scale(ramp: Image) -> None:
    config = TransformConfig(scale_min=0.5)
    draws = [[share, 0.0, 0.0, 1.0, 0.0, 0.0] for share in (0.0, 0.999)]
    small, full = (training_view(ramp, 28, config, draw)[0] for draw in draws)
    np.testing.assert_array_equal(small, cv2.resize(ramp[:14, :14], (28, 28)))
    np.testing.assert_array_equal(full, ramp[:28, :28])


def test_center_none_and_small_images(ramp: Image) -> None:
    np.testing.assert_array_equal(evaluation_view(ramp, 28, "random")[0], ramp[2:30, 2:30])
    np.testing.assert_array_equal(views(ramp, 28, TransformConfig(crop="center"), 1)[0], ramp[2:30, 2:30])
    whole = cv2.resize(ramp, (16, 16), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(views(ramp, 16, TransformConfig(crop="none"), 1)[0], whole)
    np.testing.assert_array_equal(evaluation_view(ramp, 16, "none")[0], whole)
    enlarged = cv2.resize(ramp, (48, 48), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(evaluation_view(ramp, 48, "random")[0], enlarged)
    np.testing.assert_array_equal(views(ramp, 48, TransformConfig(), 1)[0], enlarged)


def test_flip_happens_as_often_as_asked(ramp: Image) -> None:
    flipped = [
        np.array_equal(view, ramp[2:30, 2:30][:, ::-1])
        for view in views(ramp, 28, TransformConfig(crop="center", flip=0.25), 800)
    ]
    assert 0.2 < np.mean(flipped) < 0.3


def test_brightness_and_contrast(ramp: Image) -> None:
    image = (ramp // 4 + 60).astype(np.uint8)
    brighter = TransformConfig(crop="center", brightness=0.2)
    view = training_view(image, 32, brighter, [0, 0, 0, 1, 0.75, 0.5])[0]
    np.testing.assert_allclose(view, image * 1.1, atol=0.51)
    stretched = TransformConfig(crop="center", contrast=0.4)
    view = training_view(image, 32, stretched, [0, 0, 0, 1, 0.5, 0.0])[0]
    np.testing.assert_allclose(view, (image - image.mean()) * 0.6 + image.mean(), atol=0.51)
    white, _ = training_view(np.full((32, 32), 250, np.uint8), 32, brighter, [0, 0, 0, 1, 0.99, 0.5])
    assert white.min() == 255
