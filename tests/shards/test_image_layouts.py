"""Depths, channel layouts and orientations, in files of independent writers, with lopsided content."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from shards.errors import DataError
from shards.images import decode_image, window_to_8_bit

HEIGHT, WIDTH = 48, 32


def lopsided(top: int) -> np.ndarray:
    """Values 0..top, rising to the right and more slowly downwards: every turn and mirroring shows."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return ((columns * 2 + rows) / (2 * WIDTH + HEIGHT - 3) * top).astype(np.uint16)


GRAY = lopsided(4095)
ALPHA = np.full_like(GRAY, 4095)
WINDOWED = window_to_8_bit(GRAY)


def stack(*channels: np.ndarray) -> np.ndarray:
    return np.stack(channels, axis=-1)


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def pil(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray, colour: int, depth: int = 16) -> bytes:
    """A PNG written chunk by chunk, for what no library at hand writes; `pixels` [H, W, C]."""
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def opencv(pixels: np.ndarray, kind: str) -> bytes:
    return bytes(cv2.imencode(kind, pixels)[1].tobytes())


RGB = {"photometric": "rgb"}
DEEP = {
    "png gray 16": png(GRAY[..., None], 0),
    "png rgb 16": png(stack(GRAY, GRAY, GRAY), 2),
    "png rgba 16": png(stack(GRAY, GRAY, GRAY, ALPHA), 6),
    "png rgba 16, transparent": png(stack(GRAY, GRAY, GRAY, ALPHA * 0), 6),
    "png gray and alpha 16": png(stack(GRAY, ALPHA), 4),
    "opencv's png rgb 16": opencv(stack(GRAY, GRAY, GRAY), ".png"),
    "tiff gray 16": tiff(GRAY),
    "tiff rgb 12 in 16": tiff(stack(GRAY, GRAY, GRAY), **RGB),
    "tiff rgb 16, big-endian": tiff(stack(GRAY, GRAY, GRAY).astype(">u2"), byteorder=">", **RGB),
    "tiff rgb 16, planes": tiff(np.stack([GRAY] * 3), planarconfig="separate", **RGB),
    "tiff rgba 16": tiff(stack(GRAY, GRAY, GRAY, ALPHA), extrasamples=["unassalpha"], **RGB),
    "tiff gray and alpha 16": tiff(
        stack(GRAY, ALPHA), photometric="minisblack", extrasamples=["unassalpha"], planarconfig="contig"
    ),
    "tiff white is zero and alpha 16": tiff(
        stack(4095 - GRAY, ALPHA),
        photometric="miniswhite", extrasamples=["unassalpha"], planarconfig="contig",
    ),
    "big tiff rgb 16": tiff(stack(GRAY, GRAY, GRAY), bigtiff=True, **RGB),
    "tiff rgb 16, zipped": tiff(stack(GRAY, GRAY, GRAY), compression="zlib", **RGB),
    "opencv's tiff rgb 16, lzw": opencv(stack(GRAY, GRAY, GRAY), ".tiff"),
    "tiff rgb 32": tiff(stack(GRAY, GRAY, GRAY).astype(np.uint32) * 1000, **RGB),
    "tiff rgb float": tiff(stack(GRAY, GRAY, GRAY).astype(np.float32) / 4095, **RGB),
    "tiff gray float": tiff(GRAY.astype(np.float32) / 4095 - 0.5),
    "tiff gray double": tiff(GRAY.astype(np.float64) * 1e6),
    "tiff gray signed 16": tiff(GRAY.astype(np.int16) - 2000),
    "tiff gray 32": tiff(GRAY.astype(np.uint32) * 1000),
    "tiff of two pages": tiff(np.stack([GRAY, 4095 - GRAY])),
}  # fmt: skip


@pytest.mark.parametrize("data", DEEP.values(), ids=DEEP.keys())
def test_the_window_applies_to_every_depth_and_layout(data: bytes) -> None:
    decoded = decode_image(data)
    assert decoded.shape == WINDOWED.shape
    assert np.abs(decoded.astype(int) - WINDOWED).max() <= 1


def test_deep_colour_becomes_luminance_before_the_window() -> None:
    red, green, blue = GRAY, 4095 - GRAY, np.roll(GRAY, 5, axis=1)
    luminance = 0.299 * red.astype(float) + 0.587 * green + 0.114 * blue
    expected = window_to_8_bit(luminance)
    for data in (
        png(stack(red, green, blue), 2),
        tiff(stack(red, green, blue), **RGB),
        tiff(np.stack([red, green, blue]), planarconfig="separate", **RGB),
        opencv(stack(blue, green, red), ".tiff"),
    ):
        assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


