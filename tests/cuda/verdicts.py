"""What the figures of a GPU must reach: go, no-go, or unknown where a figure is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Figures = Mapping[str, Any]

#: Names of kernels that multiply matrices or attend, in cuBLAS (nvjet on Hopper), CUTLASS, cuDNN and Triton.
_PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|splitk|flash|fmha|attention|cudnn", re.IGNORECASE)
#: Two measurements of one thing differ by about as much.
_NOISE = 0.99


def largest_other(figures: Figures) -> float:
    """Greatest share of a step of one kernel that neither multiplies matrices nor attends."""
    of_others = [milliseconds for name, milliseconds, _ in figures["kernels"] if not _PRODUCTS.search(name)]
    return max(of_others, default=0.0) / float(figures["step_milliseconds"])


def _gain(figures: Figures) -> float:
    ours, before = (
        figures[name]["samples_per_second"] for name in ("stage 1", "stage 1, DeepSpeed's timers")
    )
    return float(ours / before)


#: What is asked, the figure it is about, and whether that reaches it.
VERDICTS: tuple[tuple[str, str, Callable[[Figures], bool]], ...] = (
    (
        "1,500 samples a second at 256",
        "throughput",
        lambda found: found["micro-batch 256"]["samples_per_second"] >= 1500,
    ),
    ("no slower than with DeepSpeed's timers", "variants", lambda found: _gain(found) >= _NOISE),
    (
        "no other kernel above a tenth of a step",
        "kernels",
        lambda found: largest_other(found) <= 0.1,
    ),
    ("training from the loader at 0.95 of that without", "loader", lambda found: found["share"] >= 0.95),
)


def verdicts(figures: Mapping[str, Figures]) -> dict[str, str]:
    """Of the figures that are asked for, by the check that finds them."""
    return {text: _verdict(figures[name], reached) for text, name, reached in VERDICTS if name in figures}


def _verdict(figures: Figures, reached: Callable[[Figures], bool]) -> str:
    try:
        return "go" if reached(figures) else "no-go"
    except (KeyError, TypeError):  # not measured, or a text in its place: out of memory
        return "unknown"
