"""A server beside a training: it answers from the newest checkpoint, whatever happens to the run's folder."""

from __future__ import annotations

import errno
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from medvlp.runs.errors import RunFolderError
from medvlp.runs.run_lock import LOCK, RunLock, this_process
from medvlp.serving import serve
from medvlp.serving.answers import Answers
from medvlp.serving.build import SnapshotOptions, build
from medvlp.serving.follow import Source
from medvlp.serving.layout import SNAPSHOT, DamagedFileError, PrototypeFilesError, folder_of
from medvlp.serving.limits import Limits
from medvlp.serving.run_model import checkpoint_of
from medvlp.serving.server import Address, PrototypeServer
from medvlp.serving.snapshot import Snapshot, write
from shards.build import BuildOptions, build_shards
from shards.errors import DataError
from shards.merge import merge
from shards.plan import Part
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource
from tests.serving.runs import save_run


def source(run: Path) -> Source:
    return Source(run, SnapshotOptions(run, limit=6, device="cpu"), Limits(), lambda line: None)


def step(answers: Answers | None) -> int:
    assert answers is not None
    assert answers.model().source.checkpoint.name == answers.snapshot.origin.checkpoint
    return answers.snapshot.origin.step


def test_every_new_checkpoint_is_followed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    followed = source(run)
    assert followed.newer() is None, "a run that has not begun"
    run.mkdir()
    assert followed.newer() is None
    save_run(data, run, step=1)
    (run / "checkpoints" / ".step-00000002.partial").mkdir()
    (run / "checkpoints" / "step-00000003").mkdir()
    assert step(followed.newer()) == 1, "what has no manifest is no checkpoint"
    assert Snapshot.read(folder_of(run) / SNAPSHOT).origin.step == 1
    assert followed.newer() is None
    save_run(data, run, step=4)
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    assert step(followed.newer()) == 4
    assert followed.newer() is None
    build(SnapshotOptions(run, limit=6, clusters=2, workers=0), lambda line: None)
    found = followed.newer()
    assert step(found) == 4
    assert len(found.snapshot.table.centroids) == 2, "somebody has built anew"
    assert followed.newer() is None