SHALLOW = (GRAY >> 4).astype(np.uint8)
COLOURS = Image.fromarray(SHALLOW).convert("RGB")
EIGHT_BITS = {
    "jpeg gray": pil(Image.fromarray(SHALLOW), "JPEG", quality=100),
    "jpeg rgb": pil(COLOURS, "JPEG", quality=100),
    "jpeg cmyk": pil(COLOURS.convert("CMYK"), "JPEG", quality=100),
    "png rgba": pil(COLOURS.convert("RGBA"), "PNG"),
    "png gray and alpha": pil(Image.fromarray(SHALLOW).convert("LA"), "PNG"),
    "png transparent": png(stack(SHALLOW, SHALLOW * 0), 4, 8),
    "png palette": pil(Image.fromarray(SHALLOW).convert("P"), "PNG"),
    "tiff rgb": tiff(np.asarray(COLOURS), **RGB),
    "tiff palette": tiff(
        SHALLOW, photometric="palette", colormap=np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
    ),
    "tiff gray and alpha": pil(Image.fromarray(SHALLOW).convert("LA"), "TIFF"),
    "tiff cmyk": pil(COLOURS.convert("CMYK"), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("data", EIGHT_BITS.values(), ids=EIGHT_BITS.keys())
def test_eight_bits_stay_as_they_are(data: bytes) -> None:
    decoded = decode_image(data)
    assert decoded.shape == SHALLOW.shape
    assert np.abs(decoded.astype(int) - SHALLOW).max() <= 3


def test_one_bit_is_black_and_white() -> None:
    bits = SHALLOW > 100
    for data in (
        pil(Image.fromarray(bits), "PNG"),
        tiff(bits, photometric="minisblack"),
        pil(Image.fromarray(bits), "TIFF"),
    ):
        np.testing.assert_array_equal(decode_image(data), bits * np.uint8(255))


#: EXIF's value -> the upright image as it is stored.
STORED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
    6: np.rot90, 7: lambda a: np.rot90(a.T, 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


def oriented_files(orientation: int) -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of the stored image that say how it is turned, and the upright image each holds."""
    shallow, deep = (np.ascontiguousarray(STORED[orientation](upright)) for upright in (SHALLOW, GRAY))
    exif = Image.Exif()
    exif[274] = orientation
    tag = {"extratags": [(274, 3, 1, orientation, True)]}
    image = Image.fromarray(shallow)
    return {
        "jpeg": (pil(image, "JPEG", quality=100, exif=exif), SHALLOW),
        "jpeg rgb": (pil(image.convert("RGB"), "JPEG", quality=100, exif=exif), SHALLOW),
        "jpeg cmyk": (pil(image.convert("CMYK"), "JPEG", quality=100, exif=exif), SHALLOW),
        "png": (pil(image, "PNG", exif=exif), SHALLOW),
        "png 16": (pil(Image.fromarray(deep), "PNG", exif=exif), WINDOWED),
        "png rgb 16": (with_exif(png(stack(deep, deep, deep), 2), exif), WINDOWED),
        "tiff": (tiff(shallow, **tag), SHALLOW),
        "tiff 16": (tiff(deep, **tag), WINDOWED),
        "tiff rgb": (tiff(stack(shallow, shallow, shallow), **RGB, **tag), SHALLOW),
        "tiff rgb 16": (tiff(stack(deep, deep, deep), **RGB, **tag), WINDOWED),
        "tiff rgb 16, planes": (tiff(np.stack([deep] * 3), planarconfig="separate", **RGB, **tag), WINDOWED),
        "tiff zipped": (tiff(shallow, compression="zlib", **tag), SHALLOW),
    }


def with_exif(data: bytes, exif: Image.Exif) -> bytes:
    """The PNG with an eXIf chunk before its pixels."""
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    place = data.index(b"IDAT") - 4
    return data[:place] + framed + data[place:]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_files_say(orientation: int) -> None:
    for name, (data, upright) in oriented_files(orientation).items():
        decoded = decode_image(data)
        assert decoded.shape == upright.shape, name
        assert np.abs(decoded.astype(int) - upright).max() <= 3, name


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    np.testing.assert_array_equal(decode_image(pil(Image.fromarray(SHALLOW), "PNG", exif=exif)), SHALLOW)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(np.full((4, 4, 3), np.nan, np.float32), **RGB), "not numbers"),
        (tiff(SHALLOW.astype(np.int8)), "signed 8-bit"),
        (tiff(stack(GRAY, GRAY, GRAY, GRAY), photometric="separated"), "is not read; convert it"),
        (tiff(stack(GRAY, GRAY, GRAY), **RGB)[:3000], "broken image"),
        (DEEP["png rgb 16"][:300], "broken image"),
        (DEEP["tiff rgb 16, zipped"][:500], "TIFF"),
        (EIGHT_BITS["jpeg cmyk"][:600], "broken JPEG"),
        (tiff(np.broadcast_to(np.uint16(0), (9000, 9000, 3)), compression="zlib", **RGB), "larger than"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_image(data)
