"""Checks of runs on a GPU: asynchronous checkpoints, resuming, other stages, and a signal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.training.checkpointing import CheckpointCallback
from medvlp.training.engine import Engine
from tests.cuda.place import Place
from tests.cuda.runner import Note
from tests.methods.small import REPORTS, built, small_batch, small_config
from tests.training.runs import read_metrics, train

#: A run of four steps on the CPU, most of it imports.
CPU_SECONDS = 120


def checkpoint(place: Place, note: Note) -> None:
    """A checkpoint holds the weights of its step, although training goes on while it is written."""
    config = small_config("mgca") if place.dry else _large_config()
    config.run.dir, config.data.root = str(place.folder("checkpoint")), ""
    config.precision, config.zero.stage, config.train.global_batch = "bf16", 2, len(REPORTS)
    config.checkpoint.keep_last = 0
    device = place.join()
    engine = Engine(built(config), config, divide_batch(config, 1), device)
    saving = CheckpointCallback(config, engine, [])
    stalls = []
    for step in (1, 2):
        _train_once(engine)
        before = engine.full_weights()
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.monotonic()
        saving.save(step, 0)
        stalls.append(time.monotonic() - started)
        _train_once(engine)  # while the thread writes
        _train_once(engine)
        saving._writer.wait()
        folder = Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"
        stored = safetensors.torch.load_file(folder / "weights.safetensors")
        wrong = [name for name, value in before.items() if not torch.equal(stored[name], value)]
        assert not wrong, f"step {step}: {wrong[:3]} are not those of the step"
        now = engine.full_weights()
        assert any(not torch.equal(stored[name], value) for name, value in now.items())
    size = sum(value.nbytes for value in before.values())
    copy = _copy_seconds(3 * size, device)  # float32 masters and two moments
    note("stall_seconds", {"first": stalls[0], "second": stalls[1], "plain_copy": copy, "bytes": 3 * size})
    engine.close()
    shutil.rmtree(config.run.dir)
    if not place.dry:
        assert stalls[1] < 3 * copy + 0.1, f"the loop stood still for {stalls[1]:.2f} s"


def _large_config() -> Config:
    """MGCA's published networks: ViT-B/16 and BERT-base, at 64 pixels to be quick."""
    config = small_config("mgca")
    config.image.name, config.image.options = "vit_base_patch16_224", {"img_size": config.data.image_size}
    config.text.options = {**config.text.options, "hidden_size": 768, "num_hidden_layers": 12,
                           "num_attention_heads": 12, "intermediate_size": 3072}  # fmt: skip
    return config


def _train_once(engine: Engine) -> None:
    engine.objective.train()
    engine.set_learning_rate(1e-3)
    output = engine.forward(small_batch().to(engine.device, non_blocking=False))
    engine.backward(output.loss)
    engine.step()


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    started = time.monotonic()
    target.copy_(source, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def resume(place: Place, note: Note) -> None:
    """A run that was killed after half its steps ends as one that was not; at another ZeRO stage too."""
    options = ["checkpoint.every_steps=2", "text.dropout=0.1", "precision=bf16", "zero.stage=2"]
    whole = Path(place.scratch) / "whole"
    place.join()
    assert train(place.overrides("whole", *options)) == 0
    other_stage = [*options[:-1], "zero.stage=3"]
    kinds: dict[str, list[str]] = {"same": options} | ({} if place.dry else {"stage 3": other_stage})
    for kind, more in kinds.items():
        run = Path(place.scratch) / kind.replace(" ", "-")
        _killed(whole, run)
        assert train(place.overrides(run.name, *more)) == 0
        _compare(note, kind, whole, run)
    _change_devices(place, note, options)


def _change_devices(place: Place, note: Note, options: list[str]) -> None:
    """Half on the CPU and half here, and the other way round; on a dry run both are the CPU."""
    steps = [*options, "text.dropout=0", "precision=fp32", "train.tf32=false"]
    scratch = Path(place.scratch)
    with _on_cpu(place, "cpu", steps) as end_of_run:
        assert train(place.overrides("gpu", *steps)) == 0
        assert end_of_run() == 0
    _killed(scratch / "gpu", scratch / "from-gpu")
    _killed(scratch / "cpu", scratch / "from-cpu")
    with _on_cpu(place, "from-gpu", steps) as end_of_run:
        assert train(place.overrides("from-cpu", *steps)) == 0
        assert end_of_run() == 0
    for device in "cpu", "gpu":
        _compare(note, f"from the {device}", scratch / device, scratch / f"from-{device}", 1e-3)


@contextmanager
def _on_cpu(place: Place, run: str, options: list[str]) -> Iterator[Callable[[], int]]:
    """A run on the CPU beside the block, in a process of its own; what is given waits for its exit code.

    On a dry run it is made when it is waited for, in this process.
    """
    overrides = place.overrides(run, *options)
    if place.dry:
        yield lambda: train(overrides)
        return
    command = [sys.executable, "-m", "launcher.main", "pretrain", *overrides]
    with subprocess.Popen(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}) as process:
        try:
            yield lambda: process.wait(CPU_SECONDS)
        finally:
            process.kill()


def _killed(whole: Path, run: Path) -> None:
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")


def _compare(note: Note, kind: str, whole: Path, run: Path, allowed: float = 1e-2) -> None:
    expected, found = ([line["loss"] for line in read_metrics(folder)] for folder in (whole, run))
    assert len(expected) == len(found) == 4
    apart = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    note(kind, {"losses": found, "expected": expected, "apart": apart, "bit_equal": found == expected})
    assert apart < allowed, f"resumed ({kind}): losses {apart:.1e} apart"


def interrupt(place: Place, note: Note) -> None:
    """SIGTERM in the middle, with data workers: exit code 75 after a checkpoint, and no process is left."""
    run = Path(place.scratch) / "interrupted"
    workers = 1 if place.dry else 8
    options = ["train.steps=100000", f"data.workers={workers}"]

    place.join()

    def interrupt_when_training() -> None:
        metrics = run / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt_when_training, daemon=True).start()
    code: Any = train(place.overrides("interrupted", *options))
    steps = len(read_metrics(run))
    note("steps", steps)
    assert code == 75
    assert (run / "checkpoints" / f"step-{steps:08d}" / "manifest.json").is_file()
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
