"""Masks come back as they were, and what is no PNG of masks is refused before memory is taken for it."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.errors import DataError
from shards.masks import MOST_PIXELS, RunKind, decode_masks, decode_runs, encode_masks, read_masks


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"0"), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_masks_come_back(count: int, size: int, seed: int) -> None:
    masks = np.random.default_rng(seed).integers(0, 2, (count, size, size)).astype(np.uint8)
    found = decode_masks(encode_masks(list(masks)), count, size)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, masks)


def test_a_sample_takes_one_bit_a_pixel_stacked_in_the_order_of_its_names() -> None:
    first, second = np.zeros((2, 8, 8), np.uint8)
    first[1, 2], second[5, 7] = 1, 1
    data = encode_masks([first, second])
    stacked = Image.open(io.BytesIO(data))
    assert (stacked.mode, stacked.size) == ("1", (8, 16))
    assert np.argwhere(np.asarray(stacked)).tolist() == [[1, 2], [13, 7]]
    masks = read_masks({"masks.png": data}, ["mass", "edema"], ["edema", "mass"], 8)
    np.testing.assert_array_equal(masks["edema"], second)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no PNG at all, of enough bytes",
        png(np.zeros((16, 8), np.uint8)), png(np.zeros((8, 16), bool)),
        png(np.zeros((24, 8), bool)), png(np.zeros((16, 8, 3), np.uint8)), claiming(8, 17),
        encode_masks([np.eye(8, dtype=np.uint8)] * 2)[:45], claiming(8, 16)[:50],
    ],
)  # fmt: skip
def test_what_is_no_png_of_such_masks_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="masks"):
        decode_masks(data, 2, 8)


def test_names_and_masks_stand_and_fall_together() -> None:
    data = encode_masks([np.eye(8, dtype=np.uint8)])
    for members, names in (({"masks.png": data}, []), ({}, ["mass"])):
        with pytest.raises(DataError, match="not both there"):
            read_masks(members, names, ["mass"], 8)
    assert read_masks({}, [], ["mass"], 8) == {}


def test_an_index_mask_with_unknown_numbers_or_another_size_is_refused() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, 0] = 2
    with pytest.raises(DataError, match="no labels of the dataset"):
        read_masks({"mask.png": png(pixels)}, [], ["mass"], 8)
    for data in (png(pixels[:4]), png(pixels.astype(np.uint16)), claiming(8192, 8192), b""):
        with pytest.raises(DataError, match="mask"):
            read_masks({"mask.png": data}, [], ["mass"], 8)


def test_memory_is_taken_for_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    side = 8192
    tracemalloc.start()
    try:
        for data, count in ((claiming(side, 128 * side), 128), (claiming(side, 2 * side), 1)):
            with pytest.raises(DataError):
                decode_masks(data, count, side)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_PIXELS / 100
    monkeypatch.setattr("shards.masks.MOST_PIXELS", 100)
    with pytest.raises(DataError, match="2 masks have more than 100 pixels"):
        encode_masks([np.zeros((8, 8), np.uint8)] * 2)


def runs(mask: np.ndarray, kind: RunKind) -> str:
    """Run lengths of a mask, written pixel by pixel."""
    words, position, last = [], 0, 0
    flat = [int(mask[y, x]) for x in range(mask.shape[1]) for y in range(mask.shape[0])]
    while position < len(flat):
        if flat[position]:
            start = position
            while position < len(flat) and flat[position]:
                position += 1
            words += [start - last if kind == "relative" else start + 1, position - start]
            last = position
        else:
            position += 1
    return " ".join(map(str, words))


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_run_lengths_give_an_asymmetric_shape_back(kind: RunKind) -> None:
    mask = np.zeros((7, 5), dtype=np.uint8)
    mask[0, 0] = mask[6, 4] = 1
    mask[2:5, 1] = mask[3, 2:5] = 1  # an L: neither turned nor mirrored it is the same
    found = decode_runs(runs(mask, kind), 7, 5, kind)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, mask)


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from(["absolute", "relative"])
)
def test_run_lengths_of_any_mask_come_back(height: int, width: int, seed: int, kind: RunKind) -> None:
    mask = np.random.default_rng(seed).integers(0, 2, (height, width)).astype(np.uint8)
    mask[0, 0] = 1  # no runs at all are no text
    np.testing.assert_array_equal(decode_runs(runs(mask, kind), height, width, kind), mask)


def test_relative_runs_by_hand() -> None:
    # Column 0 has 3 rows: skip 1, paint 2; skip 1 (row 0 of column 1), paint 1.
    assert decode_runs("1 2 1 1", 3, 2, "relative").tolist() == [[0, 0], [1, 1], [1, 0]]
    assert decode_runs("2 2 5 1", 3, 2, "absolute").tolist() == [[0, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "relative"), ("-1", "relative"), ("1", "relative"), ("1 x", "relative"), ("1 2 3", "absolute"),
     ("1.0 2", "absolute"), ("0 1", "absolute"), ("6 2", "absolute"), ("1 2 3 1", "relative"),
     ("0 99999999999999999999", "relative"), (f"0 {'9' * 5000}", "relative"), ("\u0663 1", "relative")],
)  # fmt: skip
def test_what_is_no_run_lengths_is_refused(text: str, kind: RunKind) -> None:
    with pytest.raises(DataError, match="run lengths"):
        decode_runs(text, 3, 2, kind)
