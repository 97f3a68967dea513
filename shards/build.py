"""Builds the shards of a dataset over processes, keeping those an earlier run has finished.

A build can be killed at any moment and started again, or divided into parts that share one folder: finished
shards are recognised by their record in `.build/`, checked against its hashes, and kept.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shards.build_state import BuildPlan, Rejection, ShardState, restore_states
from shards.entities import extractor
from shards.errors import DataError
from shards.format import FORMAT_VERSION, Shard, hash_file, index_file_name, name_problem, sample_key
from shards.identifiers import hash_identifiers, key_fingerprint
from shards.plan import Part, PlannedShard, plan_shards
from shards.progress import tracked
from shards.sample import StoredImage, to_sample
from shards.sources.base import Json, RejectedRecord, Source
from shards.splits import DEFAULT_FRACTIONS, parse_fractions
from shards.study import Study
from shards.tokenizer import MIN_PATIENTS, load_tokenizer
from shards.workers import run_tasks
from shards.writer import Sample, write_shard


@dataclass(frozen=True)
class BuildOptions:
    """How a source becomes a dataset; the same source and options always give the same bytes.

    Attributes:
        name: name of the dataset; default: that of the source.
        image: how images are stored.
        records_per_shard: records of the source that share a tar.
        fractions: share of patients in each split, where the source prescribes none.
        split_seed: key of the hash that decides the split, up to 64 bytes.
        hash_key: secret key with which patient and study ids are hashed; None keeps them.
        tokenizer: folder or hub name; None trains one of at most `vocab_size` pieces.
        min_patients: patients whose reports must hold a word before it takes part in that training; None:
            `tokenizer.MIN_PATIENTS`, and 1 for generated reports, which are nobody's.
        entities: "rules" reads them from the report (`shards.entities.extractor`); None keeps the source's.
    """

    name: str | None = None
    image: StoredImage = field(default_factory=StoredImage)
    records_per_shard: int = 512
    fractions: dict[str, float] = field(default_factory=lambda: parse_fractions(DEFAULT_FRACTIONS))
    split_seed: str = "medvlp"
    hash_key: bytes | None = None
    tokenizer: str | None = None
    vocab_size: int = 30522
    min_patients: int | None = None
    entities: Literal["rules"] | None = None

    def patients_of_a_word(self, source: Source) -> int:
        """`min_patients`, or the source's default."""
        if self.min_patients is not None:
            return self.min_patients
        return 1 if source.generated else MIN_PATIENTS

    def arguments(self, source: Source) -> dict[str, Json]:
        """Everything the bytes of the dataset depend on, as the index records it; no path, no secret."""
        arguments = {
            "source": {"name": source.name, **source.arguments},
            "image": {"size": self.image.size, "format": self.image.format, "quality": self.image.quality},
            "records_per_shard": self.records_per_shard,
            "split": self.fractions,
            "split_seed": self.split_seed,
            "hash_key": key_fingerprint(self.hash_key) if self.hash_key else None,
            "tokenizer": Path(self.tokenizer).name if self.tokenizer else None,
            "vocab_size": self.vocab_size,
            "min_patients": self.patients_of_a_word(source),
        }
        if self.entities is not None:
            arguments["entities"] = {"by": self.entities, "version": extractor.VERSION}
        # Through JSON, so that it compares equal to what is read back from a file.
        recorded: dict[str, Json] = json.loads(json.dumps(arguments))
        return recorded


def build_shards(
    source: Source,
    out: Path,
    options: BuildOptions,
    workers: int,
    part: Part,
) -> None:
    """Build the shards of `part` that are not finished yet; `shards.merge.merge` completes the dataset.

    Raises:
        DataError: `out` cannot be written or holds another dataset, there is no such tokenizer, a name cannot
            be stored, or the rules cannot read the reports' language.
    """
    if options.entities == "rules":
        extractor.check_language(source.arguments)
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # a wrong name must fail now, not after hours of building
    _check_names(options.name or source.name, source.label_names)
    plan = plan_shards(source, options.fractions, options.split_seed, options.records_per_shard)
    BuildPlan(
        name=options.name or source.name,
        source=source.name,
        label_names=source.label_names,
        image_size=options.image.size,
        records=len(source),
        files=[planned.file for planned in plan],
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        min_patients=options.patients_of_a_word(source),
        arguments=options.arguments(source),
        remarks=source.remarks(),
        published_counts=source.published_counts(),
        version=FORMAT_VERSION,
    ).save(out)
    restore_states(out, plan)
    mine = part.of(plan)
    missing = [planned for planned in mine if not _is_finished(out, planned)]
    built = run_tasks(_build_shard, (source, out, options), missing, workers)
    for _ in tracked(built, "building shards", len(mine), len(mine) - len(missing)):
        pass


