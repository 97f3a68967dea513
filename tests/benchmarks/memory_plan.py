"""What `medvlp config --plan` says of a step's memory, against what torch gives out in real ones.

    python tests/benchmarks/memory_plan.py [--rows 2 4]

MGCA with a ViT-B/16 at 224 pixels, a 12-layer BERT of 768 and 112 tokens, in float32 on the CPU, whose
allocator keeps a record without a GPU: forward and backward pass of a few samples. Exits with 1 if plan and
measurement are more than 15 % apart. Does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from medvlp import config_files
from medvlp.data.batch_sizes import BatchSizes
from medvlp.methods.registry import schemas
from medvlp.training.memory_plan import GIB, plan_memory
from tests.methods.small_medslip import tokenizer
from tests.training.test_memory_plan import allocated_peak

CONFIG = Path(__file__).resolve().parents[2] / "configs/methods/mgca.yaml"
FARTHEST = 0.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    overrides = ["data.root=x", "run.dir=x", "precision=fp32", "image.pretrained=false", "text.name=null"]
    overrides += ["zero.stage=0"]  # DeepSpeed has no part in what is measured
    config = config_files.load([str(CONFIG)], overrides, schemas())
    plan = plan_memory(config, BatchSizes(1, 1, 1, 1), 80 * GIB, tokenizer(), device="cpu")
    each = plan.passes.whole.per_sample / 2**20
    print(f"{plan.parameters / 1e6:.0f} M parameters, {each:.1f} MiB a sample planned")
    good = True
    for rows in options.rows:
        planned = plan.total(rows) - plan.states
        measured = allocated_peak(config, rows)
        good = good and abs(planned / measured - 1) <= FARTHEST
        print(f"{rows} samples: planned {planned / GIB:.3f} GiB, measured {measured / GIB:.3f}: "
              f"{planned / measured:.3f}")  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
