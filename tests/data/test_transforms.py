"""Crops and intensity changes: sizes, limits, and randomness by (seed, epoch, sample) alone."""

from __future__ import annotations

import cv2
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from medvlp.config import TransformConfig
from medvlp.data import augment
from medvlp.data.transforms import DRAWS, SampleRandom, evaluation_crop, evaluation_view, training_view

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


#: Changes of which none draws from the stream that crops, flips and intensity use.
WILDER = TransformConfig(crop="area", rotate=5, rand_augment=2, interpolation="bicubic", flip=0.5)


def wilder(image: Image, size: int, config: TransformConfig, count: int, seed: int = 1) -> list[Image]:
    plain, more = SampleRandom(seed, 0), SampleRandom(seed, 0, stream=1)
    number = augment.draws(config)
    return [
        training_view(
            image, size, config, plain.uniform(i, DRAWS), more.uniform(i, number) if number else None
        )[0]
        for i in range(count)
    ]


def test_a_crop_by_area_is_torchvisions() -> None:
    """Shares of the whole image's area and ratios have the published ranges; the whole image is in reach."""
    image = np.zeros((240, 200), dtype=np.uint8)
    config = TransformConfig(crop="area", area_min=0.2, area_max=1.0)
    random = SampleRandom(seed=1, epoch=0, stream=1)
    number = augment.draws(config)
    parts = np.array([augment.area_crop(image.shape, config, random.uniform(i, number)) for i in range(4000)])
    top, left, height, width = parts.T
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 240
    assert (left + width).max() <= 200
    shares, ratios = height * width / image.size, width / height
    assert 0.195 < shares.min() < 0.21
    assert shares.max() > 0.95
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.35
    # Of those that fit at the first draw: uniform over the area up to where shapes begin to be refused.
    small = shares[shares < 0.55]
    assert np.abs(np.histogram(small, bins=7, range=(0.2, 0.55))[0] / len(small) - 1 / 7).max() < 0.03
    whole = TransformConfig(crop="area", area_min=1.0, ratio_max=1.0)
    assert augment.area_crop(image.shape, whole, [0.5] * number) == (20, 0, 200, 200), (
        "none fits: the largest middle"
    )
    square = np.zeros((64, 64), dtype=np.uint8)
    assert augment.area_crop(square.shape, whole, [0.5] * number) == (0, 0, 64, 64)


def test_bicubic_is_pillows_and_boxes_follow_the_part(ramp: Image) -> None:
    config = TransformConfig(crop="area", area_min=0.3, interpolation="bicubic")
    draws = SampleRandom(3, 0, stream=1).uniform(5, augment.draws(config))
    top, left, height, width = augment.area_crop(ramp.shape, config, draws)
    found, view = training_view(ramp, 24, config, [0, 0, 0, 1, 0, 0], draws)
    part = PIL.Image.fromarray(ramp[top : top + height, left : left + width])
    expected = np.asarray(part.resize((24, 24), PIL.Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found, expected)
    ends = view.horizontal(np.array([left]), np.array([left + width]))
    assert [end[0] for end in ends] == pytest.approx([0, 24])
    ends = view.vertical(np.array([top]), np.array([top + height]))
    assert [end[0] for end in ends] == pytest.approx([0, 24])


def test_rotation_turns_about_the_middle() -> None:
    image = np.zeros((65, 65), dtype=np.uint8)
    image[30:35, 8:57] = 255
    config = TransformConfig(crop="none", rotate=90)
    number = augment.draws(config)
    quarter = training_view(image, 65, config, [0, 0, 0, 1, 0, 0], [1.0] * number)[0]
    np.testing.assert_allclose(quarter, image.T, atol=1)
    still = training_view(image, 65, config, [0, 0, 0, 1, 0, 0], [0.5] * number)[0]
    np.testing.assert_array_equal(still, image)


@pytest.mark.parametrize("operation", range(10))
@pytest.mark.parametrize("side", [0.0, 0.9])
def test_every_operation_keeps_shape_and_type_and_most_change_the_image(operation: int, side: float) -> None:
    image = np.tile(np.arange(40, 168, 4, dtype=np.uint8), (32, 1)) + np.arange(32, dtype=np.uint8)[:, None]
    config = TransformConfig(rand_augment=1)
    draws = [0.0] * 23 + [operation / 10 + 0.05, 0.0, side]
    changed = augment.rand_augment(image, config, draws)
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8
    assert np.array_equal(changed, image) == (operation == 0)
    draws[24] = 0.5
    assert augment.rand_augment(image, config, draws) is image, "made with chance 1/2"
    if operation == 3:
        np.testing.assert_array_equal(changed, np.clip(np.floor(image * 1.36), 0, 255))
    if operation == 7:
        shift = 7 if side > 0.5 else -7
        inner = slice(8, 24)
        np.testing.assert_array_equal(changed[:, inner], np.roll(image, shift, 1)[:, inner])
        assert changed[0, 0 if shift > 0 else -1] == 128


def test_wilder_views_depend_on_seed_and_sample_and_leave_other_draws_alone(ramp: Image) -> None:
    first, again, other = (wilder(ramp, 28, WILDER, 8, seed) for seed in (1, 1, 2))
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert SampleRandom(5, 2, stream=1).uniform(7, 3) != SampleRandom(5, 2).uniform(7, 3)
    plain = TransformConfig()
    assert augment.draws(plain) == 0
    for one, same in zip(views(ramp, 28, plain, 8), wilder(ramp, 28, plain, 8), strict=True):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize(
    ("crop", "evaluation", "expected"),
    [("random", "auto", "center"), ("center", "auto", "center"), ("none", "auto", "none"),
     ("area", "auto", "none"), ("random", "whole", "none"), ("area", "center", "center")],
)  # fmt: skip
def test_the_view_of_evaluation_has_a_key_of_its_own(crop: str, evaluation: str, expected: str) -> None:
    assert evaluation_crop(TransformConfig(crop=crop, evaluation=evaluation)) == expected  # type: ignore[arg-type]
