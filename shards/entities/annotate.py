"""Gives every sample of a dataset its entities, in a new dataset whose other bytes are the same."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.atomic import atomic_write, remove_leftovers
from shards.build_state import STATE_FOLDER, ShardState
from shards.entities import extractor
from shards.entities.radgraph import read_radgraph
from shards.errors import DataError
from shards.format import (
    FORMAT_VERSION,
    INDEX_LIMIT,
    INDEX_MASK_EXTENSION,
    INDEX_NAME,
    MASKS_EXTENSION,
    METADATA_EXTENSION,
    REJECTED_NAME,
    TOKENIZER_NAME,
    Index,
    Shard,
    fingerprint,
    hash_file,
    index_file_name,
)
from shards.masks import encode_masks, read_masks
from shards.metadata import metadata_bytes
from shards.progress import tracked
from shards.reader import scan_shard
from shards.strict_json import JsonError, parse_json, read_limited
from shards.study import Entity
from shards.workers import run_tasks
from shards.writer import Sample, write_shard

_PLAN_NAME = "annotation.json"
#: Study id -> entities; None where the rules read the report.
_Known = Mapping[str, list[Entity]] | None


@dataclass(frozen=True)
class AnnotationSummary:
    """Counts at the end: samples, those with at least one entity, and those no RadGraph report belongs to."""

    samples: int
    annotated: int
    unmatched: int


@dataclass(frozen=True)
class _ShardTask:
    shard: Shard
    known: _Known
    index: Index


def annotate(
    dataset: Path,
    out: Path,
    radgraph: Path | None,
    overwrite: bool,
    workers: int,
) -> AnnotationSummary:
    """Write `dataset` to `out` with entities; killed and started again, it keeps the shards it has finished.

    The new dataset is of the format version that builds write.

    Args:
        dataset: folder of a finished dataset; it is not changed.
        out: folder of the new dataset.
        radgraph: output of a RadGraph model (`radgraph.read_radgraph`), whose ids are the samples' study ids;
            None: the rules of `extractor` read the reports.
        overwrite: replace entities that samples have already.
        workers: processes.

    Raises:
        DataError: no dataset, samples with entities and no `overwrite`, a RadGraph file that cannot be read
            or fits no sample, reports the rules cannot read, or an `out` that holds something else or cannot
            be written.
    """
    index = Index.load(dataset)
    if out.resolve() == dataset.resolve():
        raise DataError(f"--out must be another folder than {dataset}")
    if not overwrite and "entities" in index.arguments:
        raise DataError(f"{dataset} is annotated already; --overwrite replaces its entities")
    by: dict[str, Any] = {"by": "rules", "version": extractor.VERSION}
    if radgraph is not None:
        by = {"by": "radgraph", "hash": hash_file(radgraph) if radgraph.is_file() else None}
    arguments = {**index.arguments, "entities": {**by, "dataset": index.fingerprint}}
    if radgraph is None:
        extractor.check_language(index.arguments.get("source") or {})
    known = None if radgraph is None else read_radgraph(radgraph)
    _start(out, arguments)
    missing = [shard for shard in index.shards if not _is_finished(out, shard)]
    alone = dataclasses.replace(index, shards=[])  # a task needs what is said of all shards
    tasks = [_ShardTask(shard, _of_shard(dataset, shard, known, index), alone) for shard in missing]
    annotated = run_tasks(_annotate_shard, (dataset, out, overwrite), tasks, workers)
    for _ in tracked(annotated, "annotating shards", len(index.shards), len(index.shards) - len(missing)):
        pass
    shards = [_written(out, shard) for shard in index.shards]
    summary = _summary(out, shards, index.label_names, known)
    if known is not None and summary.unmatched == summary.samples:
        raise DataError(
            f"{radgraph}: none of its ids is the study id of a sample of {dataset} (were the ids hashed?)"
        )
    _finish(dataset, out, index, shards, arguments)
    return summary


def _start(out: Path, arguments: Mapping[str, Any]) -> None:
    """Record what `out` becomes, or check that it is the annotation going on or finished there."""
    plan = out / STATE_FOLDER / _PLAN_NAME
    planned = {"version": FORMAT_VERSION, "arguments": arguments}
    if (out / INDEX_NAME).exists():
        index = Index.load(out)
        existing: object = {"version": index.version, "arguments": index.arguments}
        known = {shard.file: shard for shard in index.shards}
    else:
        existing = _planned(plan)
        known = {}
        if existing is None and out.is_dir() and any(out.iterdir()):
            raise DataError(f"{out} is not empty; choose another --out")
    if existing is not None and existing != planned:
        raise DataError(f"{out} holds another dataset or annotation; choose another --out or delete it")
    try:
        (out / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {out}: {error.strerror}; choose another --out") from error
    atomic_write(plan, json.dumps(planned).encode())
    for file, shard in known.items():
        ShardState(file, shard, []).save(out)


def _planned(plan: Path) -> object:
    try:
        return parse_json(read_limited(plan, INDEX_LIMIT), INDEX_LIMIT)
    except FileNotFoundError:
        return None
    except (OSError, JsonError) as error:
        raise DataError(f"{plan} cannot be read ({error}); delete it and start again") from error


def _is_finished(out: Path, shard: Shard) -> bool:
    state = ShardState.load(out, shard.file)
    return state is not None and state.is_intact(out)


def _of_shard(dataset: Path, shard: Shard, known: _Known, index: Index) -> _Known:
    """The part of the known entities that a shard needs: a worker process gets no more."""
    if known is None:
        return None
    samples = scan_shard(dataset, shard, index.label_names, METADATA_EXTENSION, index.version)
    studies = (metadata["study_id"] for _, _, metadata in samples)
    return {study: known[study] for study in studies if study in known}


def _annotate_shard(shared: tuple[Path, Path, bool], task: _ShardTask) -> None:
    """Write one shard with entities and record it as finished (runs in a worker process)."""
    dataset, out, overwrite = shared
    file = task.shard.file
    if hash_file(dataset / file) != task.shard.hash:
        raise DataError(f"{dataset / file}: content differs from its hash; run medvlp shards verify")

    def annotated() -> Iterator[Sample]:
        names, version = task.index.label_names, task.index.version
        for key, members, metadata in scan_shard(dataset, task.shard, names, version=version):
            if metadata["entities"] and not overwrite:
                raise DataError(
                    f"{file}: sample {key} has entities already; --overwrite replaces those of all samples"
                )
            if task.known is None:
                entities = extractor.extract(metadata["sections"])
            else:
                entities = task.known.get(metadata["study_id"], [])
            rows = [[entity.anatomy, entity.observation, entity.value] for entity in entities]
            if INDEX_MASK_EXTENSION in members:  # of format version 1
                masks = read_masks(members, [], names, task.index.image_size)
                del members[INDEX_MASK_EXTENSION]
                metadata["masks"] = list(masks)
                if masks:
                    members[MASKS_EXTENSION] = encode_masks(list(masks.values()))
            content = metadata_bytes({**metadata, "entities": rows})
            yield Sample(key, {**members, METADATA_EXTENSION: content})

    samples = write_shard(out, file, annotated())
    tar = out / file
    shard = dataclasses.replace(
        task.shard,
        samples=samples,
        bytes=tar.stat().st_size,
        hash=hash_file(tar),
        index_hash=hash_file(out / index_file_name(file)),
    )
    ShardState(file, shard, []).save(out)


def _written(out: Path, shard: Shard) -> Shard:
    """A shard as it was written with its entities."""
    state = ShardState.load(out, shard.file)
    if state is None or state.shard is None:
        raise DataError(
            f"{out / STATE_FOLDER} has lost what it knew of {shard.file}; run the same command again"
        )
    return state.shard


def _summary(out: Path, shards: list[Shard], label_names: list[str], known: _Known) -> AnnotationSummary:
    samples = annotated = unmatched = 0
    patients: dict[str, str] = {}
    for shard in shards:
        for _, _, metadata in scan_shard(out, shard, label_names, METADATA_EXTENSION):
            samples += 1
            annotated += bool(metadata["entities"])
            study, patient = metadata["study_id"], metadata["patient_id"]
            unmatched += known is not None and study not in known
            if known is not None and study in known and patients.setdefault(study, patient) != patient:
                raise DataError(
                    "studies of several patients have one study id, by which the reports of RadGraph are "
                    "found: build the dataset with ids of studies that no two patients share"
                )
    return AnnotationSummary(samples, annotated, unmatched)


def _finish(dataset: Path, out: Path, index: Index, shards: list[Shard], arguments: dict[str, Any]) -> None:
    """Write what stands beside the shards and, last, the index."""
    for name in (TOKENIZER_NAME, REJECTED_NAME, INDEX_NAME):
        remove_leftovers(out, name)
    for name in (TOKENIZER_NAME, REJECTED_NAME):
        if (dataset / name).is_file():
            atomic_write(out / name, (dataset / name).read_bytes())
    splits = {
        split: dataclasses.replace(totals, bytes=sum(s.bytes for s in shards if s.split == split))
        for split, totals in index.splits.items()
    }
    new = dataclasses.replace(
        index,
        splits=splits,
        shards=shards,
        fingerprint=fingerprint(shards),
        arguments=arguments,
        version=FORMAT_VERSION,
    )
    atomic_write(out / INDEX_NAME, new.to_json())
    shutil.rmtree(out / STATE_FOLDER)
