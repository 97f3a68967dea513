"""Nothing in a step waits for the GPU: forward passes on fake CUDA tensors, and whole steps on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import medvlp.methods.place.terms
import medvlp.methods.prior.terms
from medvlp import distributed
from medvlp.data.batch import Batch
from medvlp.data.batch_sizes import divide_batch
from medvlp.methods.base import Objective, StepOutput
from medvlp.training.bad_steps import BadSteps
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.engine import Engine
from medvlp.training.interrupts import Interrupts
from medvlp.training.monitor import Monitor
from medvlp.training.on_device import on_device
from medvlp.training.operations import fake_tensors
from medvlp.training.schedule import Schedule
from medvlp.training.step_guard import StepGuard
from medvlp.training.trainer import Trainer
from tests.distributed_pool import Pools
from tests.methods.small import built, names, small_batch, small_config
from tests.training.runs import Precision
from tests.training.test_loss_scale import fp16_on_cpu

#: Operations whose result is on the host, or whose shape is known only after the kernel has run.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item", "equal")


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operations that wait for the device, and copies between it and the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        waits = name in _WAITING or (name in ("_to_copy", "copy_") and _crosses(args, result))
        if waits and not _reads_a_counter():
            self.found.append(f"{name} at {_place()}")
        return result


def _crosses(args: Any, result: Any) -> bool:
    sources = [value for value in args if isinstance(value, torch.Tensor)]
    return len({tensor.device.type for tensor in [*sources, result]}) > 1


def _reads_a_counter() -> bool:
    """Whether torch's Adam reads the number of its step, which lies on the host."""
    return any(frame.name == "_get_value" for frame in traceback.extract_stack(limit=6))


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/medvlp/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"


def _matched(cost: Tensor, *rest: Any) -> Tensor:
    """The shape of `medvlp.losses.matching.match`, the one documented wait of a step: it runs on the CPU."""
    return torch.zeros(cost.shape[:2], dtype=torch.int64, device=cost.device)


