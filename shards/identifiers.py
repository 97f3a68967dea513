"""Keyed hashing of patient and study ids (`--hash-ids`)."""

import hashlib
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from shards.errors import DataError
from shards.study import Study

KEY_VARIABLE = "MEDVLP_HASH_KEY"
_MIN_KEY_BYTES = 16
_MAX_KEY_BYTES = 64


def read_key(file: Path | None) -> bytes:
    """The secret key, from a file or else from the environment variable `MEDVLP_HASH_KEY`.

    Raises:
        DataError: there is no key, or it is shorter than 16 or longer than 64 bytes.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").encode()
        where = f"environment variable {KEY_VARIABLE}"
    else:
        where = str(file)
        try:
            key = file.read_bytes().strip()
        except OSError as error:
            raise DataError(f"cannot read the hash key {file}: {error.strerror}") from error
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise DataError(
            f"--hash-ids needs a secret key of {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} bytes in --hash-key FILE "
            f"or {KEY_VARIABLE}; {where} has {len(key)}"
        )
    return key


def key_fingerprint(key: bytes) -> str:
    """Tells whether two builds used one key, without telling the key."""
    return hashlib.blake2b(b"medvlp", key=key, digest_size=8, person=b"fingerprint").hexdigest()


def hash_identifiers(study: Study, key: bytes, identifying: Collection[str] = ()) -> Study:
    """The study with its patient and study id replaced by keyed hashes of 24 hexadecimal digits.

    Args:
        study: as its source gives it. key: the secret.
        identifying: fields of its `extra` that tell patient or study too, which are left out.
    """
    return replace(
        study,
        patient_id=_hash(study.patient_id, key, b"patient"),
        study_id=_hash(study.study_id, key, b"study"),
        extra={name: value for name, value in study.extra.items() if name not in identifying},
    )


def _hash(identifier: str, key: bytes, kind: bytes) -> str:
    return hashlib.blake2b(identifier.encode(), key=key, digest_size=12, person=kind).hexdigest()
