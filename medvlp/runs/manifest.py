"""`manifest.json`: what a checkpoint consists of. Without a true one there is no checkpoint.

Reading one needs no torch (it is imported where it is used): commands that only look at runs answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from medvlp.runs.errors import CheckpointError, UnreadableError
from shards.strict_json import JsonError, parse_json, read_limited, to_record

MANIFEST = "manifest.json"
#: Only a folder of `medvlp export` has it: everything of the method that is in neither encoder. What an
#: evaluation needs to know of the images (`identity.STORED_SIDE`, `WINDOW`) stands in its header.
EXPORTED_HEADS = "heads.safetensors"
#: All weights of the method, whole and in float32, whatever the ZeRO stage and precision.
WEIGHTS = "weights.safetensors"
#: In `Manifest.identity`: fingerprints of the samples that the run draws, and of what its validations measure
#: on. These follow from what could be read of a dataset, not from its hash.
DRAWN, VALIDATED = "drawn", "validated"
#: What the names of the metrics of a validation begin with.
VALIDATION_PREFIX = "valid/"
#: Version of the layout that this code writes and resumes from.
FORMAT = 2
FOLDER_PATTERN = re.compile(r"step-([0-9]{8,15})")
#: Largest manifest, in bytes.
_LIMIT = 1 << 26
#: A relative path of plain names.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
#: What the disk says of a file that is not there. After any other refusal the file may be whole.
_ABSENT = (FileNotFoundError, NotADirectoryError)


@dataclass
class Manifest:
    """Description of one checkpoint.

    Attributes:
        step, epoch: finished optimiser steps; epoch of the last of them, from 0.
        world_size, zero_stage, precision, global_batch: of the run that saved it.
        config_hash: xxh3-128 of the resolved config.
        wandb_run_id: the W&B run that goes on, or None.
        created: UTC time in ISO 8601.
        versions: versions of the libraries that wrote it.
        files: path inside the folder -> {"bytes": size, "xxh3_128": checksum}.
        optimizer: name of the optimiser whose state it holds.
        metrics: the last logged ones.
        identity: hashes of the data, the tokenizer and the encoders (`RunIdentity.summary`), and of the
            samples that are drawn and validated on (`DRAWN`, `VALIDATED`); empty, or without these, in
            checkpoints of earlier versions.
        format: version of this layout.
        checksum: xxh3-128 of the file's text with nothing here; written by `to_json`.
    """

    step: int
    epoch: int
    world_size: int
    zero_stage: int
    precision: str
    global_batch: int
    config_hash: str
    wandb_run_id: str | None = None
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    optimizer: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    format: int = 1  # of files that do not say it
    checksum: str = ""

    def to_json(self) -> str:
        """The file's text, with its checksum."""
        values = dataclasses.asdict(self) | {"checksum": ""}
        if not self.identity:  # the text of older files, whose checksum must stay theirs
            del values["identity"]
        digest = xxhash.xxh3_128_hexdigest(_text(values).encode())
        return _text(values | {"checksum": digest})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a checkpoint folder.

        Raises:
            CheckpointError: no manifest, or not one of ours.
            UnreadableError: the disk refused to show it.
        """
        path = folder / MANIFEST
        try:
            data = read_limited(path, _LIMIT)
            manifest = to_record(parse_json(data, _LIMIT), cls)
            manifest._check_values(folder)
        except _ABSENT:
            raise CheckpointError(
                f"{path} is missing: the checkpoint was never finished or is being deleted"
            ) from None
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read now ({error.strerror or error})") from error
        except JsonError as error:
            raise CheckpointError(f"{path} cannot be read as a manifest ({error})") from error
        if (manifest.checksum or manifest.format >= FORMAT) and manifest.to_json().encode() != data:
            raise CheckpointError(f"{path} is damaged: it is not as it was written")
        return manifest

    def _check_values(self, folder: Path) -> None:
        """Refuse what no run writes: the values become paths, loops and lines on a terminal."""
        if not 1 <= self.format <= FORMAT:
            raise JsonError(f"format {self.format}, this program reads 1 to {FORMAT}")
        found = FOLDER_PATTERN.fullmatch(folder.name)
        if found and int(found[1]) != self.step:
            raise JsonError(f"step {self.step} in a folder of step {int(found[1])}")
        limits = {"step": 2**53, "epoch": 2**53, "global_batch": 2**31, "world_size": 2**20, "zero_stage": 4}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) < limit:
                raise JsonError(f"{name} is out of range")
        if not self.world_size or not self.files:
            raise JsonError("it lists no ranks or no files")
        for name, entry in self.files.items():
            if not _FILE.fullmatch(name) or ".." in name:
                raise JsonError("it names a file that is none of a checkpoint")
            if entry.keys() != {"bytes", "xxh3_128"} or type(entry["bytes"]) is not int:
                raise JsonError("an entry of a file is not bytes and xxh3_128")
            if entry["bytes"] < 0 or not isinstance(entry["xxh3_128"], str):
                raise JsonError("an entry of a file is not bytes and xxh3_128")
        texts = (self.created, self.precision, self.optimizer, self.wandb_run_id or "", *self.metrics)
        if not all(text.isprintable() and len(text) < 1000 for text in texts):
            raise JsonError("a text cannot be printed")

    def problem(self, folder: Path, names: Sequence[str]) -> str | None:
        """What is wrong with these files, or None when sizes and checksums are right.

        Raises:
            UnreadableError: the disk refused to show one that is there.
        """
        from medvlp.runs.state_files import checksum

        for name in names:
            path, entry = folder / name, self.files[name]
            try:
                if path.stat().st_size != entry["bytes"]:
                    return f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
                if checksum(path) != entry["xxh3_128"]:
                    return f"{path} is damaged: its checksum differs from the manifest's"
            except _ABSENT as error:
                return f"{path} cannot be read ({error.strerror})"
            except OSError as error:
                raise UnreadableError(f"{path} cannot be read now ({error.strerror or error})") from error
        return None


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def rank_file(rank: int) -> str:
    """Path of a rank's own state inside a checkpoint."""
    return f"ranks/rank-{rank:05d}.pt"


def step_folder(step: int) -> str:
    """Name of the folder of a checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that looks like a checkpoint, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [(FOLDER_PATTERN.fullmatch(path.name), path) for path in checkpoints.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)
