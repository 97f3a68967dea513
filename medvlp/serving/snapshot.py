"""`RUN/prototypes/`: clusters and the embeddings of samples in one file that is whole or not there."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.table import PrototypeTable
from medvlp.serving.layout import REPORT, SNAPSHOT, DamagedFileError, PrototypeFilesError
from shards.atomic import atomic_write, remove_leftovers
from shards.strict_json import parse_json

#: Version of the file's layout.
FORMAT = 1
#: Largest description in the header, in bytes.
_LIMIT = 1 << 22
#: Stored values of a label.
PRESENT, ABSENT, UNCERTAIN, UNKNOWN = 1, 0, -1, -2

#: Where the clusters come from: the run's prototype service, the method's weights, or k-means made for this.
Source = Literal["service", "learned", "kmeans"]
#: Tensors every file holds beside those of the table.
_ARRAYS = {"image": torch.float16, "sample": torch.int64, "labels": torch.int8, "keys": torch.uint8}


@dataclass(frozen=True)
class Origin:
    """What a snapshot was made of.

    Attributes:
        source: where the clusters come from.
        run: name of the run. checkpoint: folder name. step: finished optimiser steps.
        data: fingerprint of the dataset. split: which split. label_names: its findings.
        stored_size: side of the dataset's square images in pixels.
        weights: checksum of the checkpoint's weights; "" in files of versions that stored none.
        limit: most samples that were asked for, 0: all; None in files of versions that did not store it.
        candidates: samples that could be asked for; None in files of versions that did not store it.
    """

    source: Source
    run: str
    checkpoint: str
    step: int
    data: str
    split: str
    label_names: list[str]
    stored_size: int
    weights: str = ""
    limit: int | None = None
    candidates: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """Clusters and S samples, on the CPU.

    Attributes:
        table: the clusters.
        image: [S, D] float16 unit-norm embeddings of the images.
        report: [S, D] float16 of the reports; None where the method embeds none.
        sample: [S] int64 positions in the split.
        labels: [S, C] int8: `PRESENT`, `ABSENT`, `UNCERTAIN` or `UNKNOWN`.
        keys: [S, L] uint8, the samples' keys as UTF-8, zeros at the end.
        origin: what they were made of.
    """

    table: PrototypeTable
    image: Tensor
    report: Tensor | None
    sample: Tensor
    labels: Tensor
    keys: Tensor
    origin: Origin

    def __post_init__(self) -> None:
        samples, width = len(self.sample), self.table.centroids.shape[1]
        labels = (samples, len(self.origin.label_names))
        if self.image.shape != (samples, width) or self.labels.shape != labels or len(self.keys) != samples:
            raise ValueError("embeddings, labels and keys of a snapshot are not of the same samples")
        if self.report is not None and self.report.shape != (samples, width):
            raise ValueError("reports of a snapshot have another shape than its images")

    def embeddings(self) -> dict[str, Tensor]:
        """Modality ("image", "report") -> [S, D] float16."""
        return {"image": self.image} | ({} if self.report is None else {"report": self.report})

    def key_of(self, row: int) -> str:
        """Key of the sample in a row."""
        return bytes(self.keys[row].numpy()).rstrip(b"\0").decode()

    def to_bytes(self) -> bytes:
        """The file, which says of itself what it holds and has a checksum of it."""
        tensors, values = {}, {}
        for name, value in self.table.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"table.{name}"] = value.cpu().contiguous()
            else:
                values[name] = value
        tensors |= {name: getattr(self, name) for name in _ARRAYS}
        if self.report is not None:
            tensors["report"] = self.report
        description = {
            "format": FORMAT,
            "table": values,
            "fingerprint": self.table.fingerprint,
            "origin": asdict(self.origin),
            "checksum": _checksum(tensors),
        }
        return safetensors.torch.save(tensors, {"description": json.dumps(description)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Map and check a file.

        Raises:
            DamagedFileError: damaged, or of another format; says what to do.
            PrototypeFilesError: missing, or it cannot be read now.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                description = parse_json((file.metadata() or {})["description"], _LIMIT)
                # Names are views of the mapped file: a large bank is not copied.
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise PrototypeFilesError(
                f"{path} does not exist; make it with: medvlp prototypes build RUN"
            ) from None
        except OSError as error:
            raise PrototypeFilesError(f"{path} cannot be read now ({error.strerror or error})") from error
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise _damaged(path, error) from error
        try:
            return cls._from_parts(description, tensors)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise _damaged(path, error) from error

    @classmethod
    def _from_parts(cls, description: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']}, this program reads {FORMAT}")
        if description["checksum"] != _checksum(tensors):
            raise ValueError("its checksum differs")
        for name, dtype in _ARRAYS.items():
            if tensors[name].dtype != dtype:
                raise ValueError(f"{name} is {tensors[name].dtype}")
        table = PrototypeTable.from_state_dict(
            {name[6:]: value for name, value in tensors.items() if name.startswith("table.")}
            | description["table"]
        )
        if table.fingerprint != description["fingerprint"]:
            raise ValueError(f"its table has the fingerprint {table.fingerprint}, not the one it names")
        arrays = {name: tensors[name] for name in _ARRAYS}
        known = {field.name for field in fields(Origin)}
        origin = Origin(**{name: value for name, value in description["origin"].items() if name in known})
        numbers = (origin.step, origin.stored_size, origin.limit or 0, origin.candidates or 0)
        if not all(type(number) is int for number in numbers):
            raise ValueError("a number of its origin is none")
        return cls(table, report=tensors.get("report"), origin=origin, **arrays)


def write(snapshot: Snapshot, report: dict[str, Any], folder: Path) -> None:
    """Write `prototypes.safetensors` and `report.json`, each of which appears whole.

    The report names the fingerprint of its table, so a reader can tell whether the two belong together.

    Raises:
        PrototypeFilesError: the folder cannot be made.
        DataError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrototypeFilesError(
            f"{folder} cannot be made ({error.strerror}); give another --out"
        ) from error
    for name in (SNAPSHOT, REPORT):
        remove_leftovers(folder, name)
    atomic_write(folder / SNAPSHOT, snapshot.to_bytes())
    atomic_write(folder / REPORT, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def pack_keys(keys: list[str]) -> Tensor:
    """S strings -> [S, L] uint8, UTF-8 with zeros at the end."""
    array = np.array([key.encode() for key in keys], dtype=np.bytes_)
    return torch.from_numpy(array.view(np.uint8).reshape(len(keys), array.itemsize).copy())


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, reason: Exception) -> DamagedFileError:
    return DamagedFileError(f"{path} cannot be used ({reason}); make it anew: medvlp prototypes build RUN")


def export_index(snapshot: Snapshot, path: Path, samples: str | None = None) -> int:
    """Write an index of unit-norm float32 rows with inner product, that is, cosine.

    Args:
        snapshot: what to export.
        path: the file; replaced whole.
        samples: "image" or "report": the embeddings of the samples, each with its position in the split as
            its id; None: the centroids, with cluster numbers as ids.

    Returns:
        Number of rows.

    Raises:
        PrototypeFilesError: the snapshot holds no such embeddings.
        DataError: the file cannot be written.
    """
    import faiss

    width = snapshot.table.centroids.shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if samples is None:
        index.add(snapshot.table.centroids.float().cpu().numpy())
    else:
        rows = snapshot.embeddings().get(samples)
        if rows is None:
            known = " and ".join(snapshot.embeddings())
            raise PrototypeFilesError(f"no {samples} embeddings are stored for this run, only {known}")
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(unit_norm(rows.float()).numpy(), snapshot.sample.numpy().astype(np.int64))
    atomic_write(path, faiss.serialize_index(index).tobytes())
    return int(index.ntotal)
