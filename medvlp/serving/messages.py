"""Questions and answers as messages of `wire/prototypes.proto`. Needs no torch."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from medvlp.serving.questions import Answer, Modality, RequestError, Wanted, check_texts
from medvlp.serving.wire import prototypes_pb2 as wire

#: Number formats of embeddings on the wire.
_FORMATS: dict[int, np.dtype[Any]] = {wire.FLOAT32: np.dtype("<f4"), wire.FLOAT16: np.dtype("<f2")}
_MODALITIES: dict[Modality, wire.Modality] = {"image": wire.IMAGE, "report": wire.REPORT}

Reply = TypeVar("Reply", bound=Message)
Known = TypeVar("Known")


def nearest_request(embeddings: Any, wanted: Wanted) -> wire.NearestRequest:
    """[n, D] numbers as a request; a float16 array travels as it is, everything else as float32."""
    array = np.asarray(embeddings)
    number_format = wire.FLOAT16 if array.dtype == np.float16 else wire.FLOAT32
    return wire.NearestRequest(
        embeddings=np.ascontiguousarray(array, dtype=_FORMATS[number_format]).tobytes(),
        format=number_format,
        rows=len(array),
        wanted=_wanted_message(wanted),
    )


def text_request(texts: Sequence[str], wanted: Wanted) -> wire.NearestTextRequest:
    """Texts as a request.

    Raises:
        RequestError: one is not UTF-8.
    """
    check_texts(texts)
    return wire.NearestTextRequest(texts=texts, wanted=_wanted_message(wanted))


def image_request(files: Sequence[bytes], wanted: Wanted) -> wire.NearestImageRequest:
    """Image files as a request."""
    return wire.NearestImageRequest(images=files, wanted=_wanted_message(wanted))


def _wanted_message(wanted: Wanted) -> wire.Wanted:
    if wanted.of not in _MODALITIES:
        raise RequestError(f"of={wanted.of!r}: there are {' and '.join(_MODALITIES)}")
    return wire.Wanted(clusters=wanted.clusters, samples=wanted.samples, of=_MODALITIES[wanted.of])


def wanted_of(message: wire.Wanted) -> Wanted:
    """What a request wants.

    Raises:
        RequestError: it wants samples by a modality that does not exist.
    """
    of = next((name for name, number in _MODALITIES.items() if number == message.of), None)
    if of is None and message.samples:
        raise RequestError(f"modality {message.of} is none: ask for samples by their images (of: IMAGE)")
    return Wanted(message.clusters, message.samples, of or "image")


def rows_of(request: wire.NearestRequest, width: int, most: int) -> NDArray[np.floating[Any]]:
    """[n, width] embeddings of a request, at most `most` of them; a view of the message.

    Raises:
        RequestError: too many rows, an unknown format, or as many bytes as no such rows have.
    """
    if not 1 <= request.rows <= most:
        raise RequestError(f"{request.rows} rows: send 1 to {most} embeddings in a request")
    if request.format not in _FORMATS:
        raise RequestError(f"format {request.format} is neither FLOAT32 nor FLOAT16")
    dtype = _FORMATS[request.format]
    if len(request.embeddings) != request.rows * width * dtype.itemsize:
        raise RequestError(
            f"{len(request.embeddings)} bytes for {request.rows} rows: the embeddings of this run have "
            f"{width} numbers of {dtype.itemsize} bytes"
        )
    return np.frombuffer(request.embeddings, dtype).reshape(request.rows, width)


def to_message(answer: Answer, kind: type[Reply]) -> Reply:
    """An answer as a message with fields of the same names."""
    return kind(**_plain(answer))


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, which protobuf takes for messages (`asdict` would copy all lists)."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list) and value and is_dataclass(value[0]):
        return [_plain(item) for item in value]
    return value


def from_message(message: Message, kind: type[Known]) -> Known:
    """The answer (or part of one) in a message; a field that is absent is None."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        value = getattr(message, name)
        if get_origin(hint) is list:
            values[name] = [_from_part(part, get_args(hint)[0]) for part in value]
        elif type(None) in get_args(hint) and not message.HasField(name):
            values[name] = None
        else:
            values[name] = _from_part(value, hint)
    return kind(**values)


def _from_part(value: Any, kind: Any) -> Any:
    return from_message(value, kind) if isinstance(value, Message) else value