def _check_names(name: str, labels: list[str]) -> None:
    """Refuse names with which the finished dataset could not be read."""
    named = [("the name of the dataset", name)]
    named += [(f"label {number} of {len(labels)}", label) for number, label in enumerate(labels, start=1)]
    for what, text in named:
        if problem := name_problem(text):
            raise DataError(f"{what} {problem}: mend it where the source has it, and build again")


def _is_finished(out: Path, planned: PlannedShard) -> bool:
    """Whether nothing is left to do for a shard; one with rejected records is looked at again."""
    state = ShardState.load(out, planned.file)
    return state is not None and not state.rejected and state.is_intact(out)


def _build_shard(shared: tuple[Source, Path, BuildOptions], planned: PlannedShard) -> None:
    """Build one shard and record it as finished (runs in a worker process).

    A finished one is kept where its rejected records are rejected again: files that were away may be back.
    """
    source, out, options = shared
    state = ShardState.load(out, planned.file)
    if state is not None and state.is_intact(out) and not _has_usable(source, planned, options, state):
        return
    rejected: list[Rejection] = []
    notes: Counter[str] = Counter()
    source.take_notes()  # those of a shard that was not finished
    samples = write_shard(out, planned.file, _samples(source, planned, options, rejected, notes))
    shard = None
    if samples:
        tar = out / planned.file
        shard = Shard(
            file=planned.file,
            split=planned.split,
            samples=samples,
            bytes=tar.stat().st_size,
            hash=hash_file(tar),
            index_hash=hash_file(out / index_file_name(planned.file)),
        )
    notes.update(source.take_notes())
    ShardState(planned.file, shard, rejected, dict(notes)).save(out)


def _has_usable(source: Source, planned: PlannedShard, options: BuildOptions, state: ShardState) -> bool:
    """Whether a record that was rejected gives samples now.

    Another reason is none to build anew: where all files are away, that would lose the samples there are.
    """
    lacking = replace(planned, records=[rejection.record for rejection in state.rejected])
    return any(True for _ in _samples(source, lacking, options, [], Counter()))


def _samples(
    source: Source,
    planned: PlannedShard,
    options: BuildOptions,
    rejected: list[Rejection],
    notes: Counter[str],
) -> Iterator[Sample]:
    """The samples of a shard in record order; what cannot be used is added to `rejected`."""
    for record in planned.records:
        try:
            samples = [
                _sample(study, sample_key(record, image), planned.split, source, options, notes)
                for image, study in enumerate(source.load(record))
            ]
        except RejectedRecord as rejection:
            rejected.append(Rejection(record, rejection.reason, rejection.line))
            continue
        except OSError as error:  # told apart from errors of writing the shard
            reason = error.strerror or type(error).__name__  # its text may hold a path that names a patient
            raise DataError(f"cannot read record {record} of source {source.name!r}: {reason}") from error
        except Exception as error:
            error.add_note(f"at record {record} of source {source.name!r}, for {planned.file}")
            raise
        yield from samples


def _sample(
    study: Study, key: str, split: str, source: Source, options: BuildOptions, notes: Counter[str]
) -> Sample:
    if study.split not in (None, split):
        raise ValueError(f"the source loads a sample of split {study.split!r} that it planned for {split!r}")
    if not study.masks.keys() | study.labels.keys() <= set(source.label_names):
        raise ValueError("the source loads a label or mask of a finding that is not among its label names")
    if options.entities == "rules":
        study = replace(study, entities=extractor.extract(study.sections))
    if options.hash_key is not None:
        for name in sorted(study.extra.keys() & set(source.identifying)):
            notes[f"values of extra.{name} were left out, since they tell whose it is (--hash-ids)"] += 1
        study = hash_identifiers(study, options.hash_key, source.identifying)
    return to_sample(study, key, options.image, notes)
