"""What the header of a DICOM file says of its image: whose it is, which study, which view. No pixels."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForProcessing,
    MediaStorageDirectoryStorage,
)

from shards.errors import DataError

#: What is read of a header, so that long private elements cost nothing.
_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientSex",
    "PatientAge", "Modality", "BodyPartExamined", "ViewPosition", "ViewCodeSequence",
    "PresentationIntentType",
)  # fmt: skip
#: Words of a view code's meaning -> view, the first that fits.
_MEANINGS = {
    "postero-anterior": "PA",
    "antero-posterior": "AP",
    "left lateral": "LL",
    "right lateral": "RL",
    "lateral": "LATERAL",
}
#: Letter behind an age -> how many of it make a year.
_A_YEAR = {"Y": 1, "M": 12, "W": 52, "D": 365}
_OLDEST = 120
_MAGIC_AT, _MAGIC = 128, b"DICM"


@dataclass(frozen=True, kw_only=True)
class DicomHeader:
    """Header of a DICOM file.

    Attributes:
        patient_id, study_uid, series_uid, image_uid: "" where there is none.
        view: ViewPosition or what ViewCodeSequence means ("PA", "AP", "LL", "LATERAL", ...), or "".
        body_part: BodyPartExamined, upper case, or "".
        modality: "CR", "DX", ..., or "".
        sex: "M", "F" or "".
        age: in whole years, or None.
        is_raw: whether it holds values of a detector that are FOR PROCESSING before anybody looks at them.
        is_directory: whether it is a DICOMDIR, which lists the files of a medium and has no image.
    """

    patient_id: str
    study_uid: str
    series_uid: str
    image_uid: str
    view: str
    body_part: str
    modality: str
    sex: str
    age: int | None
    is_raw: bool
    is_directory: bool


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file begins as DICOM files do; it is then at its beginning again."""
    begin = file.read(_MAGIC_AT + len(_MAGIC))
    file.seek(0)
    return begin[_MAGIC_AT:] == _MAGIC


def read_header(file: BinaryIO) -> DicomHeader:
    """Read the header of a DICOM file that is open at its beginning.

    Raises:
        DataError: no DICOM file, or damaged; the message holds nothing of the header.
    """
    with dicom_errors():
        refuse_deflated(file)
        file.seek(0)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
        return DicomHeader(**header_fields(header))


def header_fields(header: Any) -> dict[str, Any]:
    """The fields of `DicomHeader`, of a data set of pydicom."""
    sex = text_of(header, "PatientSex").upper()
    return {
        "patient_id": text_of(header, "PatientID"),
        "study_uid": text_of(header, "StudyInstanceUID"),
        "series_uid": text_of(header, "SeriesInstanceUID"),
        "image_uid": text_of(header, "SOPInstanceUID"),
        "view": text_of(header, "ViewPosition").upper() or _coded_view(header),
        "body_part": text_of(header, "BodyPartExamined").upper(),
        "modality": text_of(header, "Modality").upper(),
        "sex": sex if sex in ("M", "F") else "",
        "age": _age(text_of(header, "PatientAge").upper()),
        "is_raw": text_of(header, "PresentationIntentType").upper() == "FOR PROCESSING"
        or header.get("SOPClassUID") == DigitalXRayImageStorageForProcessing,
        "is_directory": header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage,
    }


def refuse_deflated(file: BinaryIO) -> None:
    """Refuse a deflated file before it is unpacked.

    Raises:
        DataError: it is one.
    """
    read_preamble(file, force=False)
    meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise DataError(
            "deflated DICOM files are not read, since their size is unknown before they are unpacked; "
            "convert them (dcmtk: dcmconv +te)"
        )


def text_of(header: Any, name: str) -> str:
    """A value as text, stripped; "" where there is none."""
    value = header.get(name)
    return "" if value is None else str(value).strip()


def integer_of(header: Any, name: str) -> int | None:
    """A value as a whole number; None where there is none.

    Raises:
        DataError: it is no number.
    """
    value = header.get(name)
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError):
        raise DataError(f"DICOM field {name} is no number") from None


@contextmanager
def dicom_errors() -> Iterator[None]:
    """Whatever pydicom raises becomes a `DataError` without a value of the header; its logs are silent."""
    # pydicom warns of, and logs, values that break the standard; such values may be names of patients.
    with warnings.catch_warnings(), _quiet("pydicom"):
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except InvalidDicomError as error:
            raise DataError("not a DICOM file") from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or 'damaged'}") from error
        except Exception as error:
            # pydicom parses a value when it is first looked at, so a damaged file can raise almost anything
            # anywhere; the text of such an error may hold values of the header.
            raise DataError(f"damaged DICOM file ({type(error).__name__})") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No log records of one library."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _coded_view(header: Any) -> str:
    codes = header.get("ViewCodeSequence")
    meaning = text_of(codes[0], "CodeMeaning").lower() if codes else ""
    return next((view for words, view in _MEANINGS.items() if words in meaning), "")


def _age(text: str) -> int | None:
    """Years of "061Y", "018M" or, against the standard, "61"."""
    digits, unit = (text, "Y") if text.isdecimal() else (text[:-1], text[-1:])
    if not (digits.isascii() and digits.isdecimal()) or unit not in _A_YEAR:
        return None
    years = int(digits) // _A_YEAR[unit]
    return years if years <= _OLDEST else None
