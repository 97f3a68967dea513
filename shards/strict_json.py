"""Reading files that strangers may have written: bounded, unambiguous, with errors that quote nothing.

Plain `json.loads` takes the last of two equal names, NaN, half surrogate pairs and any depth; its errors
quote the text. Hand-written, because no JSON library of this project refuses all four, and records need no
more than their annotations (pydantic costs 0.2 s at every start of a command).
"""

import dataclasses
import errno
import json
import math
import os
import re
import stat
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

#: Brackets inside each other that a file may have.
MAX_DEPTH = 32

_SURROGATE = re.compile("[\ud800-\udfff]")
#: A name that means nothing else in a path, a URL, a shell command or on a terminal.
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

Record = TypeVar("Record")


class JsonError(ValueError):
    """What is wrong with a file, without a word of its content."""


def open_regular(path: Path | str) -> int:
    """A descriptor of a regular file, for reading.

    Raises:
        OSError: it cannot be opened.
        JsonError: a pipe, socket, device or folder.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise JsonError("not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise JsonError("not a regular file")
    return descriptor


def read_limited(path: Path | str, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        JsonError: a pipe, device or folder, or larger than that.
    """
    with open(open_regular(path), "rb") as file:
        about = os.fstat(file.fileno())
        data = file.read(min(about.st_size, most) + 1)
    if len(data) > most:
        raise JsonError(f"{about.st_size} bytes, more than the limit of {most}")
    return data


def parse_json(data: bytes | str, most: int) -> Any:
    """The value of a JSON text of at most `most` bytes.

    Raises:
        JsonError: longer, no JSON, no Unicode, a name twice in one object, a number that is not finite, or
            deeper than `MAX_DEPTH`.
    """
    if len(data) > most:
        raise JsonError(f"{len(data)} bytes, more than the limit of {most}")
    try:
        text = data if isinstance(data, str) else data.decode()
        value = _DECODER.decode(text)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(f"no JSON at byte {error.pos}") from None
    except UnicodeDecodeError:
        raise JsonError("not UTF-8") from None
    except RecursionError:
        raise JsonError(f"more than {MAX_DEPTH} brackets inside each other") from None
    except ValueError:  # an integer of more digits than Python converts
        raise JsonError("a number is too large") from None
    _check_value(value, text)
    return value


def stream_object(file: TextIO, most: int) -> Iterator[tuple[str, Any]]:
    """Names and values of the one object that a file of UTF-8 text holds, one in memory at a time.

    Args:
        most: characters of a value.

    Raises:
        JsonError: as `parse_json`, but a name that the object itself has twice is the caller's to notice.
    """
    text = ""
    while len(text.strip()) < 2 and (more := file.read(_STREAM_STEP)):
        text += more
    opened = _OPENED.match(text)
    if opened is None:
        raise JsonError("not an object")
    start = end = opened.end()
    is_last = opened[1] == "}"
    while not is_last:
        try:
            name, value, end, is_last = _member(text, start)
        except json.JSONDecodeError:  # broken, or not all of it is there yet
            more = file.read(max(_STREAM_STEP, len(text) - start))
            if not more or len(text) - start > most:
                raise JsonError("no JSON, or a value that is too long") from None
            text, start = text[start:] + more, 0
            continue
        except JsonError:
            raise
        except RecursionError:
            raise JsonError(f"more than {MAX_DEPTH} brackets inside each other") from None
        except ValueError:  # as in `parse_json`
            raise JsonError("a number is too large") from None
        _check_value([name, value], text[start:end])
        yield name, value
        start = end
    if (text[end:] + file.read(_STREAM_STEP)).strip():
        raise JsonError("something stands behind the object")


def _member(text: str, start: int) -> tuple[str, Any, int, bool]:
    """Name and value at `start`, where the next member begins, and whether there is none."""
    name, end = _DECODER.raw_decode(text, _SPACE.match(text, start).end())  # type: ignore[union-attr]
    colon = _COLON.match(text, end)
    if colon is None or not isinstance(name, str):
        raise json.JSONDecodeError("", text, end)
    value, end = _DECODER.raw_decode(text, colon.end())
    separator = _SEPARATOR.match(text, end)
    if separator is None:
        raise json.JSONDecodeError("", text, end)
    return name, value, separator.end(), separator[1] == "}"


def _check_value(value: Any, text: str) -> None:
    _check_depth(value)
    if not text.isascii() and _SURROGATE.search(text):  # how a text file marks bytes that are no text
        raise JsonError("not UTF-8")
    # Only an escape can bring half of a surrogate pair: UTF-8 has none.
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise JsonError("half of a surrogate pair")


def to_record(value: Any, kind: type[Record]) -> Record:
    """A dataclass from parsed JSON, every value checked against its annotation; nothing is converted.

    Annotations may be str, int, float (an int passes), bool, None, Any, their unions, and list, dict and
    dataclasses of these.

    Raises:
        JsonError: a field is missing, unknown or of another type; names the field.
    """
    record: Record = _convert(value, kind, "")
    return record


def _convert(value: Any, kind: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0], place)
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{place}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _convert(item, arguments[1], f"a value of {place}") for name, item in value.items()}
    expected = origin or kind
    if type(value) is expected or (expected is float and type(value) is int and abs(value) < 2**53):
        return value
    raise JsonError(f"{place or 'the file'} is not of type {expected.__name__}")


def _dataclass(value: Any, kind: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise JsonError(f"{place or 'the file'} is no object")
    prefix = f"{place}." if place else ""
    hints = get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    if not value.keys() <= known.keys():
        raise JsonError(f"{place or 'the file'} has an unknown field")
    for name, item in known.items():
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise JsonError(f"{prefix}{name} is missing")
    return kind(**{name: _convert(item, hints[name], f"{prefix}{name}") for name, item in value.items()})


_OPENED = re.compile(r"\s*\{\s*(\}?)")
_SPACE, _COLON, _SEPARATOR = re.compile(r"\s*"), re.compile(r"\s*:\s*"), re.compile(r"\s*([,}])")
_STREAM_STEP = 1 << 18


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise JsonError("an object has one name twice")
    return values


def _no_constant(_: str) -> NoReturn:
    raise JsonError("a number is not finite")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise JsonError("a number is not finite")
    return number


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return
        level = [
            child
            for container in containers
            for child in (container.values() if isinstance(container, dict) else container)
        ]
    raise JsonError(f"more than {MAX_DEPTH} brackets inside each other")


# Behind the functions that it calls.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
