"""Decoding, windowing and fitting of images, against MGCA's golden values and against hostile files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.errors import DataError
from shards.format import IMAGE_LIMIT
from shards.images import (
    MAX_PIXELS,
    decode_image,
    encode_jpeg,
    encode_png,
    fit_square,
    fit_square_mask,
    read_image_file,
    window_to_8_bit,
)

DEEP = np.random.default_rng(0).integers(1000, 30000, (70, 50)).astype(np.uint16)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file of `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    """The pixels as a TIFF file."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def test_files_that_are_too_large_or_none_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "film.png").write_bytes(b"film")
    assert read_image_file(tmp_path / "film.png") == b"film"
    os.truncate(tmp_path / "film.png", IMAGE_LIMIT + 1)
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("film.png", f"file: {IMAGE_LIMIT + 1} bytes, more than the limit of {IMAGE_LIMIT}"),
        ("pipe.png", "file: not a regular file"),
        (".", "file: not a regular file"),
    ):
        with pytest.raises(DataError, match=f"^{reason}$"):
            read_image_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_image_file(tmp_path / "gone.png")


def test_fit_square_equals_mgca_golden(golden_dir: Path) -> None:
    files = sorted(golden_dir.glob("mgca_resize*.npz"))
    assert files
    for file in files:
        with np.load(file, allow_pickle=False) as golden:
            numbers = [name.removeprefix("in_") for name in golden if name.removeprefix("in_").isdigit()]
            assert numbers
            for number in numbers:
                image, expected = golden[f"in_{number}"], golden[f"out_{number}"]
                fitted, scale, left, top = fit_square(image, expected.shape[0])
                np.testing.assert_array_equal(fitted, expected)
                assert scale == expected.shape[0] / max(image.shape)
                assert 0 in (left, top)


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 64))
def test_fit_square_pads_symmetrically_with_zeros(height: int, width: int, size: int) -> None:
    fitted, _, left, top = fit_square(np.full((height, width), 200, np.uint8), size)
    rows, columns = np.nonzero(fitted)
    assert fitted.shape == (size, size)
    assert (rows.min(), columns.min()) == (top, left)
    bottom, right = size - 1 - rows.max(), size - 1 - columns.max()
    assert (bottom - top) in (0, 1)
    assert (right - left) in (0, 1)


def test_mask_lands_where_the_image_does() -> None:
    pixels = np.zeros((200, 100), np.uint8)
    pixels[40:80, 20:60] = 255
    mask = (pixels > 0).astype(np.uint8)
    for size in (50, 37, 200, 230):
        fitted, _, _, _ = fit_square(pixels, size)
        np.testing.assert_array_equal(fit_square_mask(mask, size), fitted > 127)


def test_a_mask_thinner_than_a_stored_pixel_does_not_vanish() -> None:
    """A mask of zeros would say that the finding is not there."""
    mask = np.zeros((640, 320), np.uint8)
    mask[101, 37] = 1
    fitted = fit_square_mask(mask, 16)
    assert np.argwhere(fitted).tolist() == [[101 // 40, 4 + 37 // 40]]
    mask[:, 200] = 1
    assert fit_square_mask(mask, 16)[:, 4 + 200 // 40].all()
    assert not fit_square_mask(np.zeros((640, 320), np.uint8), 16).any()


def test_16_bit_png_and_tiff_are_windowed_alike() -> None:
    expected = window_to_8_bit(DEEP)
    assert expected.min() == 0
    assert expected.max() == 255
    for data in (saved(Image.fromarray(DEEP), "PNG"), tiff(DEEP), tiff(DEEP.astype(">u2"), byteorder=">")):
        np.testing.assert_array_equal(decode_image(data), expected)


def test_window_survives_burnt_in_markers_and_constant_images() -> None:
    image = np.tile(np.linspace(1000, 2000, 1000), (10, 1)).astype(np.uint16)
    marked = image.copy()
    marked[0, :5] = 65535
    assert window_to_8_bit(marked)[5, 500] == pytest.approx(window_to_8_bit(image)[5, 500], abs=2)
    assert not window_to_8_bit(np.full((4, 4), 7, np.uint16)).any()


def test_white_is_zero_tiff_is_inverted_at_8_and_16_bits() -> None:
    shallow = (DEEP >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(tiff(shallow, photometric="miniswhite")), 255 - shallow)
    np.testing.assert_array_equal(
        decode_image(tiff(DEEP, photometric="miniswhite")), 255 - window_to_8_bit(DEEP)
    )


def test_colour_becomes_luminance_in_every_format() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    for data in (saved(red, "PNG"), saved(red, "JPEG", quality=95), saved(red, "TIFF")):
        assert decode_image(data)[8, 8] == pytest.approx(76, abs=2)


def test_own_encoders_come_back() -> None:
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(encode_png(smooth)), smooth)
    assert np.abs(decode_image(encode_jpeg(smooth)).astype(int) - smooth).max() <= 4


def lying_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"0")]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_bomb_is_refused_before_decoding(bomb: bytes) -> None:
    large = Image.new("L", (8_300, 8_300))
    for data in (bomb, saved(large, "JPEG"), saved(large, "TIFF", compression="tiff_deflate")):
        with pytest.raises(DataError, match=str(MAX_PIXELS)):
            decode_image(data)


def test_header_that_promises_too_much_is_refused() -> None:
    with pytest.raises(DataError, match=str(MAX_PIXELS)):
        decode_image(lying_png(9000, 9000))
    with pytest.raises(DataError, match="broken image"):
        decode_image(lying_png(90, 90))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<html>", "not a JPEG, PNG or TIFF"),
        (b"\xff\xd8\xff\xe0 nothing", "broken JPEG"),
        (encode_jpeg(np.full((64, 64), 90, np.uint8))[:200], "broken JPEG"),
        (encode_png(DEEP)[:3000], "truncated"),
        (tiff(DEEP)[:3000], "broken image"),
        (tiff(np.full((4, 4), np.nan, np.float32)), "not numbers"),
    ],
)
def test_bad_file_is_one_data_error(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_image(data)


@settings(max_examples=50)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*"])
)
def test_arbitrary_bytes_never_raise_anything_else(tail: bytes, magic: bytes) -> None:
    with pytest.raises(DataError):
        decode_image(magic + tail)
