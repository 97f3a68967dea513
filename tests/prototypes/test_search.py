"""Where centroids are searched. The driver's tool and FAISS's interface to GPUs are faked, nothing else."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import faiss
import numpy as np
import pytest
import torch

from medvlp.config import PrototypesConfig
from medvlp.prototypes import search as module
from medvlp.prototypes import worker
from medvlp.prototypes.board import WorkerSettings
from medvlp.prototypes.kmeans import spherical_kmeans
from medvlp.prototypes.search import CentroidSearch, TorchIndex
from medvlp.prototypes.supervisor import BOARD, NO_GPU, SUPERVISOR
from tests.prototypes.test_kmeans import mixture

COUNT, WIDTH = 12, 8
ROWS = mixture(COUNT, 20, WIDTH, 0.4).numpy()
CENTROIDS = mixture(COUNT, 1, WIDTH, 0.0, seed=0).numpy()


class Resources:
    """`faiss.StandardGpuResources`."""

    def __init__(self, calls: list[Any]):
        self.calls = calls

    def setTempMemory(self, size: int) -> None:  # noqa: N802 - FAISS's name
        self.calls.append(("memory", size))


class GpuIndex:
    """An index that FAISS has moved to a GPU; fails where the test says so."""

    def __init__(self, index: Any, fails: bool):
        self._index, self._fails = index, fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def search(self, rows: Any, count: int) -> Any:
        if self._fails:
            raise RuntimeError("Error in allocMemory: out of memory on device 3")
        return self._index.search(rows, count)


class Machine:
    """Four GPUs as nvidia-smi and faiss-gpu show them; `calls`: what FAISS was asked for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.free_mib, self.mode, self.fails = 40_000, "Default", False


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """faiss-gpu on a node with four GPUs; this process is its third rank."""
    found = Machine()

    def to_gpu(resources: Any, gpu: int, index: Any) -> GpuIndex:
        found.calls.append(("gpu", gpu))
        return GpuIndex(index, found.fails)

    def state(gpu: int) -> tuple[int, str]:
        found.calls.append(("asked", gpu))
        return found.free_mib << 20, found.mode

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 4, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: Resources(found.calls), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(module, "_gpu_count", lambda: 4)
    monkeypatch.setattr(module, "_state", state)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv(NO_GPU, raising=False)
    return found


def build(device: str, rows: int = len(ROWS), **more: Any) -> CentroidSearch:
    return CentroidSearch(COUNT, WIDTH, PrototypesConfig(device=device, **more), rows, 1)  # type: ignore[arg-type]


def is_exact(search: CentroidSearch) -> bool:
    similarity, nearest = search(ROWS, CENTROIDS)
    expected = ROWS @ CENTROIDS.T
    np.testing.assert_allclose(similarity, expected.max(1), atol=1e-5)
    return bool((nearest == expected.argmax(1)).all())


def test_a_gpu_of_its_own_within_the_budget(machine: Machine) -> None:
    search = build("gpu", gpu_memory=0.5)
    assert search.on_gpu
    assert machine.calls == [("asked", 2), ("memory", (512 << 20) - 4 * COUNT * WIDTH), ("gpu", 2)]
    assert is_exact(search)


