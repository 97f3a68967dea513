"""How long a save holds up the training loop, and how long a resumed run takes to its first step.

    python tests/benchmarks/checkpoint_stall.py [--rounds 5] [--depth 12] [--folder DIR]

The model is a ViT-B/16 with AdamW (about 1 GB of weights and moments in float32). Three saves of the same
bytes are timed by turns, each the least of the rounds (other work only adds): a copy in memory into buffers
that exist (the floor), an asynchronous save (what the loop waits for), and a synchronous one. Before each
the last write has ended.
Then a process is started anew: it imports, builds the model, verifies and loads the checkpoint and makes a
step. Last, seeking into the order of ten million samples. Exits with 1 if the asynchronous save stalls the
loop longer than 1.5 copies, or a seek takes a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvlp.config import Config
    from medvlp.runs.checkpoint import Checkpoint
    from medvlp.training.engine import Engine

STARTED = time.perf_counter()

LARGEST_STALL = 1.5
LONGEST_SEEK = 1.0
SAMPLES = 10_000_000


def build_config(run_dir: str, asynchronous: bool) -> Config:
    from medvlp.config import Config

    config = Config()
    config.run.dir, config.data.root = run_dir, ""
    config.train.global_batch, config.precision, config.zero.stage = 1, "fp32", 0
    config.checkpoint.keep_last, config.checkpoint.asynchronous = 1, asynchronous
    return config


def build_engine(config: Config, depth: int, checkpoint: Checkpoint | None = None) -> Engine:
    """DeepSpeed around a ViT-B as a method whose loss is the mean of its outputs."""
    import timm
    from torch import Tensor, nn

    from medvlp import distributed
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.methods.base import StepOutput
    from medvlp.training.engine import Engine

    class OneTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_encoder = timm.create_model("vit_base_patch16_224", num_classes=0, depth=depth)

        def parameters_without_decay(self) -> set[str]:
            return set()

        def forward(self, image: Tensor, clusters: None) -> StepOutput:
            return StepOutput(self.image_encoder(image).square().mean(), {}, {})

    device = distributed.initialize()
    method: Any = OneTower()
    if checkpoint is not None:
        checkpoint.weights_into(method)
    return Engine(method, config, divide_batch(config, 1), device)


def one_step(engine: Engine) -> None:
    import torch

    engine.set_learning_rate(1e-5)
    batch: Any = torch.randn(1, 3, 224, 224, device=engine.device)
    engine.backward(engine.forward(batch).loss)
    engine.step()


def measure_saves(folder: str, depth: int, rounds: int) -> tuple[dict[str, float], float]:
    """Least seconds of the three ways, and the bytes they move."""
    import torch

    from medvlp.training.checkpointing import CheckpointCallback

    engine = build_engine(build_config(folder, True), depth)
    one_step(engine)
    callbacks = {
        "asynchronous save": CheckpointCallback(build_config(folder, True), engine, []),
        "synchronous save": CheckpointCallback(build_config(folder, False), engine, []),
    }
    tensors = [value.detach() for _, value in engine.whole_parameters()]
    tensors += engine.optimizer_state()[0].values()
    buffers = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    times: dict[str, list[float]] = {"copy in memory": [], **{name: [] for name in callbacks}}
    step = 0
    for _ in range(rounds + 1):  # the first round allocates
        started = time.perf_counter()
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        times["copy in memory"].append(time.perf_counter() - started)
        for name, callback in callbacks.items():
            step += 1
            started = time.perf_counter()
            callback.save(step, 0)
            times[name].append(time.perf_counter() - started)
            callback._writer.wait()
    engine.close()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {name: min(values[1:]) for name, values in times.items()}, size


def resume(folder: str, depth: int) -> dict[str, float]:
    """Seconds of each part of a start from a checkpoint, in this fresh process."""
    marks = [STARTED]
    parts: dict[str, float] = {}

    def mark(name: str) -> None:
        marks.append(time.perf_counter())
        parts[name] = marks[-1] - marks[-2]

    import deepspeed  # noqa: F401
    import timm  # noqa: F401

    from medvlp.runs.checkpoint import Checkpoint
    from medvlp.training.checkpointing import CheckpointCallback

    mark("imports")
    newest = Checkpoint.find(folder)
    mark("verify the checkpoint")
    config = build_config(folder, True)
    engine = build_engine(config, depth, newest)
    mark("model, weights, engine")
    assert newest is not None
    CheckpointCallback(config, engine, []).load(newest)
    mark("optimiser state")
    one_step(engine)
    mark("first step")
    return parts


def seek_seconds() -> float:
    """Making the order of ten million samples in 1,000 shards and taking a batch in the middle of epoch 3."""
    from medvlp.data.order import SampleOrder

    started = time.perf_counter()
    order = SampleOrder([SAMPLES // 1000] * 1000, seed=0)
    order.batch(3 * order.steps_per_epoch(144) + 34_567, 144)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--folder", help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--resume", metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.resume:
        print(json.dumps(resume(options.resume, options.depth)))
        return 0

    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        times, size = measure_saves(folder, options.depth, options.rounds)
        command = [sys.executable, __file__, "--resume", folder, "--depth", str(options.depth)]
        started = time.perf_counter()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        total = time.perf_counter() - started
    parts = json.loads(output.splitlines()[-1])
    floor = times["copy in memory"]
    table = Table(title=f"holding up the loop: {size / 1e9:.2f} GB of weights and moments")
    for column in ("way", "seconds", "in copies"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, seconds in times.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / floor:.2f}")
    Console().print(table)
    table = Table(title="from process start to the end of the first step")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for name, seconds in {**parts, "whole process": total}.items():
        table.add_row(name, f"{seconds:.2f}")
    seek = seek_seconds()
    table.add_row(f"seek into {SAMPLES:,} samples", f"{seek:.2f}")
    Console().print(table)
    return 0 if times["asynchronous save"] <= LARGEST_STALL * floor and seek < LONGEST_SEEK else 1


if __name__ == "__main__":
    sys.exit(main())