def test_a_damaged_checkpoint_is_passed_over_once(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    save_run(data, run, step=1)
    save_run(data, run, step=2)
    weights = run / "checkpoints" / "step-00000002" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    followed = source(run)
    assert step(followed.newer()) == 1
    assert followed.newer() is None, "it is not built again and again"
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    with caplog.at_level(logging.WARNING, "medvlp.serving.follow"):
        other = source(run)
        assert other.newer() is None
        assert other.newer() is None
    assert len([record for record in caplog.records if "not followed yet" in record.message]) == 1
    weights.write_bytes(whole)
    assert step(other.newer()) == 2, "tried again until it can be read"


def test_without_following_the_stored_prototypes_are_taken(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunFolderError):
        source(run).load()
    save_run(data, run, step=1)
    assert step(source(run).load()) == 1
    assert (folder_of(run) / SNAPSHOT).is_file(), "built where there was nothing"
    save_run(data, run, step=2)
    assert step(source(run).load()) == 1


def test_stored_prototypes_of_other_options_are_not_served_as_those_asked_for(
    run: Path, data: Path, tmp_path: Path
) -> None:
    """The stored ones: the 8 learned prototypes, and 20 samples of train."""
    stored = (folder_of(run) / SNAPSHOT).read_bytes()
    other = tmp_path / "other"
    build_shards(
        PhantomSource(12, image_size=40, seed=2), other, BuildOptions(image=StoredImage(40)), 1, Part(0, 1)
    )
    merge(other)
    for options, told in (
        (SnapshotOptions(run, split="test"), "holds split train, not test: build it anew with these options"),
        (SnapshotOptions(run, clusters=8), r"8 clusters \(learned\), not 8 by k-means"),
        (SnapshotOptions(run, limit=10), "20 samples, not those of --limit 10"),
        (SnapshotOptions(run, data=str(other)), "samples of another dataset than"),
    ):
        with pytest.raises(PrototypeFilesError, match=told):
            Source(run, options, Limits(), lambda line: None).load()
    with pytest.raises(PrototypeFilesError, match="20 samples, not those of --limit 0"):
        Source(run, SnapshotOptions(run, limit=0), Limits(), lambda line: None).load()
    same = SnapshotOptions(run, str(data), "train", limit=20)
    assert step(Source(run, same, Limits(), lambda line: None).load()) == 3
    assert (folder_of(run) / SNAPSHOT).read_bytes() == stored
    follower = Source(run, SnapshotOptions(run, split="test", limit=4), Limits(), lambda line: None)
    answers = follower.newer()
    assert answers is not None
    assert (answers.snapshot.origin.split, len(answers.snapshot.sample)) == ("test", 4)
    assert follower.newer() is None


def test_prototypes_of_a_whole_split_are_those_of_any_limit_above(run: Path) -> None:
    build(SnapshotOptions(run, workers=0), lambda line: None)
    samples = len(Snapshot.read(folder_of(run) / SNAPSHOT).sample)
    for limit in (0, samples, samples + 1):
        assert step(Source(run, SnapshotOptions(run, limit=limit), Limits(), lambda line: None).load()) == 3
    with pytest.raises(PrototypeFilesError, match=f"not those of --limit {samples - 1}"):
        Source(run, SnapshotOptions(run, limit=samples - 1), Limits(), lambda line: None).load()


def test_a_run_that_has_fallen_back_is_followed_to_its_new_weights(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_run(data, run, step=1)
    save_run(data, run, step=2)
    followed = source(run)
    before = followed.newer()
    assert step(before) == 2
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    save_run(data, run, step=2, seed=9)
    found = followed.newer()
    assert step(found) == 2
    assert found.snapshot.origin.weights == checkpoint_of(run, found.snapshot.origin).weights
    assert found.snapshot.origin.weights != before.snapshot.origin.weights
    assert followed.newer() is None


@pytest.mark.parametrize("error", [PrototypeFilesError("torn"), OSError(errno.ESTALE, "stale")])
def test_what_could_not_be_read_is_tried_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    followed = Source(run, SnapshotOptions(run, device="cpu"), Limits(), lambda line: None)
    assert step(followed.newer()) == 3
    build(SnapshotOptions(run, limit=4, workers=0), lambda line: None)
    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "read", Mock(side_effect=error))
        assert followed.newer() is None
    answers = followed.newer()
    assert answers is not None
    assert len(answers.snapshot.sample) == 4


def test_a_gpu_without_room_leaves_the_old_answers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    save_run(data, run, step=1)
    followed = source(run)
    assert step(followed.newer()) == 1
    save_run(data, run, step=2)
    with monkeypatch.context() as patched:
        patched.setattr("medvlp.serving.follow.RunModel", Mock(side_effect=torch.OutOfMemoryError))
        assert followed.newer() is None
        assert followed.newer() is None
    assert caplog.text.count("the GPU has no room for it: serve with --device cpu") == 1
    assert step(followed.newer()) == 2


def test_a_server_whose_folder_cannot_be_written_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    monkeypatch.setattr(PrototypeServer, "describe", Mock(side_effect=[None, DataError("full disk")]))
    # The second look is told to end, as by a signal.
    monkeypatch.setattr(serve, "time", Mock(sleep=Mock(side_effect=[None, serve._Ended])))
    build = SnapshotOptions(run, device="cpu")
    serve.serve(serve.ServeOptions(run, Address(), build, follow=True), said.append)
    assert "full disk" in caplog.text
    assert [line.split()[0] for line in said[-3:]] == ["serving", "serving", "ended"]


@pytest.mark.parametrize("name", ["step", "stored_size", "limit", "candidates"])
def test_prototypes_whose_origin_is_malformed_are_damaged(run: Path, snapshot: Snapshot, name: str) -> None:
    origin = replace(snapshot.origin, **{name: "many"})
    write(replace(snapshot, origin=origin), {}, folder_of(run))
    with pytest.raises(DamagedFileError, match="a number of its origin is none"):
        Snapshot.read(folder_of(run) / SNAPSHOT)


def test_damaged_prototypes_are_built_anew(run: Path) -> None:
    stored = folder_of(run) / SNAPSHOT
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1])
    assert (
        step(Source(run, SnapshotOptions(run, limit=4, device="cpu"), Limits(), lambda line: None).newer())
        == 3
    )
    assert len(Snapshot.read(stored).sample) == 4


def test_a_server_does_not_build_beside_another_build(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_run(data, run, step=1)
    folder_of(run).mkdir()
    other = RunLock(folder_of(run), this_process(None))
    other.acquire()
    followed = source(run)
    with pytest.raises(RunFolderError, match="is being written by process"):
        followed.build()
    assert followed.newer() is None
    assert [path.name for path in folder_of(run).iterdir()] == [LOCK]
    other.release()
    assert step(followed.newer()) == 1