def waits_of_a_pass(objective: Objective, batch: Batch) -> list[str]:
    """What waits in a forward pass on a fake device, of which another has been made before."""
    with fake_tensors() as mode:
        for module in objective.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    moved = mode.from_tensor(value.detach()).to("cuda")
                    module._parameters[name] = torch.nn.Parameter(moved, value.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = mode.from_tensor(buffer).to("cuda")
        given = batch._map(lambda tensor: mode.from_tensor(tensor).to("cuda"))
        objective(given, None)  # what is made once, and brought to the device once
        with HostWaits() as waits:
            objective(given, None)
    found: list[str] = waits.found
    return found


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", names())
def test_a_forward_pass_waits_for_nothing(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for terms in (medvlp.methods.place.terms, medvlp.methods.prior.terms):
        monkeypatch.setattr(terms, "match", _matched)
    config, batch = small_config(name), small_batch()
    config.text.length_groups = groups
    method = built(config)
    batch.text.lengths = tuple(batch.text.attention_mask.sum(1).tolist())
    assert waits_of_a_pass(method, batch) == []


def test_micro_batches_go_to_the_device_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host joins lies in memory that is not pinned: its copy to a GPU is waited for."""
    parts, to = [small_batch(), small_batch(seed=1)], Batch.to
    moved, given, told = list[int](), list[Batch](), list[Batch]()

    def counted(batch: Batch, device: Any) -> Batch:
        moved.append(len(batch.keys))
        return to(batch, device)

    def passes(engine: Any, batch: Batch, *rest: Any) -> StepOutput:
        given.append(batch)
        return StepOutput(torch.zeros(()), {})

    monkeypatch.setattr(Batch, "to", counted)
    monkeypatch.setattr("medvlp.training.trainer.exact_passes", passes)
    trainer: Any = object.__new__(Trainer)
    sizes = SimpleNamespace(accumulation=2)
    trainer.engine = SimpleNamespace(sizes=sizes, device=torch.device("meta"), step=lambda: None)
    trainer.batches = on_device(iter(parts), trainer.engine.device)
    trainer.watchdog = SimpleNamespace(mark=lambda *told: None)
    trainer.callbacks = [SimpleNamespace(on_micro_batch=lambda batch, *rest: told.append(batch))]
    trainer.guard, trainer.refresh, trainer.step = None, None, 0
    trainer._exact_passes()
    assert moved == [len(part.keys) for part in parts]
    assert given[0].image.device.type == "meta"
    assert given[0].keys == told[0].keys
    assert told[0].image.device.type == "cpu"
    assert len(told[0].image) == sum(moved)


class Waits(NamedTuple):
    """Of one step: how often it waited where, the terms it had, whether it changed the weights."""

    places: Counter[str]
    terms: set[str]
    applied: bool


class Listener(Callback):
    """Remembers what every step did."""

    name = "listener"

    def __init__(self, waits: HostWaits) -> None:
        self.waits = waits
        self.steps: list[Waits] = []

    def on_step(self, record: StepRecord) -> None:
        places = Counter(wait.split()[-1] for wait in self.waits.found)
        self.steps.append(Waits(places, set(record.losses), record.applied))
        self.waits.found.clear()


def steps_of(
    name: str, folder: Path, precision: Precision, stage: int, steps: int, accumulation: int = 1
) -> list[Waits]:
    """Steps of which nobody reads the metrics, and a logged one at the end, by the trainer on the CPU."""
    device = distributed.initialize()
    config = small_config(name)
    config.precision, config.zero.stage = precision, stage
    method, batch = built(config), small_batch()
    config.train.global_batch = accumulation * len(batch.keys)
    config.train.micro_batch = len(batch.keys)
    with fp16_on_cpu() if precision == "fp16" else contextlib.nullcontext():
        engine = Engine(method, config, divide_batch(config, 1), device)
        if engine.loss_scale is not None:
            engine.loss_scale.load_state_dict({"cur_scale": 256.0})  # small enough for every step to be made
        schedule = Schedule(np.full(steps, 1e-4), np.zeros(steps, dtype=np.int64))
        guard = StepGuard(method, 8.0, device)
        with HostWaits() as waits:
            monitor = Monitor(folder / "metrics.jsonl", steps, None, None)
            listener = Listener(waits)
            callbacks = [BadSteps(guard, 3, folder, monitor.add), monitor, listener]
            idle: Any = SimpleNamespace(**dict.fromkeys(
                ("mark", "first_step_is_done", "last_step_is_done"), lambda *told: None
            ))  # fmt: skip
            batches = itertools.repeat(batch)
            trainer = Trainer(engine, batches, schedule, steps, callbacks, guard, idle, log_every=steps)
            trainer.train(Interrupts())
        engine.close()
    return listener.steps


#: Where a step may wait: for the gradient's norm, by which DeepSpeed decides whether it counts.
_NORM = "engine.py:step"


@pytest.mark.dist
@pytest.mark.parametrize("name", names())
def test_a_whole_step_waits_for_the_norm_alone_and_measures_nothing_unasked(
    name: str, gloo_pool: Pools, tmp_path: Path
) -> None:
    [steps] = gloo_pool(1).run(steps_of, name, tmp_path, "bf16", 1, 3)
    for step in steps[:2]:
        assert step.places == {_NORM: 1}
        assert not [term for term in step.terms if "retrieval/" in term or "accuracy" in term]
    assert steps[2].places["engine.py:gradient_norm"] == 1
    if name != "medslip":  # it embeds no reports
        # Those of a combination bear the name of their part.
        terms = {term[term.find("retrieval/") :] for term in steps[2].terms}
        assert {"retrieval/top1", "retrieval/top5"} <= terms


#: Waits of a step by precision and stage; all are for the norm, and all but the first DeepSpeed's. Where it
#: waits twice it asks apart whether a gradient overflowed; at stage 0 also for the norm of two groups.
_COUNTS: dict[Precision, tuple[int, int, int, int]] = {
    "fp32": (1, 1, 1, 1),
    "bf16": (6, 1, 2, 1),
    "fp16": (6, 2, 2, 2),
}


@pytest.mark.dist
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", _COUNTS)
def test_waits_of_a_step_are_few_and_for_the_norm_in_every_precision_at_every_stage(
    precision: Precision, stage: int, gloo_pool: Pools, tmp_path: Path
) -> None:
    # In the first two steps of stage 3 DeepSpeed learns the order in which weights are used.
    [steps] = gloo_pool(1).run(steps_of, "mgca", tmp_path, precision, stage, 5)
    for step in steps[2:4]:
        assert step.applied
        assert step.places.keys() <= {_NORM, "engine.py:_prepare_plain_step", "engine.py:_any_not_finite"}
        assert step.places.total() == _COUNTS[precision][stage]


@pytest.mark.dist
def test_stage_three_knows_the_order_of_weights_in_every_pass_of_exact_accumulation(
    gloo_pool: Pools, tmp_path: Path
) -> None:
    """Else it compares orders between ranks in each step, and fetches no weights ahead."""
    [steps] = gloo_pool(1).run(steps_of, "mgca", tmp_path, "bf16", 3, 6, 2)
    # The loss's pass, the only one that comes once a step, is known after its second.
    for step in steps[3:5]:
        assert step.places == {_NORM: 1}
