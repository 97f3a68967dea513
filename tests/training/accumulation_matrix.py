"""Exact accumulation of every method at every stage of ZeRO, in every precision, on 1, 2 and 4 ranks.

    python -m tests.training.accumulation_matrix [--method mgca ...] [--ranks 2 ...] [--precision fp32 ...]

A number is how far the gradient of a step of 16 samples in micro-batches is from that without a second pass:
with dropout on and on as many ranks, and in float32 without dropout also from that of one rank. Exits with 1
if one is off by more than `accumulating.GOALS` allow. `make test` runs a selection (test_accumulation.py).
"""

from __future__ import annotations

import argparse
import sys
from functools import cache

from rich.console import Console
from rich.table import Table

from tests.distributed_pool import GlooPool
from tests.methods.small import names
from tests.training.accumulating import GOAL_OF_RANKS, GOALS, MICRO, References

STAGES = range(4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", choices=names())
    parser.add_argument("--ranks", action="append", type=int, choices=[*MICRO])
    parser.add_argument("--precision", action="append", choices=[*GOALS])
    options = parser.parse_args()
    console = Console(width=120)
    table = Table("ranks", "method", "precision", *(f"ZeRO {stage}" for stage in STAGES), "goal")
    pools = cache(GlooPool)
    references, reached = References(pools), True

    def row(ranks: int, name: str, kind: str, errors: list[float], goal: float) -> bool:
        cells = [f"{error:.1e}" for error in errors]
        console.log(ranks, name, kind, *cells)
        table.add_row(str(ranks), name, kind, *cells, f"{goal:g}")
        return max(errors) <= goal

    for ranks in options.ranks or MICRO:
        for name in options.method or names():
            for precision in options.precision or GOALS:
                errors = [references.error(name, ranks, precision, stage) for stage in STAGES]
                reached &= row(ranks, name, precision, errors, GOALS[precision])
            if ranks > 1 and "fp32" in (options.precision or GOALS):
                errors = [references.error_of_ranks(name, ranks, stage) for stage in STAGES]
                reached &= row(ranks, name, "fp32, one rank", errors, GOAL_OF_RANKS)
        pools(ranks).close()
    console.print(table)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
