"""Writing, verifying, choosing and deleting checkpoints, without an engine."""

import errno
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import CheckpointConfig, Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.runs import checkpoint_files, retention, state_files
from medvlp.runs import manifest as manifest_module
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.checkpoint_writer import CheckpointWriter
from medvlp.runs.errors import CheckpointError, UnreadableError
from medvlp.runs.manifest import FORMAT, MANIFEST, Manifest, step_folder
from medvlp.runs.retention import prune
from medvlp.runs.state_files import StateFile, read_state
from tests.training.tiny import TinyMethod


def save(
    run_dir: Path, step: int, config: CheckpointConfig | None = None, method: TinyMethod | None = None
) -> Path:
    folder = checkpoint_files.partial_folder(run_dir / "checkpoints", step)
    whole = manifest(step)
    whole.files = checkpoint_files.write(folder, state(run_dir / "checkpoints", step, method))
    return checkpoint_files.commit(folder, whole, config or CheckpointConfig(keep_last=0))


def state(checkpoints: Path, step: int, method: TinyMethod | None = None) -> list[StateFile]:
    folder = checkpoint_files.partial_folder(checkpoints, step)
    return [
        StateFile(folder / "weights.safetensors", (method or TinyMethod()).state_dict()),
        StateFile(folder / "ranks" / "rank-00000.pt", {"x": torch.arange(5), "n": [1, None, "a"]}),
    ]


def manifest(step: int, **metrics: float) -> Manifest:
    return Manifest(step, 0, 1, 0, "fp32", 8, "hash", metrics=metrics, format=FORMAT, optimizer="adamw")


def test_what_is_saved_is_verified_and_read_back(tmp_path):
    method = TinyMethod()
    folder = save(tmp_path, 5, method=method)
    assert folder.name == "step-00000005"
    assert (tmp_path / "checkpoints/latest").read_text().strip() == folder.name
    written = json.loads((folder / "manifest.json").read_text())
    assert written["step"] == 5
    assert set(written["files"]) == {"weights.safetensors", "ranks/rank-00000.pt"}
    assert Checkpoint.find(tmp_path).folder == folder
    other = TinyMethod()
    Checkpoint.open(folder).weights_into(other)
    assert all(
        torch.equal(a, b)
        for a, b in zip(method.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert read_state(folder / "ranks/rank-00000.pt")["n"] == [1, None, "a"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert Checkpoint.find(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f".{step_folder(5)}.partial").mkdir()
    assert Checkpoint.find(tmp_path) is None


def flip(folder: Path) -> None:
    path = folder / "ranks/rank-00000.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def escape(folder: Path) -> None:
    written = json.loads((folder / "manifest.json").read_text())
    written["files"]["../../secret"] = {"bytes": 1, "xxh3_128": ""}
    (folder / "manifest.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "checksum differs"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b""), "has 0 bytes"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 1}'), "cannot be read as a manifest"),
        (escape, "names a file that is none of a checkpoint"),
    ],
)
def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path, caplog, damage, message):
    old, new = save(tmp_path, 5), save(tmp_path, 10)
    damage(new)
    with caplog.at_level("WARNING", logger="medvlp"):
        assert Checkpoint.find(tmp_path).folder == old
    assert message in caplog.text
    damage(old)
    with pytest.raises(CheckpointError, match="2 checkpoints and none is good"):
        Checkpoint.find(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}}, "lists no ranks or no files"),
        ({"files": {"a\0b": {"bytes": 1, "xxh3_128": ""}}}, "names a file"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh3_128": ""}}}, "names a file"),
        ({"files": {"a": {"bytes": "1", "xxh3_128": ""}}}, "an entry of a file"),
        ({"files": {"a": {"bytes": -1, "xxh3_128": ""}}}, "an entry of a file"),
        ({"files": [1]}, "not of type dict"),
        ({"step": 11}, "step 11 in a folder of step 10"),
        ({"step": "10"}, "not of type int"),
        ({"step": -10}, "in a folder of step 10"),
        ({"format": 99}, "format 99"),
        ({"format": None}, "not of type int"),
        ({"world_size": 10**12}, "world_size is out of range"),
        ({"world_size": 0}, "lists no ranks"),
        ({"created": "\x1b[2J"}, "cannot be printed"),
        ({"metrics": {"loss": "low"}}, "not of type float"),
        ({"metrics": {"loss": float("nan")}}, "not finite"),
        ({"surprise": 1}, "unknown field"),
    ],
)
def test_a_manifest_no_run_writes_is_one_line(tmp_path, change, message):
    folder = save(tmp_path, 10)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1, "checksum": ""} | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        Manifest.read(folder)
    assert "\n" not in str(caught.value)


