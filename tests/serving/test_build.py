"""`medvlp prototypes build`: what is stored is what the method says of the shards, and nothing else."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from medvlp.data.batch import Batch
from medvlp.data.packing import Slots
from medvlp.data.report import report_sentences
from medvlp.data.sample_store import SampleStore
from medvlp.prototypes.kmeans import TooFewRowsError
from medvlp.prototypes.table import PrototypeTable
from medvlp.runs.errors import CheckpointError, RunFolderError
from medvlp.runs.run_lock import LOCK, RunLock, this_process
from medvlp.runs.saved_run import locate
from medvlp.serving import build as builder
from medvlp.serving import snapshot as snapshots
from medvlp.serving.build import SnapshotOptions, build, stored_table
from medvlp.serving.cluster_report import Members, overall, report_of
from medvlp.serving.layout import REPORT, SNAPSHOT, PrototypeFilesError, folder_of
from medvlp.serving.run_model import RunModel
from medvlp.serving.snapshot import Origin, Snapshot
from shards.errors import UsageError
from shards.reader import ShardReader
from tests.serving.runs import save_run
from tests.training.runs import TINY, train

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory, gloo_pool) -> Path:
    """A run that has trained for three steps, and whose service has refreshed 8 clusters in between."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    overrides = [
        *TINY, f"data.root={data}", f"run.dir={run}", "run.name=tiny", "method.prototype_source=clusters",
        "prototypes.refresh_steps=2", "train.global_batch=8", "train.steps=3",
    ]  # fmt: skip
    assert gloo_pool(1).run(train, overrides) == [0]
    return run


def quiet(line: str) -> None:
    """Progress nobody reads."""


def test_the_runs_own_clusters_and_embeddings_are_stored(
    built: Path, data: Path, snapshot: Snapshot, model: RunModel
) -> None:
    reader = ShardReader(data)
    assert snapshot.origin.source == "service"
    assert snapshot.origin.step == 3
    assert snapshot.table.fingerprint == stored_table(locate(built)).fingerprint
    assert snapshot.origin.data == reader.index.fingerprint
    count = reader.sample_count("train")
    assert len(snapshot.sample) == 20 < count
    assert snapshot.sample[[0, -1]].tolist() == [0, count - 1]
    names = snapshot.origin.label_names
    for row in (0, 7, len(snapshot.sample) - 1):
        key, image, metadata = reader.read("train", int(snapshot.sample[row]))
        assert snapshot.key_of(row) == key
        expected = [{1: 1, 0: 0, -1: -1, None: -2}[metadata["labels"].get(name)] for name in names]
        assert snapshot.labels[row].tolist() == expected
        found = model.embed_images([image], snapshot.origin.stored_size)[0]
        torch.testing.assert_close(snapshot.image[row].float(), found, atol=1e-3, rtol=0)
        sentences = report_sentences(metadata["sections"], ["findings", "impression"], "none")
        text = model.embed_texts([" ".join(sentences)])[0]
        torch.testing.assert_close(snapshot.report[row].float(), text, atol=1e-3, rtol=0)


def test_no_file_holds_report_text_or_patients(built: Path, data: Path, snapshot: Snapshot) -> None:
    contents = b"".join(path.read_bytes() for path in folder_of(built).rglob("*") if path.is_file())
    reader = ShardReader(data)
    for position in snapshot.sample.tolist():
        metadata = reader.metadata("train", position)
        assert reader.key("train", position).encode() in contents
        for private in (metadata["patient_id"], metadata["study_id"], *metadata["sentences"]):
            assert private.encode() not in contents


def test_the_report_counts_what_lies_in_the_clusters(built: Path, snapshot: Snapshot) -> None:
    report = json.loads((folder_of(built) / REPORT).read_text())
    assert report["table"]["fingerprint"] == snapshot.table.fingerprint
    own = (snapshot.image.float() @ snapshot.table.centroids.T).argmax(1)
    reports = (snapshot.report.float() @ snapshot.table.centroids.T).argmax(1)
    names = snapshot.origin.label_names
    sets = [tuple((row == 1).tolist()) for row in snapshot.labels]
    assert len(report["clusters"]) == 8
    for cluster in report["clusters"]:
        members = (own == cluster["id"]).nonzero()[:, 0].tolist()
        assert cluster["images"] == len(members)
        assert cluster["reports"] == int((reports == cluster["id"]).sum())
        assert set(cluster["typical"]) <= {snapshot.key_of(row) for row in members}
        if not members:
            assert cluster["purity"] is None
            continue
        most = Counter(sets[row] for row in members).most_common(1)[0][1]
        assert cluster["purity"] == pytest.approx(most / len(members))
        nearest = max(
            members,
            key=lambda row: float(snapshot.image[row].float() @ snapshot.table.centroids[cluster["id"]]),
        )
        assert cluster["typical"][0] == snapshot.key_of(nearest)
        for name, share in cluster["labels"].items():
            column = snapshot.labels[members, names.index(name)]
            assert share == pytest.approx(float((column == 1).sum() / (column != -2).sum()))
    assert report["overall"]["same_cluster"] == pytest.approx(float((own == reports).float().mean()))


