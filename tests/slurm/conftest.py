"""One real Slurm cluster of three nodes for all tests of a session, and tiny data on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import FAULTS, REPOSITORY, Cluster
from tests.training.runs import TINY

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "unshare", "nsenter")
_SMALL_DISK_BYTES = 4_000_000


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The running cluster; Slurm's commands mean it. Skips where Slurm is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"needs a local Slurm: no {', '.join(missing)} (slurm/local-cluster install, as root)")
    # Not pytest's folder: sockets below it have to fit into 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="medvlp-slurm-", dir="/tmp"))
    disk = _mount_small_disk(folder / "small-disk")
    os.environ["MEDVLP_SLURM_DIR"] = str(folder / "cluster")
    os.environ["SLURM_CONF"] = str(folder / "cluster" / "slurm.conf")
    running = Cluster(folder, disk)
    try:
        running.manage(
            "start",
            "--nodes",
            "3",
            "--grace",
            "300",
            "--isolation",
            os.environ.get("MEDVLP_SLURM_ISOLATION", "auto"),
        )
        yield running
    finally:
        running.manage("stop")
        if disk is not None:
            subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["SLURM_CONF"], os.environ["MEDVLP_SLURM_DIR"]


def _mount_small_disk(folder: Path) -> Path | None:
    """Mounted before the nodes start, so that they see it too."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK_BYTES}", "tmpfs", str(folder)]
    return folder if subprocess.run(command, capture_output=True).returncode == 0 else None


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64-pixel phantoms of 60 studies, as shards."""
    root = tmp_path_factory.mktemp("phantoms") / "data"
    build = ["shards", "build", "phantom", "--out", str(root), "--studies", "60", "--image-size", "64"]
    subprocess.run([sys.executable, "-m", "launcher.main", *build], check=True, capture_output=True)
    return root


@pytest.fixture
def tiny(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`tiny("name", "train.steps=9", "--nodes", "3")` -> what follows `medvlp submit` for run tmp_path/name.

    Its job asks for 2 nodes with 2 CPUs each, no GPU and 10 minutes, unless said otherwise.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Beside the faults this checkout: else `sitecustomize`, and so the ranks, would import an installed one.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), str(REPOSITORY)]))

    def build(name: str, *more: str) -> list[str]:
        given = {word.partition("=")[0] for word in more}
        resources = {"--nodes": "2", "--gpus-per-node": "0", "--cpus-per-task": "2", "--time": "10"}
        options = [word for pair in resources.items() if pair[0] not in given for word in pair]
        return [*TINY, f"data.root={data}", f"run.dir={tmp_path / name}", *options, *more]

    return build
