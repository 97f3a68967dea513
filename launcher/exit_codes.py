"""What the exit code of a rank, a run or a job says, in words."""

from __future__ import annotations

import signal

#: Codes of `medvlp pretrain` (see medvlp/training/README.md) and of the other commands (launcher/README.md).
MEANINGS = {
    0: "finished",
    1: "unexpected error",
    2: "wrong command line or config",
    3: "data",
    4: "checkpoint or run folder",
    5: "too many bad steps in a row",
    6: "lost another rank",
    7: "a rank did not arrive in time",
    8: "Slurm refused or did not answer",
    9: "the doctor found what a run would not survive",
    10: "the doctor found bad nodes",
    11: "the prototype server refused or did not answer",
    75: "interrupted after a checkpoint",
}


def meaning(code: int) -> str:
    """`7` -> "a rank did not arrive in time"; `137` -> "killed by SIGKILL"; `99` -> "exit code 99"."""
    if code in MEANINGS:
        return MEANINGS[code]
    if code > 128:
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:
            return f"exit code {code}"
    return f"exit code {code}"