def synthetic(of_image: list[int], labels: list[list[int]]) -> Snapshot:
    """Samples exactly on the axes 0..3, which are the centroids; cluster 3 stays empty."""
    axes = torch.eye(4)
    origin = Origin("kmeans", "run", "step-00000001", 1, "data", "train", ["a", "b"], 32)
    return Snapshot(
        table=PrototypeTable.start(axes),
        image=axes[of_image].half(),
        report=None,
        sample=torch.arange(len(of_image)),
        labels=torch.tensor(labels, dtype=torch.int8),
        keys=snapshots.pack_keys([f"k{number}" for number in range(len(of_image))]),
        origin=origin,
    )


def test_figures_of_perfect_and_of_useless_clusters() -> None:
    perfect = synthetic([0, 0, 1, 1, 2, 2], [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0]])
    figures = overall(Members.of(perfect))
    assert figures["nmi"] == pytest.approx(1)
    assert figures["purity"] == 1
    assert figures["dead_share"] == 0.25
    assert figures["perplexity"] == pytest.approx(3 / 4)
    assert figures["same_cluster"] is None
    useless = overall(Members.of(synthetic([0, 1, 0, 1], [[1, 0], [1, 0], [0, 1], [0, 1]])))
    assert useless["nmi"] == pytest.approx(0, abs=1e-9)
    assert useless["purity"] == 0.5


def test_samples_without_labels_count_for_nothing() -> None:
    part = Members.of(synthetic([0, 0, 1], [[1, -2], [-2, -2], [-2, -2]]))
    assert part.purity(0) == 1
    assert part.purity(1) is None
    assert part.label_mix(0) == {"a": 1.0}
    assert overall(part)["purity"] == 1
    report = report_of(Members.of(synthetic([0, 1], [[-2, -2], [-2, -2]])))
    assert report["overall"]["nmi"] is None
    assert json.dumps(report, allow_nan=False)


def test_clusters_by_kmeans_and_learned_ones(saved: Path, data: Path, tmp_path: Path) -> None:
    request = SnapshotOptions(saved, split="test", limit=6, clusters=3, out=tmp_path / "out", workers=0)
    assert build(request, quiet) == tmp_path / "out"
    found = Snapshot.read(tmp_path / "out" / SNAPSHOT)
    assert found.origin.source == "kmeans"
    assert found.origin.split == "test"
    assert found.table.centroids.shape == (3, 16)
    assert float(found.table.counts.sum()) == 12, "images and reports are clustered together"
    count = ShardReader(data).sample_count("test")
    assert found.sample[[0, -1]].tolist() == [0, count - 1], "a sample of the split, from end to end"
    with pytest.raises(TooFewRowsError):
        build(SnapshotOptions(saved, limit=2, clusters=30, out=tmp_path / "none", workers=0), quiet)
    assert [path.name for path in (tmp_path / "none").iterdir()] == [LOCK]

    save_run(data, tmp_path / "learned")
    build(SnapshotOptions(tmp_path / "learned", limit=4), quiet)
    found = Snapshot.read(folder_of(tmp_path / "learned") / SNAPSHOT)
    assert found.origin.source == "learned"
    weights = safetensors.torch.load_file(locate(tmp_path / "learned").checkpoint.weights)
    expected = torch.nn.functional.normalize(weights["alignment.objective.prototypes.weight"], dim=1)
    torch.testing.assert_close(found.table.centroids, expected)