def test_hostile_state_files_are_one_line(tmp_path):
    path = tmp_path / "rank-00000.pt"
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="claims more bytes than it has"):
        read_state(packed)
    whole = path.read_bytes()
    for data in (b"", b"PK", whole[:1000], whole[:-5], b"\x80\x02" + b"(" * 100, b"{}"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read as state") as caught:
            read_state(path)
        assert "\n" not in str(caught.value)


def test_saving_over_a_damaged_one_replaces_it_and_drops_an_abandoned_future(tmp_path):
    save(tmp_path, 5)
    flip(save(tmp_path, 10))
    save(tmp_path, 15)
    assert Checkpoint.find(save(tmp_path, 10).parent.parent).name == step_folder(10)
    assert not (tmp_path / "checkpoints" / step_folder(15)).exists()


@settings(max_examples=20)
@given(
    steps=st.sets(st.integers(1, 40), min_size=1, max_size=6),
    last=st.integers(0, 3),
    every=st.sampled_from([0, 4]),
)
def test_what_is_kept(tmp_path_factory, steps, last, every):
    run = tmp_path_factory.mktemp("keep")
    for step in sorted(steps):
        folder = run / "checkpoints" / step_folder(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    prune(run / "checkpoints", max(steps), CheckpointConfig(keep_last=last, keep_every=every))
    kept = {int(path.name[5:]) for path in (run / "checkpoints").iterdir()}
    newest = set(sorted(steps)[-last:]) if last else steps
    assert kept == newest | {step for step in steps if every and step % every == 0}
    shutil.rmtree(run)


def refuse_manifest(monkeypatch, folder: Path) -> None:
    """The disk does not show this folder's manifest."""
    read = manifest_module.read_limited

    def refused(path, most):
        if path == folder / MANIFEST:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, most)

    monkeypatch.setattr(manifest_module, "read_limited", refused)


def refuse_content(monkeypatch, folder: Path) -> None:
    """The disk does not show this folder's files."""
    original = state_files.checksum

    def refused(path):
        if folder in path.parents:
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(path)

    monkeypatch.setattr(state_files, "checksum", refused)


@pytest.mark.parametrize("refuse", [refuse_manifest, refuse_content])
def test_one_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, refuse):
    """Passed over, it would be deleted at the first save."""
    old, new = save(tmp_path, 5), save(tmp_path, 10)
    with monkeypatch.context() as patch:
        refuse(patch, new)
        with pytest.raises(
            CheckpointError, match=r"step-00000010 is good cannot be told: .*cannot be read now"
        ):
            Checkpoint.find(tmp_path)
        with pytest.raises(UnreadableError):
            Checkpoint.open(new)
        assert Checkpoint.open(old).step == 5
    assert Checkpoint.find(tmp_path).folder == new


def test_nothing_is_deleted_while_the_best_cannot_be_told(tmp_path, monkeypatch, caplog):
    config = CheckpointConfig(keep_last=1, keep_best="auroc", best_mode="max")

    def save_scored(step: int, value: float) -> Path:
        folder = checkpoint_files.partial_folder(tmp_path / "checkpoints", step)
        whole = manifest(step, auroc=value)
        whole.files = checkpoint_files.write(folder, state(tmp_path / "checkpoints", step))
        return checkpoint_files.commit(folder, whole, config)

    best, second = save_scored(1, 0.9), save_scored(2, 0.5)
    with monkeypatch.context() as patch:
        refuse_manifest(patch, best)
        with caplog.at_level("WARNING", logger="medvlp"):
            third = save_scored(3, 0.6)
        assert "old checkpoints stay" in caplog.text
        with pytest.raises(UnreadableError):
            prune(tmp_path / "checkpoints", 3, config)
        assert best.exists()
        assert second.exists()
    assert prune(tmp_path / "checkpoints", 3, config) == [second]
    assert best.exists()
    assert third.exists()


