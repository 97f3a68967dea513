"""What the nodes of a run tell: once a node, without what a machine does not say."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

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
    nodes = [0, 0, 2, 2]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: nodes)
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

    busy = [20, 60]
    nvml = SimpleNamespace(
        NVMLError=SilentError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=busy[gpu]),
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=gpu + 1, total=4),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    watch = node_metrics._Watch()
    found = watch.look()
    assert (found["gpu_percent"], found["gpu_memory_percent"]) == (40, 37.5)
    busy.clear()

    def refuse(gpu: int) -> None:
        raise SilentError("not supported")

    nvml.nvmlDeviceGetUtilizationRates = refuse
    assert "gpu_percent" not in watch.look()
    assert "gpu_percent" not in watch.look()
    assert caplog.text.count("do not say how busy") == 1


def test_a_machine_that_counts_no_network_is_watched_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)
    assert set(node_metrics._Watch().look()) >= {"cpu_percent", "memory_percent"}
    assert "network_mib_per_second" not in node_metrics._Watch().look()
