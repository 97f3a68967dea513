"""From a run to `RUN/prototypes/`: embed samples of the shards, choose the clusters, describe them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_loader
from medvlp.data.sample_store import SampleStore
from medvlp.device import device_named
from medvlp.losses.normalise import unit_norm
from medvlp.prototypes.kmeans import spherical_kmeans
from medvlp.prototypes.learned import LearnedPrototypes
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs import saved_run
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import rank_file
from medvlp.runs.run_lock import RunLock, this_process
from medvlp.runs.saved_run import SavedRun
from medvlp.serving import snapshot as snapshots
from medvlp.serving.cluster_report import Members, report_of
from medvlp.serving.layout import PrototypeFilesError, folder_of
from medvlp.serving.run_model import RunModel
from medvlp.serving.snapshot import UNKNOWN, Origin, Snapshot, Source
from shards.progress import tracked

#: Samples embedded where nobody says how many: enough for 500 clusters, minutes on a CPU.
DEFAULT_LIMIT = 20_000
BATCH = 64


@dataclass(frozen=True)
class SnapshotOptions:
    """What the user asks for.

    Attributes:
        source: run folder or checkpoint folder.
        data: dataset folder or URL; None: the run's own.
        split: which split; None: the one the run trains on.
        limit: samples to embed, spread evenly over the split; 0: all of it; None: `DEFAULT_LIMIT`.
        clusters: cluster anew into so many; None: the run's own clusters where it has some.
        out: folder to write to; None: `RUN/prototypes`.
        device: "auto", "cpu" or "cuda".
        workers: data-loading processes; None: `data.workers` of the run.
    """

    source: Path
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    clusters: int | None = None
    out: Path | None = None
    device: str = "auto"
    workers: int | None = None


def build(options: SnapshotOptions, say: Callable[[str], None]) -> Path:
    """Make `prototypes.safetensors` and `report.json`; report text is read, and never written.

    Args:
        options: what to build of what.
        say: receives one line of progress at a time.

    Returns:
        The folder they are in.

    Raises:
        MedvlpError: run, checkpoint, data or folder cannot be used, another build writes the folder, or there
            are too few samples.
    """
    device = device_named(options.device)
    source = saved_run.locate(options.source)
    folder = options.out or folder_of(source.run)
    with sole_builder(folder, "--out"):
        say(f"loading {source.checkpoint.name}")
        model = RunModel(source, device, options.data)
        store(make_snapshot(model, options, say), folder)
    return folder


@contextmanager
def sole_builder(folder: Path, key: str) -> Iterator[None]:
    """Make a folder and hold its lock.

    The two files of two builds could else be mixed, and each deletes what the other is writing.

    Args:
        folder: for `store`.
        key: the option or argument that names it, for messages.

    Raises:
        PrototypeFilesError: it cannot be written.
        RunFolderError: another build holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder, this_process(None), key=key)
        lock.acquire()
    except OSError as error:
        raise PrototypeFilesError(
            f"{folder} cannot be written ({error.strerror}); give another {key}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def store(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot with its report, as `sole_builder`; errors as `medvlp.serving.snapshot.write`."""
    snapshots.write(snapshot, report_of(Members.of(snapshot)), folder)


def make_snapshot(model: RunModel, options: SnapshotOptions, say: Callable[[str], None]) -> Snapshot:
    """Embed the samples and choose the clusters; errors as `build`."""
    config = model.config
    if options.workers is not None:
        config.data.workers = options.workers
    reader = open_reader(config.data)
    saved_run.check_data(model.source, config, reader.index, options.data is not None, say)
    split = options.split or config.data.split
    store = SampleStore.open_or_build(reader, split, config.data, model.tokenizer)
    # The rules of training speak of the views and reports it had, not of another dataset's.
    mask = store.trainable() if options.data is None else store.has_text()
    limit = DEFAULT_LIMIT if options.limit is None else options.limit
    candidates = np.flatnonzero(mask)
    chosen = _spread(candidates, limit)
    say(f"embedding {len(chosen)} of {len(store)} samples of {split} on {model.device.type}")
    loader = evaluation_loader(config, reader, model.tokenizer, split, BATCH, chosen.tolist())
    embeddings: dict[str, list[Tensor]] = {}
    samples, labels, keys = [], [], []
    with torch.no_grad():
        for batch in tracked(loader, f"embedding {split}", len(chosen), size=lambda batch: len(batch.sample)):
            for name, value in _embed(model, batch).items():
                embeddings.setdefault(name, []).append(value)
            # Copies: the tensors of a batch are views of one block, which would live on with its images.
            samples.append(batch.sample.clone())
            labels.append(batch.labels.clone())
            keys += batch.keys
    if not samples:
        raise PrototypeFilesError(f"{config.data.root}: split {split} holds no readable sample with a report")
    joined = {name: torch.cat(parts) for name, parts in embeddings.items()}
    table, kind = choose_table(model, joined, options.clusters, say)
    return Snapshot(
        table=table,
        image=joined["image"],
        report=joined.get("report"),
        sample=torch.cat(samples),
        labels=torch.cat(labels).nan_to_num(UNKNOWN).to(torch.int8),
        keys=snapshots.pack_keys(keys),
        origin=Origin(
            source=kind,
            run=model.source.name(config),
            checkpoint=model.source.checkpoint.name,
            step=model.source.step,
            data=reader.index.fingerprint,
            split=split,
            label_names=list(reader.index.label_names),
            stored_size=reader.index.image_size,
            weights=model.source.weights,
            limit=limit,
            candidates=len(candidates),
        ),
    )


def _embed(model: RunModel, batch: Batch) -> dict[str, Tensor]:
    """Modality -> [B, D] float16 on the CPU.

    Raises:
        PrototypeFilesError: values that are not finite.
    """
    moved = batch.to(model.device)
    found = {"image": model.method.encode_image(moved.image)}
    if model.method.embeds_reports:
        found["report"] = model.method.encode_text(moved.text)
    stored = {name: value.cpu().to(torch.float16) for name, value in found.items()}
    for name, value in stored.items():
        if not value.isfinite().all():
            raise PrototypeFilesError(
                f"{model.source.checkpoint}: embeddings ({name}) are NaN or infinite: if training has "
                "diverged, build from an earlier checkpoint"
            )
    return stored


def _spread(positions: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """At most `limit` (0: all) of the positions, evenly spread."""
    if limit == 0 or limit >= len(positions):
        return positions
    return positions[np.linspace(0, len(positions) - 1, limit).round().astype(np.int64)]


#: Embeddings for each cluster that FAISS advises at least; decides K where nobody says it.
POINTS_PER_CLUSTER = 39


def choose_table(
    model: RunModel, embeddings: Mapping[str, Tensor], clusters: int | None, say: Callable[[str], None]
) -> tuple[PrototypeTable, Source]:
    """The clusters to store for a run.

    Args:
        model: the run's method.
        embeddings: modality -> [S, D] unit-norm rows; clustered where the run has no clusters of its own.
        clusters: cluster these rows anew into so many, whatever the run has; None: take the run's own where
            it has some.
        say: receives one line of progress at a time.

    Raises:
        TooFewRowsError: fewer rows than clusters.
        PrototypeFilesError: fewer than two rows for each of two clusters.
    """
    width = next(iter(embeddings.values())).shape[1]
    if clusters is None and not _clusters_elsewhere(model.config):
        table = stored_table(model.source)
        if table is not None and table.centroids.shape[1] == width:
            say(f"clusters: version {table.version} of the run's prototype service")
            return table, "service"
    if clusters is None and not _embeds_elsewhere(model.config):
        for module in model.method.modules():
            if isinstance(module, LearnedPrototypes) and module.weight.shape[1] == width:
                say(f"clusters: the {len(module.weight)} prototypes the method has learned")
                return PrototypeTable.start(module.weight.detach().cpu(), model.source.step), "learned"
    rows = unit_norm(torch.cat([part.float() for part in embeddings.values()]))
    if clusters is None:
        clusters = min(model.config.prototypes.clusters, len(rows) // POINTS_PER_CLUSTER)
        if clusters < 2:
            raise PrototypeFilesError(
                f"{len(rows)} embeddings are too few to choose a number of clusters for them "
                f"({POINTS_PER_CLUSTER} each): give --clusters, or more samples with --limit"
            )
    config = model.config
    say(f"clusters: k-means of {len(rows)} embeddings into {clusters}")
    found = spherical_kmeans(rows, clusters, config.prototypes, config.train.seed)
    temperature = config.prototypes.temperature
    table = PrototypeTable.start(found.centroids, model.source.step, temperature, balance="none")
    return dataclasses.replace(table, counts=found.counts), "kmeans"


def stored_table(source: SavedRun) -> PrototypeTable | None:
    """The table of the prototype service in a checkpoint; None where the run had none yet.

    Raises:
        PrototypeFilesError: the checkpoint's state cannot be read.
    """
    path = source.checkpoint.folder / rank_file(0)
    if rank_file(0) not in source.manifest.files:
        return None
    try:
        callbacks = source.checkpoint.state_for(0)["callbacks"]  # the table is the same in all ranks' state
        state = callbacks.get("prototypes", {}).get("table")
        return None if state is None else PrototypeTable.from_state_dict(state)
    except (CheckpointError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrototypeFilesError(
            f"{path}: the state of the prototype service cannot be read ({error}); "
            "build from another checkpoint, or cluster anew with --clusters"
        ) from error


def _embeds_elsewhere(config: Config) -> bool:
    """Whether `encode_image` embeds into another space than the one of MGCA's prototypes.

    They are those of a combination's MGCA part, and another part may embed.
    """
    return getattr(config.method, "embeds_with", "mgca") != "mgca"


def _clusters_elsewhere(config: Config) -> bool:
    """Whether the service clusters another space than the one `encode_image` embeds into."""
    clustered = getattr(config.method, "clustered", None)
    return clustered is not None and clustered.name != getattr(config.method, "embeds_with", None)