def test_samples_without_a_report_are_left_out(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = SampleStore.trainable
    monkeypatch.setattr(
        SampleStore, "trainable", lambda store: trainable(store) & (np.arange(len(store)) != 1)
    )
    build(SnapshotOptions(saved, split="test", clusters=2, out=tmp_path / "out", workers=0), quiet)
    assert Snapshot.read(tmp_path / "out" / SNAPSHOT).sample[:3].tolist() == [0, 2, 3]


def test_what_is_kept_of_a_batch_keeps_no_images(
    model: RunModel, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build kept all images of the split in memory, page-locked where there is CUDA."""
    slots, load, joined = Slots(1, 0, 1 << 20), builder.evaluation_loader, []

    class Torch:
        """torch, but says what is joined."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def cat(self, parts: list[torch.Tensor]) -> torch.Tensor:
            joined.extend(parts)
            return torch.cat(parts)

    def packed(*arguments: Any) -> Iterator[Batch]:
        return (slots.pack(batch, worker=0).unpack() for batch in load(*arguments))

    monkeypatch.setattr(builder, "evaluation_loader", packed)
    monkeypatch.setattr(builder, "torch", Torch())
    found = builder.make_snapshot(model, SnapshotOptions(model.source.run, str(data), limit=6), quiet)
    slots.close()
    assert len(found.sample) == 6
    assert {part.dtype for part in joined} == {torch.float16, torch.int64, torch.float32}
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in joined)


def test_a_number_of_clusters_is_not_made_up_for_too_few_samples(data: Path, tmp_path: Path) -> None:
    save_run(data, tmp_path / "run", "method.prototype_weight=0")
    with pytest.raises(PrototypeFilesError, match="give --clusters"):
        build(SnapshotOptions(tmp_path / "run"), quiet)


def test_damage_is_noticed_and_the_way_out_told(run: Path) -> None:
    file = folder_of(run) / SNAPSHOT
    whole = file.read_bytes()
    tensors = safetensors.torch.load(whole)
    start = whole.index(bytes(tensors["image"].numpy().tobytes()[:64]))
    for content in (
        whole[:100], b"", whole[: start + 8] + bytes([whole[start + 8] ^ 1]) + whole[start + 9 :],
        safetensors.torch.save(tensors), whole.replace(b'"format', b'"f0rmat', 1),
    ):  # fmt: skip
        assert content != whole
        file.write_bytes(content)
        with pytest.raises(PrototypeFilesError, match="make it anew: medvlp prototypes build"):
            Snapshot.read(file)
    file.unlink()
    with pytest.raises(PrototypeFilesError, match="does not exist; make it with"):
        Snapshot.read(file)


def test_a_failed_build_leaves_what_was_there(
    run: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (folder_of(run) / name).read_bytes() for name in (SNAPSHOT, REPORT)}
    leftover = folder_of(run) / f".{SNAPSHOT}.elsewhere-1.tmp"
    leftover.touch()
    os.utime(leftover, (0, 0))
    monkeypatch.setattr(Snapshot, "to_bytes", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(SnapshotOptions(run, limit=4, workers=0), quiet)
    assert {path.name: path.read_bytes() for path in folder_of(run).iterdir() if path.is_file()} == before


def test_a_second_build_into_one_folder_is_refused(run: Path, tmp_path: Path) -> None:
    """Its two files could be of two builds, and it would delete what the first one is writing."""
    request = SnapshotOptions(run, limit=4, clusters=2, out=tmp_path / "out", workers=0)
    (tmp_path / "out").mkdir()
    first = RunLock(tmp_path / "out", this_process(None))
    first.acquire()
    with pytest.raises(RunFolderError, match=f"--out={tmp_path / 'out'} is being written by process"):
        build(request, quiet)
    assert not (tmp_path / "out" / SNAPSHOT).exists()
    first.release()
    build(request, quiet)
    stored = Snapshot.read(tmp_path / "out" / SNAPSHOT)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["table"]["fingerprint"] == stored.table.fingerprint


def test_wrong_requests(saved: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="auto, cpu and cuda"):
        build(SnapshotOptions(saved, device="tpu"), quiet)
    weights = run / "checkpoints" / "step-00000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        build(SnapshotOptions(run), quiet)
    (tmp_path / "file").touch()
    with pytest.raises(PrototypeFilesError, match="another --out"):
        build(SnapshotOptions(saved, limit=8, out=tmp_path / "file" / "out", workers=0), quiet)


def test_a_run_whose_embeddings_no_loss_shaped_is_refused(data: Path, tmp_path: Path) -> None:
    save_run(data, tmp_path / "run", "method.instance_weight=0", "method.prototype_weight=0")
    with pytest.raises(PrototypeFilesError, match="embeds no images"):
        RunModel(locate(tmp_path / "run"), torch.device("cpu"))


def test_keys_of_any_length_come_back() -> None:
    keys = ["a", "längerer-Schlüssel", "b-0"]
    packed = snapshots.pack_keys(keys)
    assert [bytes(row.numpy()).rstrip(b"\0").decode() for row in packed] == keys
    assert packed.numpy().dtype == np.uint8
