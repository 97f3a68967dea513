"""Steps with `train.compile` beside the same steps without it.

    python tests/benchmarks/compiled_steps.py [--steps 16] [--rounds 2]

`medvlp pretrain` on one rank and one thread: the demo's MGCA with a ViT-Ti of 224-pixel images (196 patches,
12 blocks) and a BERT of 4 blocks, batches of 8. Both take turns; each counts with the least of its rounds'
medians, so compiling itself, in the first steps, does not count. Exits with 1 if compiled steps take longer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.bare_deepspeed import ours
from tests.benchmarks.data_path import build_dataset
from tests.distributed_pool import GlooPool

NETWORK = [
    "image.name=vit_tiny_patch16_224", "image.options={}", "data.image_size=224", "data.pad_multiple=32",
    "text.options={hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 1024}",
    "train.global_batch=8", "train.micro_batch=8", "method.batch_norm=local",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    pool = GlooPool(1, timeout=1800)
    taken: dict[str, list[float]] = {"false": [], "true": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        build_dataset(root, 8 * options.steps * 3 // 2)
        for _ in range(options.rounds):
            for compiled, seconds in taken.items():
                more = [*NETWORK, f"train.compile={compiled}"]
                seconds.append(median(pool.run(ours, root, 0, options.steps, more)[0]))
    pool.close()
    plain, compiled = (min(seconds) for seconds in taken.values())
    print(f"plain {plain:.3f} s a step, compiled {compiled:.3f}: {plain / compiled:.2f} times its speed")
    return 0 if compiled <= plain else 1


if __name__ == "__main__":
    sys.exit(main())
