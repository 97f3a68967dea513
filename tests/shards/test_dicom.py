"""DICOM files written by pydicom, quirk by quirk, and read back as 8-bit radiographs."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless

from shards.dicom import read_dicom
from shards.errors import DataError
from tests.fixtures import dicom

#: Asymmetric in both directions, so that a transposed, flipped or shifted result differs.
RAMP = (np.arange(48 * 64).reshape(48, 64) * 4095 // (48 * 64 - 1)).astype(np.uint16)


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """The LINEAR window of PS3.3 C.11.2.1.2 with 0..255 as its range, written out independently."""
    values = values.astype(np.float64)
    shown = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    shown[values <= center - 0.5 - (width - 1) / 2] = 0
    shown[values > center - 0.5 + (width - 1) / 2] = 255
    return shown


def close(found: np.ndarray, expected: np.ndarray, levels: float = 1.0) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).max() <= levels


def read(data: bytes, **options: Any) -> np.ndarray:
    return read_dicom(data, **options).pixels


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


def test_bits_above_the_high_bit_are_no_part_of_the_value() -> None:
    overlay = RAMP | (np.uint16(1) << 15)
    np.testing.assert_array_equal(read(dicom.write(overlay, bits=12)), read(dicom.write(RAMP, bits=12)))


@pytest.mark.parametrize("signed", [False, True])
def test_a_high_bit_further_up_shifts_the_value(signed: bool) -> None:
    values = RAMP.astype(np.int32) - (2048 if signed else 0)
    stored = (values << 4).astype(np.int16 if signed else np.uint16)
    fields = {"WindowCenter": 300, "WindowWidth": 2000}
    close(read(dicom.write(stored, bits=12, HighBit=15, **fields)), linear(values, 300, 2000))


def test_padding_does_not_move_the_window() -> None:
    film = RAMP.copy()
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
    found = read(dicom.write(film, bits=12, PhotometricInterpretation=photometric, **fields))
    assert not found[:, :8].any()
    assert not found[:4].any()
    close(found[4:, 8:], read(unpadded)[4:, 8:].astype(float), 40)


def test_saturated_pixels_inside_the_film_are_no_padding() -> None:
    film = np.clip(RAMP, 10, 4000)
    film[:4] = film[20:30, 20:30] = 4095
    found = read(dicom.write(film, bits=12, PixelPaddingValue=4095))
    assert not found[:4].any()
    assert (found[20:30, 20:30] == 255).all()


@pytest.mark.parametrize(
    ("ratio", "shape", "scale"),
    [([2, 1], (96, 64), (1, 2)), ([1, 2], (48, 128), (2, 1)), ([3, 3], (48, 64), (1, 1))],
)
def test_pixels_become_square(ratio: list[int], shape: tuple[int, int], scale: tuple[int, int]) -> None:
    radiograph = read_dicom(dicom.write(RAMP, bits=12, PixelAspectRatio=ratio))
    assert radiograph.pixels.shape == shape
    assert radiograph.scale == scale  # by which boxes of the file's pixels move


def test_colour_becomes_luminance() -> None:
    shades = (RAMP >> 4).astype(np.uint8)
    colour = np.stack([shades, shades // 2 + 60, 200 - shades // 2], axis=2)
    luminance = colour @ np.array([0.299, 0.587, 0.114])
    close(read(dicom.write(colour)), luminance)
    for bits in (10, 12, 16):  # of 16 that are allocated; the upper ones are empty
        deep = colour.astype(np.uint16) << (bits - 8)
        close(read(dicom.write(deep, bits=bits)), luminance)
    ycc = cv2.cvtColor(colour, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    close(read(dicom.write(ycc, PhotometricInterpretation="YBR_FULL")), luminance, 3)


def test_a_palette_is_looked_up() -> None:
    film = (RAMP >> 4).astype(np.uint8)
    shades = np.arange(256)[::-1] * 257
    fields: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        fields[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        fields[f"{colour}PaletteColorLookupTableData"] = shades.astype("<u2").tobytes()
    close(read(dicom.write(film, **fields)), 255.0 - film)


def test_run_length_encoding_is_read() -> None:
    data = dicom.write(RAMP, bits=12)
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.compress(RLELossless)
    np.testing.assert_array_equal(read(dicom.saved(dataset)), read(data))


def test_the_header_is_told() -> None:
    found = read_dicom(dicom.write(RAMP, bits=12))
    assert (found.patient_id, found.study_uid, found.series_uid) == ("P-0001", "1.2.3.4", "1.2.3.4.5")
    assert (found.view, found.body_part, found.modality) == ("PA", "CHEST", "CR")
    assert found.image_uid.startswith("2.25.") or found.image_uid.startswith("1.")


REFUSED = {
    "no DICOM": (b"JFIF" * 100, "not a DICOM file"),
    "empty": (b"", "not a DICOM file"),
    "no pixels": (dicom.saved(dicom.header()), "no image"),
    "frames": (dicom.write(np.tile(RAMP, (2, 1)), Rows=48, NumberOfFrames=2), "2 frames"),
    "huge": (dicom.write(RAMP, Rows=60000, Columns=60000), "larger than the limit"),
    "32 bits": (dicom.write(RAMP, BitsAllocated=32), "32 bits allocated"),
    "short pixels": (dicom.write(RAMP, Rows=480), "cannot be decoded"),
    "gray of three samples": (
        dicom.write(np.dstack([RAMP >> 4] * 3).astype(np.uint8), PhotometricInterpretation="MONOCHROME2"),
        "3 samples a pixel calls itself MONOCHROME2",
    ),
    "unknown photometric": (dicom.write(RAMP, PhotometricInterpretation="ARGB"), "ARGB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason):
        read_dicom(data)


def test_deflated_files_are_refused_before_they_are_unpacked() -> None:
    dataset = dicom.header(Rows=48, Columns=64)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with pytest.raises(DataError, match="dcmconv"):
        read_dicom(dicom.saved(dataset))


def test_a_missing_decoder_names_the_package(tmp_path: Path) -> None:
    """In a process of its own in which the optional decoders cannot be imported."""
    dataset = pydicom.dcmread(io.BytesIO(dicom.write(RAMP, bits=12)))
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    (tmp_path / "film.dcm").write_bytes(dicom.saved(dataset))
    program = (
        "import sys\n"
        "for name in ('libjpeg', 'openjpeg', 'pylibjpeg', 'gdcm', 'jpeg_ls'): sys.modules[name] = None\n"
        "from shards.dicom import read_dicom\n"
        "try: read_dicom(open(sys.argv[1], 'rb').read())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "film.dcm")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith("DataError compressed as JPEG Lossless")
    assert "pip install pylibjpeg pylibjpeg-libjpeg" in done.stdout


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_gives_pixels_or_one_clear_error(data: st.DataObject) -> None:
    """Bytes replaced anywhere: never another exception, never a value of the header in the message."""
    film = bytearray(dicom.write(RAMP, bits=12, WindowCenter=1500, WindowWidth=800))
    for _ in range(data.draw(st.integers(1, 6))):
        film[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        film = film[: data.draw(st.integers(0, len(film)))]
    said = ""
    try:
        pixels = read_dicom(bytes(film)).pixels
        assert (pixels.dtype, pixels.ndim) == (np.uint8, 2)
    except DataError as error:
        said = str(error)
    assert "Planted" not in said


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="needs dcmtk (apt-get install dcmtk)")
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_an_independent_reader_agrees(tmp_path: Path, photometric: str) -> None:
    data = dicom.write(
        RAMP, bits=12, WindowCenter=1500, WindowWidth=800, PhotometricInterpretation=photometric
    )
    (tmp_path / "film.dcm").write_bytes(data)
    subprocess.run(
        ["dcm2pnm", "--use-window", "1", "--write-8-bit-pnm", tmp_path / "film.dcm", tmp_path / "film.pgm"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    theirs = cv2.imread(str(tmp_path / "film.pgm"), cv2.IMREAD_UNCHANGED)
    close(read(data), theirs.astype(float))


@pytest.mark.shared
@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="needs dcmtk (apt-get install dcmtk)")
def test_a_real_15_bit_film_agrees_with_an_independent_reader(shared: Path, tmp_path: Path) -> None:
    film = shared / "data" / "dicom" / "RG1_UNCR.dcm"
    subprocess.run(
        ["dcm2pnm", "--use-window", "1", "--no-scaling", "--write-8-bit-pnm", film, tmp_path / "film.pgm"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    theirs = cv2.imread(str(tmp_path / "film.pgm"), cv2.IMREAD_UNCHANGED)
    found = read_dicom(film.read_bytes())
    assert found.view == "PA"
    close(found.pixels, theirs.astype(float))


@pytest.mark.shared
def test_a_real_jpeg_compressed_film_is_read(shared: Path) -> None:
    (film,) = (shared / "data" / "dicom").glob("xrv_*.dcm")
    found = read_dicom(film.read_bytes())
    assert found.pixels.shape == (1024, 1024)
    assert found.pixels[:50].mean() < found.pixels[900:, 400:600].mean(), "air dark, abdomen bright"