def test_the_cluster_worker_takes_the_last_ranks_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever LOCAL_RANK its supervisor has: none (the launcher), or that of rank 0."""
    place = (0, 1, "", 4, 64, WIDTH, COUNT, 1, 1 << 20)
    settings = WorkerSettings(*place, asdict(PrototypesConfig(worker_threads=1)))
    board = Mock(read_settings=lambda: settings)
    for name in ("die_with", "_send_heartbeats"):
        monkeypatch.setattr(worker, name, lambda *_: None)
    monkeypatch.setattr(worker, "Board", lambda path: board)
    monkeypatch.setattr(worker, "Worker", lambda *_: Mock(run=lambda: build("gpu")))
    for name in ("os.nice", "signal.signal", "torch.set_num_threads", "logging.basicConfig"):
        monkeypatch.setattr(name, lambda *_, **__: None)
    for name, value in {SUPERVISOR: "1", BOARD: "board", "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    worker.main()
    assert ("gpu", 3) in machine.calls


def test_auto_weighs_the_work(machine: Machine) -> None:
    assert not build("auto").on_gpu
    assert machine.calls == []
    assert build("auto", rows=10**11).on_gpu
    assert not build("cpu", rows=10**11).on_gpu


@pytest.mark.parametrize("trouble", ["full", "exclusive", "aborted", "too many centroids"])
def test_a_gpu_without_room_is_left_alone_with_one_line(
    machine: Machine, trouble: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("medvlp"), "propagate", True)
    if trouble == "full":
        machine.free_mib = 900
    elif trouble == "exclusive":
        machine.mode = "Exclusive_Process"
    elif trouble == "aborted":
        monkeypatch.setenv(NO_GPU, "1")
    search = (
        build("gpu")
        if trouble != "too many centroids"
        else CentroidSearch(10**7, 768, PrototypesConfig(device="gpu"), 100, 1)
    )
    assert not search.on_gpu
    assert not any(name == "gpu" for name, _ in machine.calls)
    assert len(caplog.records) == 1
    assert "searched on the CPU" in caplog.text
    if trouble != "too many centroids":
        assert is_exact(search)


def test_a_search_that_fails_goes_on_the_cpu_and_stays_there(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("medvlp"), "propagate", True)
    machine.fails = True
    search = build("gpu")
    assert is_exact(search)
    assert not search.on_gpu
    assert is_exact(search)
    assert len(caplog.records) == 1
    assert "out of memory on device 3" in caplog.text
    assert [call for call in machine.calls if call[0] == "gpu"] == [("gpu", 2)]


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("medvlp"), "propagate", True)
    monkeypatch.setattr(module, "_gpu_count", lambda: 0)
    assert not build("auto", rows=10**11).on_gpu
    assert caplog.text == ""
    assert not build("gpu").on_gpu
    assert "there is none" in caplog.text


@pytest.mark.parametrize("blocks", [1, 7])
def test_torch_finds_what_faiss_finds(blocks: int) -> None:
    """Same objective to 1e-5, nearly all ids; with a budget that takes the rows in blocks."""
    rows, centroids = mixture(300, 20, 32, 0.6).numpy(), mixture(300, 1, 32, 0.0, seed=5).numpy()
    budget = 4 * (300 * 32 + (300 + 32) * (len(rows) // blocks))
    similarity, nearest = TorchIndex(torch.device("cpu"), budget).search(rows, centroids)
    found = CentroidSearch(300, 32, PrototypesConfig(device="cpu"), len(rows), 1)(rows, centroids)
    assert abs(similarity.mean() - found[0].mean()) < 1e-5
    assert (nearest == found[1]).mean() > 0.999


def test_kmeans_by_torch_where_faiss_has_no_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of k-means through `TorchIndex`, whose device alone is another."""
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    used: list[int] = []

    class OnCpu(TorchIndex):
        def __init__(self, device: torch.device, budget: int):
            used.append(device.index)
            super().__init__(torch.device("cpu"), budget)

    monkeypatch.setattr(module, "TorchIndex", OnCpu)
    rows = mixture(10, 30, spread=0.4)
    start = rows[:10].clone()
    found = spherical_kmeans(rows, 10, PrototypesConfig(device="gpu", iterations=5), 0, start=start)
    expected = spherical_kmeans(rows, 10, PrototypesConfig(device="cpu", iterations=5), 0, start=start)
    assert used == [2]
    assert abs(found.similarity - expected.similarity) < 1e-5
    torch.testing.assert_close(found.centroids, expected.centroids, atol=1e-5, rtol=0)


def test_the_drivers_tool_is_asked_about_the_gpu_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$1" >> "$(dirname "$0")/asked"\necho "71234, Default"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    assert module._state(1) == (71234 << 20, "Default")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert module._state(3) == (71234 << 20, "Default")
    assert (tmp_path / "asked").read_text().split() == ["--id=GPU-bb", "--id=3"]
    tool.write_text("#!/bin/sh\nexit 6\n")
    assert module._state(0) == (None, "")


def test_the_extra_gpu_brings_the_libraries_that_its_readme_names(repository: Path) -> None:
    """A wheel for another CUDA is to be noticed: README and pyproject.toml say which torch it fits."""
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = extras["gpu"]
    resolve = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", wanted]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *resolve], capture_output=True, text=True, timeout=200
    )
    if done.returncode:
        pytest.skip(f"needs an index of packages: pip cannot resolve {wanted}")
    (found,) = json.loads(done.stdout)["install"]
    requires = {name.split("<")[0].split(">")[0] for name in found["metadata"]["requires_dist"]}
    libraries = {name for name in requires if name.startswith("nvidia-")}
    assert libraries
    assert all(name.endswith("-cu12") for name in libraries)
    readme = (repository / "medvlp" / "prototypes" / "README.md").read_text()
    assert [name for name in libraries if f"`{name}`" not in readme] == []
