"""A step of the whole trainer beside a bare DeepSpeed loop on the same network and the same batches.

    python tests/benchmarks/bare_deepspeed.py [--steps 30] [--rounds 2] [--stages 0 1 2 3]

The demo's MGCA on one rank and one thread. The rival: `deepspeed.initialize` with the same JSON, then
forward, backward, step, on batches that lie in memory. Ours is `medvlp pretrain` as a user runs it: it reads
and decodes (`data.workers=1`), guards, agrees and logs every step. Both take turns; each counts with the
least of its rounds' medians. Exits with 1 if ours takes more than 1.05 times as long.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

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


def ours(root: Path, stage: int, steps: int, more: Sequence[str] = ()) -> float:
    """Median seconds from the begin of one step to that of the next; `more` as in `load`."""
    from medvlp.training.pretrain import Pretraining
    from medvlp.training.run import train
    from medvlp.training.trainer import Trainer

    moments: list[float] = []
    step = Trainer._train_step

    def timed(trainer: Trainer) -> Any:
        moments.append(time.perf_counter())
        return step(trainer)

    Trainer._train_step = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(Pretraining(load(root, Path(folder) / "run", stage, steps, more)))
    finally:
        Trainer._train_step = step  # type: ignore[method-assign]
    return median(after - before for before, after in pairwise(moments[WARM:]))


def rival(root: Path, stage: int, steps: int) -> float:
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
    moments = []
    for batch in batches:
        moments.append(time.perf_counter())
        engine.backward(engine(batch, None).loss)
        engine.step()
    engine.destroy()
    return median(after - before for before, after in pairwise(moments[WARM:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    options = parser.parse_args()
    good, pool = True, GlooPool(1, timeout=900)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        build_dataset(root, 48 * options.steps * 3 // 2)
        for stage in options.stages:
            taken: dict[Any, list[float]] = {rival: [], ours: []}
            for _ in range(options.rounds):
                for side, seconds in taken.items():
                    seconds += pool.run(side, root, stage, options.steps)
            bare, whole = (min(seconds) for seconds in taken.values())
            good = good and whole / bare <= FARTHEST
            print(
                f"ZeRO {stage}: DeepSpeed {bare:.3f} s a step, ours {whole:.3f}: {whole / bare:.2f}",
                flush=True,
            )
    pool.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
