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
from tests.shards.dicom_levels import RAMP, close, linear, read


def test_bits_above_the_high_bit_are_no_part_of_the_value() -> None:
    overlay = RAMP | (np.uint16(1) << 15)
    np.testing.assert_array_equal(read(dicom.write(overlay, bits=12)), read(dicom.write(RAMP, bits=12)))


@pytest.mark.parametrize("signed", [False, True])
def test_a_high_bit_further_up_shifts_the_value(signed: bool) -> None:
    values = RAMP.astype(np.int32) - (2048 if signed else 0)
    stored = (values << 4).astype(np.int16 if signed else np.uint16)
    fields = {"WindowCenter": 300, "WindowWidth": 2000}
    close(read(dicom.write(stored, bits=12, HighBit=15, **fields)), linear(values, 300, 2000))


@pytest.mark.parametrize(
    ("ratio", "shape", "scale"),
    [([2, 1], (96, 64), (1, 2)), ([1, 2], (48, 128), (2, 1)), ([3, 3], (48, 64), (1, 1))],
)
def test_pixels_become_square(ratio: list[int], shape: tuple[int, int], scale: tuple[int, int]) -> None:
    radiograph = read_dicom(dicom.write(RAMP, bits=12, PixelAspectRatio=ratio))
    assert radiograph.pixels.shape == shape
    assert radiograph.scale == scale  # by which boxes of the file's pixels move


#: As it hangs: the head up, the patient's left on the right side.
HUNG = (np.arange(12).reshape(3, 4) * 20).astype(np.uint8)
#: Where rows and columns of an image point -> the image that is `HUNG`.
STORED = {
    ("L", "F"): HUNG,
    ("R", "F"): HUNG[:, ::-1],
    ("L", "H"): HUNG[::-1],
    ("R", "H"): np.rot90(HUNG, 2),
    ("F", "R"): np.rot90(HUNG),
    ("H", "L"): np.rot90(HUNG, -1),
    ("F", "L"): HUNG.T,
    ("H", "R"): np.rot90(HUNG.T, 2),
    ("RA", "FP"): HUNG[:, ::-1],
}


@pytest.mark.parametrize("directions", STORED)
def test_a_film_is_turned_as_it_hangs(directions: tuple[str, str]) -> None:
    data = dicom.write(np.ascontiguousarray(STORED[directions]), PatientOrientation=list(directions))
    found = read_dicom(data)
    np.testing.assert_array_equal(found.pixels, HUNG)
    kept = read_dicom(data, turn=False)
    np.testing.assert_array_equal(kept.pixels, STORED[directions])
    told = [] if directions == ("L", "F") else ["films were turned", "films are turned"]
    assert [note[:17].strip() for note in (*found.notes, *kept.notes)] == [words[:17] for words in told]


@pytest.mark.parametrize("forward", ["A", "P"])
def test_a_film_from_the_side_is_turned_and_never_mirrored(forward: str) -> None:
    """It may face either way, and letters in a mirrored one cannot be read."""
    back = "P" if forward == "A" else "A"
    quarter = {(forward, "F"): 0, ("H", forward): 1, (back, "H"): 2, ("F", back): 3}
    for directions, turns in quarter.items():
        stored = np.ascontiguousarray(np.rot90(HUNG, -turns))
        found = read(dicom.write(stored, PatientOrientation=list(directions)))
        np.testing.assert_array_equal(found, HUNG)


@pytest.mark.parametrize("directions", [None, "L", ["L", ""], ["L", "R"], ["H", "F"], ["LE", "CD"], ["", ""]])
def test_an_orientation_that_says_too_little_turns_nothing(directions: Any) -> None:
    fields = {} if directions is None else {"PatientOrientation": directions}
    found = read_dicom(dicom.write(HUNG, **fields))
    np.testing.assert_array_equal(found.pixels, HUNG)
    assert found.notes == ()


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


@settings(max_examples=150)
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
