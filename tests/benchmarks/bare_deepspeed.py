"""A step of the whole trainer beside a bare DeepSpeed loop on the same network and the same batches.

    python tests/benchmarks/bare_deepspeed.py [--steps 65] [--stages 0 1 2 3]

The demo's MGCA on one rank and one thread. The rival: `deepspeed.initialize` with the same JSON, then
forward, backward, step, on batches that lie in memory. Ours is `medvlp pretrain` as a user runs it: it reads
and decodes (`data.workers=1`), guards, agrees and logs every step. They take turns step by step, because a
shared machine changes its speed from minute to minute: each step of ours is compared with the rival's just
before it. While one computes the other waits, but for the worker that reads ahead; what reading costs is
measured by `data_path.py`. Exits with 1 unless the whole interval of the ratio lies below 1.05.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.data_path import build_dataset
from tests.distributed_pool import GlooPool

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
FARTHEST = 1.05
#: First steps, which warm up.
WARM = 5


def load(root: Path, folder: Path, stage: int, steps: int, more: Sequence[str] = ()) -> Any:
    """The config of the demo for a few steps, with more `key=value`."""
    from medvlp import config_files
    from medvlp.evaluation import task
    from medvlp.methods.registry import schemas

    overrides = [
        f"data.root={root}", f"run.dir={folder}", f"zero.stage={stage}", f"train.steps={steps}",
        "train.threads=1", "prototypes.init=random", "checkpoint.every_steps=0", "monitor.wandb=disabled",
        "monitor.progress=false", "optimizer.lr=1e-4", *more,
    ]  # fmt: skip
    return config_files.load([str(DEMO)], overrides, schemas(), tasks=task.schemas())


class Clock:
    """Measures the steps of one side, from the begin of each to that of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began: float | None = None

    def tick(self) -> None:
        """A step begins."""
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
        self._wait()
        self._began = time.perf_counter()

    def _wait(self) -> None:
        """Nobody else is measured."""

    def stop(self) -> None:
        """There are no more steps."""


class Turns(Clock):
    """A clock that lets another process make a step between two of this one.

    Args:
        folder: holds the pipes `0` and `1`, open elsewhere and with a byte in the first.
        side: the pipe this one waits at; the other is written to when a step has ended.
    """

    def __init__(self, folder: Path, side: int):
        super().__init__()
        # Open to read and to write: neither waits until the other side opens it too.
        self._mine, self._theirs = (os.open(folder / str(pipe), os.O_RDWR) for pipe in (side, 1 - side))

    def _wait(self) -> None:
        if self._began is not None:
            os.write(self._theirs, b".")
        os.read(self._mine, 1)

    def stop(self) -> None:
        """Let the other side go on without waiting any more."""
        os.write(self._theirs, bytes(1 << 12))


def ours(
    root: Path, stage: int, steps: int, more: Sequence[str] = (), clock: Clock | None = None
) -> list[float]:
    """Seconds of each step of the whole trainer; `more` as in `load`."""
    from medvlp.training.pretrain import Pretraining
    from medvlp.training.run import train
    from medvlp.training.trainer import Trainer

    clock = clock or Clock()
    step = Trainer._train_step

    def timed(trainer: Trainer) -> Any:
        clock.tick()
        return step(trainer)

    Trainer._train_step = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(Pretraining(load(root, Path(folder) / "run", stage, steps, more)))
    finally:
        Trainer._train_step = step  # type: ignore[method-assign]
        clock.stop()
    return clock.seconds[WARM:]


def rival(root: Path, stage: int, steps: int, clock: Clock) -> list[float]:
    """The same of a bare loop."""
    import deepspeed
    import torch

    from medvlp import distributed
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.data.cache import open_reader
    from medvlp.data.loader import build_loader
    from medvlp.data.text import Tokenizer
    from medvlp.methods.registry import build_method
    from medvlp.training.deepspeed_config import deepspeed_json, parameter_groups

    torch.set_num_threads(1)
    config = load(root, root / "none", stage, steps)
    distributed.initialize()
    tokenizer, sizes = Tokenizer.load(None, root), divide_batch(config, 1)
    loader = build_loader(config, open_reader(config.data), tokenizer, 0, 1, sizes.micro_batch)
    batches = list(islice(loader, steps))
    method = build_method(config, tokenizer.vocab_size).train()
    groups, _ = parameter_groups(method, config.optimizer)
    engine, *_ = deepspeed.initialize(
        model=method,
        model_parameters=groups,
        config=deepspeed_json(config, sizes, "cpu"),
        dist_init_required=False,
    )
    try:
        for batch in batches:
            clock.tick()
            engine.backward(engine(batch, None).loss)
            engine.step()
    finally:
        clock.stop()
    engine.destroy()
    return clock.seconds[WARM:]


def in_turns(root: Path, stage: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps of both sides, which lie beside each other in time: the rival's and ours."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        pipes = []
        for name in ("0", "1"):
            os.mkfifo(Path(folder) / name)
            pipes.append(os.open(Path(folder) / name, os.O_RDWR))
        os.write(pipes[0], b".")
        pools = [GlooPool(1, timeout=1800), GlooPool(1, timeout=1800)]
        bare = threads.submit(pools[0].run, _rival_in_turns, root, stage, steps, Path(folder))
        whole = threads.submit(pools[1].run, _ours_in_turns, root, stage, steps, Path(folder))
        sides = bare.result()[0], whole.result()[0]
        for pool, pipe in zip(pools, pipes, strict=True):
            pool.close()
            os.close(pipe)
    return sides


def _rival_in_turns(root: Path, stage: int, steps: int, folder: Path) -> list[float]:
    return rival(root, stage, steps, Turns(folder, 0))


def _ours_in_turns(root: Path, stage: int, steps: int, folder: Path) -> list[float]:
    return ours(root, stage, steps, clock=Turns(folder, 1))


def interval(ratios: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Where the median lies with 95 % certainty (bootstrap over the pairs of steps)."""
    drawn = np.random.default_rng(0).choice(ratios, (draws, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=65)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    options = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        build_dataset(root, 48 * options.steps * 3 // 2)
        for stage in options.stages:
            bare, whole = in_turns(root, stage, options.steps)
            ratios = [mine / theirs for theirs, mine in zip(bare, whole, strict=True)]
            low, high = interval(ratios)
            good = good and high <= FARTHEST
            print(
                f"ZeRO {stage}: DeepSpeed {np.median(bare):.3f} s a step, ours {np.median(whole):.3f}; "
                f"ratio {np.median(ratios):.3f} ({low:.3f} to {high:.3f})",
                flush=True,
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
