"""What the nodes of a run tell: once a node, without what a machine does not say."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medvlp import distributed
from medvlp.training import node_metrics
from medvlp.training.node_metrics import NodeMetrics


class Told:
    """In place of W&B: what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((values, step))


def test_the_first_rank_of_each_node_tells_and_only_at_logged_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Any = Told()
    callback = NodeMetrics(told)
    ranks = [(0, None), (0, None), (2, None), (2, None)]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: ranks)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    callback.on_start(0)
    other = NodeMetrics(None)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    other.on_start(0)
    assert other._watch is None
    monkeypatch.setattr(
        distributed, "gather_objects", lambda value: [value, None, {"cpu_percent": 7.0}, None]
    )
    for step, logged in ((4, False), (5, True)):
        callback.on_step(SimpleNamespace(step=step, logged=logged, last=False))  # type: ignore[arg-type]
    ((values, step),) = told.lines
    assert step == 5
    assert values["system/node-1/cpu_percent"] == 7.0
    assert 0 < values["system/node-0/memory_percent"] <= 100
    assert values["system/node-0/network_mib_per_second"] >= 0
    assert {name.split("/")[1] for name in values} == {"node-0", "node-1"}


def test_gpus_that_do_not_say_how_busy_they_are_end_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class SilentError(Exception):
        """As NVML's error of a GPU in parts."""

    busy = [99, 20, 60]
    nvml = SimpleNamespace(
        NVMLError=SilentError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=["GPU-other's", "GPU-a", "GPU-b"].index,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=busy[gpu]),
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=gpu, total=4),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    watch = node_metrics._Watch(["GPU-a", "GPU-b"])
    found = watch.look()
    assert (found["gpu_percent"], found["gpu_memory_percent"]) == (40, 37.5)
    busy.clear()

    def refuse(gpu: int) -> None:
        raise SilentError("not supported")

    nvml.nvmlDeviceGetUtilizationRates = refuse
    assert "gpu_percent" not in watch.look()
    assert "gpu_percent" not in watch.look()
    assert caplog.text.count("do not say how busy") == 1


def test_a_rank_names_its_gpu_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_metrics._own_gpu() is None
    gpus = {3: SimpleNamespace(uuid="4a6c-00")}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    assert node_metrics._own_gpu() == "GPU-4a6c-00"


def test_a_machine_that_counts_no_network_is_watched_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)
    assert set(node_metrics._Watch().look()) >= {"cpu_percent", "memory_percent"}
    assert "network_mib_per_second" not in node_metrics._Watch().look()
