"""Values of DICOM films to grey levels: tables, windows, percentiles, polarity, padding."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from shards.dicom import read_dicom
from tests.fixtures import dicom
from tests.shards.dicom_levels import RAMP, close, linear, read


def test_the_files_window_is_used() -> None:
    found = read(dicom.write(RAMP, bits=12, WindowCenter=1500, WindowWidth=800))
    close(found, linear(RAMP, 1500, 800))


def test_the_first_of_several_windows_is_used() -> None:
    found = read(dicom.write(RAMP, bits=12, WindowCenter=[1500, 100], WindowWidth=[800, 10]))
    close(found, linear(RAMP, 1500, 800))


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions(function: str) -> None:
    found = read(dicom.write(RAMP, bits=12, WindowCenter=2000, WindowWidth=1000, VOILUTFunction=function))
    values = RAMP.astype(np.float64)
    exact = np.clip((values - 2000) / 1000 + 0.5, 0, 1)
    sigmoid = 1 / (1 + np.exp(-4 * (values - 2000) / 1000))
    close(found, 255 * (exact if function == "LINEAR_EXACT" else sigmoid))


@pytest.mark.parametrize(
    "fields",
    [
        {"WindowCenter": 2000, "WindowWidth": 0},
        {"WindowCenter": 40000, "WindowWidth": 100},
        {"WindowCenter": -500, "WindowWidth": 400},
        {"WindowCenter": 2000},
        {},
    ],
    ids=["width 0", "far above", "far below", "no width", "no window"],
)
def test_a_useless_window_gives_way_to_percentiles(fields: dict[str, Any]) -> None:
    low, high = np.percentile(RAMP, (0.5, 99.5))
    close(read(dicom.write(RAMP, bits=12, **fields)), np.clip((RAMP - low) / (high - low), 0, 1) * 255, 1.5)


def body(least: int, most: int, air: int, share_of_air: float) -> np.ndarray:
    """A film with air around a body whose values rise from `least` to `most`."""
    film = np.full(100 * 100, air)
    rest = film[round(share_of_air * len(film)) :]
    rest[:] = np.linspace(least, most, len(rest)).round()
    return film.reshape(100, 100).astype(np.uint16)


def with_specks(film: np.ndarray, share: float) -> np.ndarray:
    """The same film with some of its last pixels in all values from 0 to 90."""
    count = round(share * film.size)
    film.reshape(-1)[-count:] = np.linspace(0, 90, count).round()
    return film


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("film", "bits", "center", "width"),
    [
        (body(600, 3900, 40, 0.27), 12, 128, 256),
        (body(600, 3900, 40, 0.27), 12, 127, 255),
        (body(100, 3900, 40, 0.0), 12, 128, 256),  # no air: 4 % of the body inside, in all levels
        (body(600, 3900, 40, 0.27), 12, 512, 1024),
        (body(600, 3900, 40, 0.27), 12, 32768, 65536),
        (body(600, 3900, 40, 0.27), 16, 32768, 65536),  # 12 bits of 16 that are said to be stored
        (body(2000, 15000, 300, 0.2), 14, 32768, 65536),
        (body(2000, 15000, 300, 0.2), 14, 2048, 4096),
        (body(600, 3900, 40, 0.27), 12, 40, 100),  # of no bit depth: black and white
        (with_specks(body(600, 3900, 40, 0.02), 0.005), 12, 40, 100),  # and a few pixels in between
    ],
)
def test_a_window_of_another_bit_depth_gives_way_to_percentiles(
    film: np.ndarray, bits: int, center: int, width: int, photometric: str
) -> None:
    fields = {"PhotometricInterpretation": photometric}
    data = dicom.write(film, bits=bits, WindowCenter=center, WindowWidth=width, **fields)
    found = read_dicom(data)
    assert len(np.unique(found.pixels)) > 200
    np.testing.assert_array_equal(found.pixels, read(dicom.write(film, bits=bits, **fields)))
    assert [note.partition(" of their files")[0] for note in found.notes] == [
        "films are shown without the table or window"
    ]


def test_a_table_for_fewer_bits_gives_way_as_well() -> None:
    film = body(600, 3900, 40, 0.27)
    item = dicom.table(np.arange(256), 0, 8)
    np.testing.assert_array_equal(
        read(dicom.write(film, bits=12, VOILUTSequence=[item])), read(dicom.write(film, bits=12))
    )
    both = dicom.write(film, bits=12, VOILUTSequence=[item], WindowCenter=2000, WindowWidth=3500)
    close(read(both), linear(film, 2000, 3500))


@pytest.mark.parametrize("entries", [16384, 65535])
def test_a_table_that_has_entries_beyond_the_files_bits_is_kept(entries: int) -> None:
    film = body(600, 3900, 40, 0.27)
    rising = np.minimum(np.arange(entries), 4095) * 16
    found = read_dicom(dicom.write(film, bits=12, VOILUTSequence=[dicom.table(rising, 0, 16)]))
    close(found.pixels, film / 4096 * 255)
    assert found.notes == ()
    flat = dicom.table(np.arange(entries) * (65535 // entries), 0, 16)  # its end shows nothing of 12 bits
    assert read_dicom(dicom.write(film, bits=12, VOILUTSequence=[flat])).notes


def raw_detector() -> np.ndarray:
    """Direct exposure in most of the film, and anatomy in an eighth of the range of its values."""
    film = body(200, 2000, 0, 0.7)
    film.reshape(-1)[:7000] = np.linspace(10_000, 14_000, 7000)
    return film


@pytest.mark.parametrize(
    ("film", "bits", "center", "width", "photometric"),
    [
        (raw_detector(), 14, 1100, 1800, "MONOCHROME1"),
        (body(600, 3900, 40, 0.27), 12, 1500, 1000, "MONOCHROME2"),
        (body(600, 3900, 40, 0.27), 12, 2048, 4096, "MONOCHROME2"),
        (body(600, 3900, 40, 0.27), 12, 4096, 8192, "MONOCHROME2"),  # one bit too many
        (body(2100, 3900, 40, 0.6), 12, 3072, 2048, "MONOCHROME2"),  # ends where a bit depth does
        (body(600, 2000, 4095, 0.6), 12, 1300, 1800, "MONOCHROME2"),  # a white border
        (body(100, 700, 40, 0.27), 16, 2048, 4096, "MONOCHROME2"),
        (body(0, 20, 0, 0.5), 12, 2048, 4096, "MONOCHROME2"),  # has no more levels than that
    ],
)
def test_a_window_that_shows_the_film_is_kept(
    film: np.ndarray, bits: int, center: int, width: int, photometric: str
) -> None:
    data = dicom.write(
        film, bits=bits, WindowCenter=center, WindowWidth=width, PhotometricInterpretation=photometric
    )
    expected = linear(film, center, width)
    close(read(data), expected if photometric == "MONOCHROME2" else 255 - expected)
    assert read_dicom(data).notes == ()


def test_a_window_that_holds_the_padding_alone_is_not_the_films() -> None:
    film = body(600, 3900, 40, 0.27)
    padded = dicom.write(film, bits=12, PixelPaddingValue=40, WindowCenter=150, WindowWidth=300)
    inner = dicom.write(film, bits=12, PixelPaddingValue=40)
    np.testing.assert_array_equal(read(padded), read(inner))
    assert len(read_dicom(padded).notes) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"WindowCenter": 1500, "WindowWidth": 100},  # between two of its values
        {"VOILUTSequence": [dicom.table(np.full(3000, 7), 0, 8)]},
    ],
)
def test_a_film_of_few_levels_keeps_them(fields: dict[str, Any]) -> None:
    film = body(0, 20, 0, 0.5) * 200
    found = read_dicom(dicom.write(film, bits=12, **fields))
    np.testing.assert_array_equal(found.pixels, read(dicom.write(film, bits=12)))
    assert len(found.notes) == 1


def test_a_table_for_signed_values_may_say_its_first_without_a_sign() -> None:
    film = RAMP.astype(np.int16) - 2048
    item = dicom.table(np.arange(4096)[::-1], 65536 - 2048, 12)
    found = read_dicom(dicom.write(film, bits=12, VOILUTSequence=[item]))
    close(found.pixels, (4095.0 - RAMP) / 4095 * 255)
    assert found.notes == ()


def test_a_deep_outlier_does_not_flatten_the_anatomy() -> None:
    film = RAMP.copy()
    film[0, 0] = 65535
    assert read(dicom.write(film)).std() > 60


def test_eight_bits_without_a_window_stay_as_they_are() -> None:
    film = (RAMP >> 5).astype(np.uint8)
    np.testing.assert_array_equal(read(dicom.write(film)), film)


@pytest.mark.parametrize("stored", [np.uint8, np.uint16], ids=["one byte", "two bytes"])
def test_a_table_of_eight_bits_has_one_byte_an_entry_or_two(stored: type) -> None:
    entries = np.linspace(255, 0, 4096).round().astype(stored)
    item = dicom.table(entries, 0, 8)
    item["LUTData"].value = entries.astype(np.dtype(stored).newbyteorder("<")).tobytes()
    close(read(dicom.write(RAMP, bits=12, VOILUTSequence=[item])), entries[RAMP].astype(float))


def test_a_falling_rescale_of_eight_bits_turns_the_film_over() -> None:
    film = (RAMP >> 4).astype(np.uint8)
    np.testing.assert_array_equal(read(dicom.write(film, RescaleSlope=-1, RescaleIntercept=255)), 255 - film)


def test_a_falling_rescale_leaves_outliers_out_as_well() -> None:
    film = RAMP.copy()
    film[0, 0] = 65535
    plain, falling = (read(dicom.write(film, RescaleSlope=slope, RescaleIntercept=0)) for slope in (1, -1))
    close(falling, 255.0 - plain)


@pytest.mark.parametrize(("kind", "bits"), [(np.int8, 8), (np.uint8, 6), (np.uint8, 1)])
def test_eight_bits_or_fewer_show_all_that_they_can_hold(kind: type, bits: int) -> None:
    least = -128 if kind is np.int8 else 0
    film = (least + (RAMP >> (12 - bits)).astype(np.int16)).astype(kind)
    close(read(dicom.write(film, bits=bits)), (film.astype(float) - least) * 255 / (2**bits - 1))


@pytest.mark.parametrize("window", ["auto", "max"])
def test_monochrome1_is_inverted_after_the_window(window: Any) -> None:
    plain = dicom.write(RAMP, bits=12, WindowCenter=1500, WindowWidth=800)
    inverse = dicom.write(
        RAMP, bits=12, WindowCenter=1500, WindowWidth=800, PhotometricInterpretation="MONOCHROME1"
    )
    np.testing.assert_array_equal(read(inverse, window=window), 255 - read(plain, window=window))


def test_the_window_max_starts_at_zero() -> None:
    film = RAMP + 1000
    close(read(dicom.write(film), window="max"), film / film.max() * 255)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_equalised_as_opencv_does(photometric: str) -> None:
    levels = np.rint((RAMP - RAMP.min()) / np.ptp(RAMP) * 255).astype(np.uint8)
    expected = cv2.equalizeHist(levels if photometric == "MONOCHROME2" else 255 - levels)
    data = dicom.write(RAMP, bits=12, PhotometricInterpretation=photometric)
    np.testing.assert_array_equal(read(data, window="equalize"), expected)


def test_signed_values_with_a_slope_and_an_intercept() -> None:
    film = RAMP.astype(np.int16) - 2048
    data = dicom.write(
        film, RescaleSlope=2, RescaleIntercept=-24, WindowCenter=100, WindowWidth=3000, bits=12
    )
    close(read(data), linear(2.0 * film - 24, 100, 3000))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_table_in_place_of_a_window(bits: int) -> None:
    entries = np.linspace(0, (1 << bits) - 1, 4096) ** 2 / ((1 << bits) - 1)
    data = dicom.write(
        RAMP, bits=12, VOILUTSequence=[dicom.table(np.rint(entries), 0, bits)], WindowCenter=1, WindowWidth=2
    )
    close(read(data), (RAMP / 4095.0) ** 2 * 255)


def test_a_modality_table_comes_before_the_window() -> None:
    entries = np.arange(4096)[::-1] * 4
    data = dicom.write(
        RAMP,
        bits=12,
        ModalityLUTSequence=[dicom.table(entries, 0, 16)],
        WindowCenter=8000,
        WindowWidth=4000,
    )
    close(read(data), linear((4095.0 - RAMP) * 4, 8000, 4000))


def test_a_constant_table_is_ignored() -> None:
    data = dicom.write(RAMP, bits=12, VOILUTSequence=[dicom.table(np.full(4096, 7), 0, 8)])
    assert read(data).std() > 60


def test_padding_does_not_move_the_window() -> None:
    film = RAMP // 2
    film[:, :40] = 4000
    with_padding = read(dicom.write(film, bits=12, PixelPaddingValue=4000))
    part = film[:, 40:]
    low, high = np.percentile(part, (0.5, 99.5))
    close(with_padding[:, 40:], np.clip((part - low) / (high - low), 0, 1) * 255, 1.5)


@pytest.mark.parametrize("fields", [{}, {"WindowCenter": 2000, "WindowWidth": 3000}], ids=["none", "window"])
@pytest.mark.parametrize(
    ("photometric", "padding", "limit"),
    [
        ("MONOCHROME1", 0, None),
        ("MONOCHROME2", 4095, None),
        ("MONOCHROME1", 5, 0),
        ("MONOCHROME2", 4090, 4095),
    ],
)
def test_padding_is_black(photometric: str, padding: int, limit: int | None, fields: dict[str, Any]) -> None:
    film = np.clip(RAMP, 10, 4000)
    unpadded = dicom.write(film, bits=12, PhotometricInterpretation=photometric, **fields)
    film[:, :8] = padding
    film[:4] = padding if limit is None else limit
    fields = {**fields, "PixelPaddingValue": padding}
    if limit is not None:
        fields["PixelPaddingRangeLimit"] = limit
    padded = dicom.write(film, bits=12, PhotometricInterpretation=photometric, **fields)
    found = read(padded)
    assert not found[:, :8].any()
    assert not found[:4].any()
    assert read_dicom(padded).notes == ("films' padding is black (PixelPaddingValue)",)
    close(found[4:, 8:], read(unpadded)[4:, 8:].astype(float), 40)


def test_saturated_pixels_inside_the_film_are_no_padding() -> None:
    film = np.clip(RAMP, 10, 4000)
    film[:4] = film[20:30, 20:30] = 4095
    found = read(dicom.write(film, bits=12, PixelPaddingValue=4095))
    assert not found[:4].any()
    assert (found[20:30, 20:30] == 255).all()


@pytest.mark.parametrize("window", ["max", "equalize"])
def test_other_windows_show_the_padding_as_it_is_stored(window: Any) -> None:
    film = np.clip(RAMP, 10, 4000)
    film[:4] = 4095
    padded = read_dicom(dicom.write(film, bits=12, PixelPaddingValue=4095), window)
    np.testing.assert_array_equal(padded.pixels, read(dicom.write(film, bits=12), window=window))
    assert padded.notes == ()
