"""What is run in which order, and how long each part may take on one H100."""

from __future__ import annotations

from tests.cuda.runner import Check

#: Seconds for all checks, and for all figures, however they go.
CHECKS_SECONDS, FIGURES_SECONDS = 300.0, 200.0

#: What needs more than a GPU that works comes later, what compiles comes last. Boxes are for what hangs.
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

#: On the machine that has just run the checks, what matters most first. Boxes add up to the whole time, so
#: that none that hangs takes another's; what those before leave over goes to the ones after.
FIGURES = (
    Check("matrices", "tests.cuda.figures:matrices", 10),
    Check("throughput", "tests.cuda.figures:throughput", 45),
    Check("kernels", "tests.cuda.figures:kernels", 25),
    Check("loader", "tests.cuda.figures:loader", 35),
    Check("variants", "tests.cuda.variants:variants", 35),
    Check("losses", "tests.cuda.heads:losses", 10),
    Check("float32", "tests.cuda.figures:float32", 15),
    Check("compiled", "tests.cuda.variants:compiled", 25),
)
