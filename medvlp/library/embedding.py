"""Embeddings of a whole dataset: every rank takes its share, rank 0 joins the parts to one Parquet file."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.cache import open_reader
from medvlp.data.faults import FaultCounter
from medvlp.data.loader import EvaluationLoader, evaluation_dataset
from medvlp.data.text import Tokenizer
from medvlp.evaluation.features import ModelArrays, Wanted, embed
from medvlp.methods.base import Method
from medvlp.ranks import detect
from medvlp.runs import saved_run
from shards.atomic import fsync_path
from shards.errors import DataError, UsageError
from shards.progress import meter
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

#: Samples that are embedded, and written, together.
BLOCK = 4096


@dataclass(frozen=True)
class Request:
    """What is embedded: `run` on the split (None: all splits) of `data`, into `out`."""

    run: Path
    data: str
    out: Path
    split: str | None = None
    features: bool = False
    batch: int = 64


def embed_dataset(request: Request) -> None:
    """Embed this rank's share; all ranks call this together. Rank 0 writes the file, at once or not at all.

    A sample that cannot be read is left out and counted in the file's metadata (`medvlp.corrupt`). Whether
    they are too many (`data.max_bad_fraction`) is judged of all samples, not of a block. That the dataset is
    another than the run's is meant, and told in a warning.

    Raises:
        MedvlpError: run or data cannot be read, nothing would be written, too many samples are corrupt, or
            the file cannot be written.
    """
    device, parts = distributed.initialize(detect()), None
    try:
        source = saved_run.locate(request.run)
        config = saved_run.load_config(source, [], request.data)
        saved_run.check_place(source, config, request.data is not None)
        tokenizer = saved_run.load_tokenizer(source, config)
        method = saved_run.load_method(source, config, tokenizer).to(device)
        reader = open_reader(config.data)
        say = logger.warning if distributed.is_main() else _unsaid
        saved_run.check_data(source, config, reader.index, said=True, say=say)
        # A folder of this command's own: another one with the same `out` must not add to its parts.
        made = _parts_folder(request.out) if distributed.is_main() else None
        parts = Path(distributed.broadcast_object(made))
        count = _write_part(request, config, tokenizer, method, reader, parts, device)
        counts = distributed.gather_objects(count)
        if distributed.is_main():
            facts = {
                "medvlp.run": str(source.run), "medvlp.checkpoint": source.checkpoint.name,
                "medvlp.weights": source.weights, "medvlp.data": reader.index.fingerprint,
                "medvlp.corrupt": str(sum(corrupt for _, corrupt in counts)),
            }  # fmt: skip
            _join(parts, request.out, facts, sum(samples for samples, _ in counts))
        distributed.barrier()
    finally:
        if distributed.is_main() and parts is not None:
            shutil.rmtree(parts, ignore_errors=True)
        distributed.shutdown()


def _parts_folder(out: Path) -> str:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=f".{out.name}.parts-", dir=out.parent)
    except OSError as error:
        raise DataError(f"{out.parent} cannot be written: {error.strerror or error}") from error


def _write_part(
    request: Request,
    config: Config,
    tokenizer: Tokenizer,
    method: Method,
    reader: ShardReader,
    parts: Path,
    device: torch.device,
) -> tuple[int, int]:
    """Write this rank's blocks; returns (samples, corrupt samples) of them."""
    wanted = Wanted(
        image=method.embeds_images,
        text=method.embeds_reports,
        features=request.features and method.has_image_features,
    )
    if not (wanted.image or wanted.text or wanted.features):
        instead = "give --features" if method.has_image_features else "nothing can be written"
        raise UsageError(
            f"{request.run} embeds neither images nor reports (a backbone alone, or no loss shaped "
            f"embeddings): {instead}"
        )
    blocks, samples, corrupt = _own_blocks(request, reader), 0, 0
    own = sum(len(positions) for _, _, positions in blocks)
    whole = sum(reader.sample_count(split) for split in _splits(request, reader))
    faults = FaultCounter(config.data.max_bad_fraction, whole, distributed.world_size())
    # The ranks have equal shares: one bar tells of all.
    shown = meter("embedding, this rank's share", own) if distributed.is_main() else nullcontext(_unseen)
    with shown as advance:
        for number, split, positions in blocks:
            dataset = evaluation_dataset(config, reader, tokenizer, split)
            chunks = [list(positions[start : start + request.batch])
                      for start in range(0, len(positions), request.batch)]  # fmt: skip
            loader = EvaluationLoader(dataset, chunks, config.data, faults=faults)
            batches = _counted(loader, advance)
            first = next(batches, None)
            if first is None:  # all of a small last block
                corrupt += len(positions)
                continue
            arrays = embed({"trained": method}, chain([first], batches), wanted, device)
            has_report = dataset.store.has_text()[arrays.sample]
            made = arrays.models["trained"]
            table = _table(reader, split, arrays.sample, has_report, made, request.features)
            pq.write_table(table, parts / f"{number:08d}.parquet")
            samples, corrupt = samples + len(table), corrupt + len(positions) - len(table)
    return samples, corrupt


