"""What is run in which order, and how long each part may take on one H100."""

from __future__ import annotations

from tests.cuda.runner import Check

#: Together within 300 s. What needs more than a GPU that works comes later, what compiles comes last.
CHECKS = (
    Check("environment", "tests.cuda.machine:environment", 30),
    Check("group", "tests.cuda.steps:group", 20),
    Check("agreement", "tests.cuda.steps:agreement", 40),
    Check("precisions", "tests.cuda.steps:precisions", 60),
    Check("methods", "tests.cuda.steps:methods", 70),
    Check("guard", "tests.cuda.steps:guard", 20),
    Check("checkpoint", "tests.cuda.runs:checkpoint", 45),
    Check("resume", "tests.cuda.runs:resume", 60),
    Check("interrupt", "tests.cuda.runs:interrupt", 40),
    Check("staging", "tests.cuda.clusters:staging", 20),
    Check("assignment", "tests.cuda.clusters:assignment", 30),
    Check("worker", "tests.cuda.clusters:worker", 45),
    Check("two ranks", "tests.cuda.ranks:two_ranks", 60),
    Check("compile", "tests.cuda.compilers:blocks", 60),
    Check("offload", "tests.cuda.compilers:offload", 60),
)

#: Together within 200 s, on the machine that has just run the checks.
FIGURES = (
    Check("matrices", "tests.cuda.figures:matrices", 15),
    Check("throughput", "tests.cuda.figures:throughput", 70),
    Check("kernels", "tests.cuda.figures:kernels", 40),
    Check("variants", "tests.cuda.variants:variants", 60),
    Check("loader", "tests.cuda.figures:loader", 40),
    Check("losses", "tests.cuda.heads:losses", 20),
    Check("float32", "tests.cuda.figures:float32", 40),
    Check("compiled", "tests.cuda.variants:compiled", 75),
)