@pytest.mark.parametrize(("mode", "best"), [("min", 5), ("max", 3)])
def test_the_best_is_kept(tmp_path, mode, best):
    config = CheckpointConfig(keep_last=1, keep_best="auroc", best_mode=mode)
    for step, value in enumerate([0.5, 0.2, 0.9, 0.4, 0.2, None, 0.6], start=1):
        metrics = {} if value is None else {"auroc": value, "loss": float(step)}
        folder = checkpoint_files.partial_folder(tmp_path / "checkpoints", step)
        whole = manifest(step, **metrics)
        whole.files = checkpoint_files.write(folder, state(tmp_path / "checkpoints", step))
        checkpoint_files.commit(folder, whole, config)
    kept = {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {7, best}


def refuse_to_delete(monkeypatch, folder: Path) -> None:
    original = retention.remove

    def refused(doomed):
        if doomed == folder:
            raise OSError(errno.EACCES, "Permission denied", str(doomed))
        original(doomed)

    monkeypatch.setattr(retention, "remove", refused)


def test_an_old_one_that_cannot_be_deleted_is_named_and_ends_no_training(tmp_path, monkeypatch, caplog):
    stuck, other = save(tmp_path, 5), save(tmp_path, 10)
    refuse_to_delete(monkeypatch, stuck)
    writer = CheckpointWriter(tmp_path / "checkpoints", CheckpointConfig(retries=0, keep_last=1))
    writer.start(state(writer.checkpoints, 15), manifest(15))
    with caplog.at_level("WARNING", logger="medvlp"):
        writer.wait()
    assert f"Permission denied: '{stuck}'" in caplog.text
    assert Checkpoint.find(tmp_path).step == 15
    assert stuck.exists()
    assert not other.exists()
    with pytest.raises(OSError, match="Permission denied"):  # of the command: who asks for it is told
        prune(writer.checkpoints, 15, writer.config)


def test_one_beyond_the_saved_step_must_go(tmp_path, monkeypatch):
    save(tmp_path, 5)
    refuse_to_delete(monkeypatch, save(tmp_path, 20))
    writer = CheckpointWriter(tmp_path / "checkpoints", CheckpointConfig(retries=0))
    writer.start(state(writer.checkpoints, 10), manifest(10))
    with pytest.raises(CheckpointError, match=r"step-00000020 cannot be deleted, and a later start could"):
        writer.wait()


def test_a_commit_that_was_cut_off_can_be_repeated(tmp_path, monkeypatch):
    folder = checkpoint_files.partial_folder(tmp_path / "checkpoints", 5)
    whole = manifest(5)
    whole.files = checkpoint_files.write(folder, state(tmp_path / "checkpoints", 5))
    calls = []

    def refuse_once(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_files, "fsync_path", refuse_once)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint_files.commit(folder, whole, CheckpointConfig())
    assert not (tmp_path / "checkpoints/latest").exists()
    assert checkpoint_files.commit(folder, whole, CheckpointConfig()) == Checkpoint.find(tmp_path).folder
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000005"


def test_deleting_removes_the_manifest_first(tmp_path, monkeypatch):
    folder = save(tmp_path, 5)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_files.remove(folder)
    assert folder.exists()
    assert not (folder / "manifest.json").exists()


def test_a_disk_that_refuses_is_one_clear_error_and_keeps_the_old(tmp_path, monkeypatch):
    old = save(tmp_path, 5)

    def full(self, given_up):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StateFile, "write", full)
    writer = CheckpointWriter(tmp_path / "checkpoints", CheckpointConfig(retries=0))
    writer.start(state(writer.checkpoints, 10), manifest(10))
    with pytest.raises(
        CheckpointError, match=r"step 10 cannot be written .*No space left on device \(rank 0\)"
    ):
        writer.wait()
    assert Checkpoint.find(tmp_path).folder == old
    assert not writer.busy


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_state_file_is_not_executed(tmp_path, capsys):
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        read_state(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_weights_of_another_method_are_refused(tmp_path):
    folder = save(tmp_path, 5)
    with pytest.raises(CheckpointError, match="is of another model"):
        Checkpoint.open(folder).weights_into(torch.nn.Linear(2, 2))


def test_a_start_reads_the_manifest_once(tmp_path, monkeypatch):
    save(tmp_path, 4)
    config = Config()
    config.run.dir, config.train.global_batch, config.precision = str(tmp_path), 8, "fp32"
    reads, read = [], Manifest.read.__func__

    def counted(cls, folder):
        reads.append(folder)
        return read(cls, folder)

    monkeypatch.setattr(Manifest, "read", classmethod(counted))
    found = Checkpoint.find(tmp_path)
    found.check(config, divide_batch(config, 1))
    found.weights_into(TinyMethod())
    assert found.state_for(0)["n"] == found.state_for(7)["n"] == [1, None, "a"]
    with pytest.raises(CheckpointError, match="cannot be read as optimiser state"):
        found.optimizer()
    assert reads == [found.folder]


def test_a_checkpoint_is_opened_whole_or_for_the_files_that_are_asked_for(tmp_path):
    folder = save(tmp_path, 4)
    flip(folder)
    assert Checkpoint.open(folder, ["weights.safetensors"]).step == 4
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="choose another checkpoint"):
        Checkpoint.open(folder, ["other.pt"])