def _own_blocks(request: Request, reader: ShardReader) -> list[tuple[int, str, range]]:
    """(number, split, positions) of this rank's blocks."""
    blocks = []
    for split in _splits(request, reader):
        total = reader.sample_count(split)
        blocks += [(split, range(start, min(start + BLOCK, total))) for start in range(0, total, BLOCK)]
    ranks, rank = distributed.world_size(), distributed.rank()
    return [(number, *block) for number, block in enumerate(blocks, start=1) if number % ranks == rank]


def _splits(request: Request, reader: ShardReader) -> list[str]:
    return [request.split] if request.split else list(reader.index.splits)


def _counted(loader: Iterable[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in loader:
        yield batch
        advance(len(batch.sample))


def _unseen(count: int) -> None:
    """Another rank's bar tells how far the work is."""


def _unsaid(line: str) -> None:
    """Rank 0 says it."""


def _table(
    reader: ShardReader,
    split: str,
    positions: Any,
    has_report: NDArray[np.bool_],
    arrays: ModelArrays,
    features: bool,
) -> pa.Table:
    metadata = [reader.metadata(split, int(place)) for place in positions]
    every = np.ones(len(metadata), dtype=bool)
    columns: dict[str, Any] = {
        "split": pa.array([split] * len(metadata)),
        "key": pa.array([reader.key(split, int(place)) for place in positions]),
        "position": pa.array(positions, pa.int64()),
        "patient_id": pa.array([sample["patient_id"] for sample in metadata]),
        "study_id": pa.array([sample["study_id"] for sample in metadata]),
        "image": _vectors(arrays.image, every),
        # Of no words at all a network makes an embedding, too.
        "report": _vectors(arrays.text, has_report),
    }
    if features:
        columns["features"] = _vectors(arrays.features, every)
    return pa.table(columns)


def _vectors(values: NDArray[Any] | None, present: NDArray[np.bool_]) -> pa.Array:
    """[N, D] as lists of float32; nulls in rows that are not present, and where there are no values."""
    if values is None:
        return pa.nulls(len(present), pa.list_(pa.float32()))
    offsets = np.concatenate([[0], np.cumsum(present * values.shape[1])]).astype(np.int32)
    flat = pa.array(values[present].astype(np.float32).reshape(-1))
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(~present))


def _join(parts: Path, out: Path, facts: dict[str, str], samples: int) -> None:
    """Put the parts together in order under the final name; `samples`: what the ranks say they wrote."""
    files = sorted(parts.glob("*.parquet"))
    if not files:
        raise DataError(f"{out}: the split holds no readable sample")
    temporary = parts / "whole"
    try:
        schema = pq.read_schema(files[0]).with_metadata(
            {name.encode(): text.encode() for name, text in facts.items()}
        )
        with pq.ParquetWriter(temporary, schema) as writer:
            for file in files:
                writer.write_table(pq.read_table(file).replace_schema_metadata(schema.metadata))
        if (found := pq.read_metadata(temporary).num_rows) != samples:
            raise DataError(
                f"{parts} holds {found} samples of {samples}: something else changed it; try again"
            )
        fsync_path(temporary)
        temporary.replace(out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}; run the command again"
        ) from error
