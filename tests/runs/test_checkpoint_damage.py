"""Every file of a real checkpoint in turn cut, flipped and deleted: named, passed over, never loaded."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from medvlp import distributed
from medvlp.runs import checkpoint, saved_run, state_files
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.errors import AgreedError, CheckpointError
from tests.training.saving import tiny_config, train_and_save


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(place: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return damage


DAMAGES = {"cut": cut, "first": flip(0.0), "middle": flip(0.5), "last": flip(1.0), "deleted": Path.unlink}


@pytest.fixture(scope="module")
def run_of_two(gloo_pool, tmp_path_factory):
    """A run of two ranks with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        gloo_pool(2).run(train_and_save, tiny_config(str(folder), 2, "bf16"), step)
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_in_turn(run_of_two, tmp_path, caplog, damage):
    whole = run_of_two / "checkpoints"
    names = [str(path.relative_to(whole)) for path in (whole / "step-00000002").rglob("*") if path.is_file()]
    assert len(names) == 6
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(whole, run / "checkpoints")
        DAMAGES[damage](run / "checkpoints" / name)
        caplog.clear()
        with caplog.at_level("WARNING", logger="medvlp"):
            found = Checkpoint.find(run)
        assert found.name == "step-00000001", name
        assert Path(name).name in caplog.text
        shutil.rmtree(run / "checkpoints/step-00000001")
        with pytest.raises(CheckpointError, match="none is good"):
            Checkpoint.find(run)


def find_with_a_stale_handle(run: str, name: str) -> str:
    """What a start says where the last rank cannot read the files of one checkpoint."""
    distributed.initialize()
    original = state_files.checksum

    def refused(path):
        if name in path.parts and distributed.rank() == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(path)

    state_files.checksum = refused
    try:
        return Checkpoint.find(run).name
    except CheckpointError as error:
        return str(error)
    finally:
        state_files.checksum = original


def find_in_a_folder_that_rank_0_cannot_list(run: str) -> str:
    """What a start says where the first rank cannot list the checkpoints."""
    distributed.initialize()
    original = checkpoint.step_folders

    def refused(folder):
        if distributed.is_main():
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(folder)

    checkpoint.step_folders = refused
    try:
        return Checkpoint.find(run).name
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoint.step_folders = original


def located(run: str) -> str:
    """What is said of a run whose folder is not there on the machine of rank 1."""
    distributed.initialize()
    try:
        return str(saved_run.locate(Path(run if distributed.is_main() else f"{run}-absent")).run)
    except AgreedError as error:
        return str(error)


@pytest.mark.dist
def test_a_run_that_one_machine_does_not_see_is_named_on_all(gloo_pool, run_of_two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of_two / "checkpoints", run / "checkpoints")
    (run / "config.yaml").touch()
    said = gloo_pool(2).run(located, str(run))
    assert said[0] == said[1]
    assert f"{run}-absent: neither a run folder" in said[0]
    assert gloo_pool(2).run(located, str(run)) == said, "nobody waits for a message of before"


@pytest.mark.dist
def test_a_folder_that_cannot_be_listed_stops_all(gloo_pool, run_of_two):
    said = gloo_pool(2).run(find_in_a_folder_that_rank_0_cannot_list, str(run_of_two))
    assert said[0] == said[1]
    assert "checkpoints cannot be read now (Permission denied)" in said[0]


@pytest.mark.dist
def test_a_refusal_to_one_rank_stops_all_and_damage_is_still_passed_over(gloo_pool, run_of_two, tmp_path):
    shutil.copytree(run_of_two / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step-00000002"
    said = gloo_pool(2).run(find_with_a_stale_handle, str(tmp_path), newest.name)
    assert said[0] == said[1]
    assert f"whether {newest} is good cannot be told" in said[0]
    assert "cannot be read now (Stale file handle)" in said[0]
    cut(newest / "manifest.json")
    assert gloo_pool(2).run(find_with_a_stale_handle, str(tmp_path), newest.name) == ["step-00000001"] * 2
