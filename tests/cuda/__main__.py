"""`python -m tests.cuda`: check a GPU machine, measure it, and leave one JSON of each."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.cuda.place import Place
from tests.cuda.plan import CHECKS, CHECKS_SECONDS, FIGURES, FIGURES_SECONDS
from tests.cuda.runner import NOT_RUN, Check, run_checks
from tests.cuda.verdicts import verdicts

REPOSITORY = Path(__file__).resolve().parents[2]
#: What a check may take on a dry run: a cluster worker, which is nice, gets little of a busy core.
DRY_SECONDS = 600.0


def main() -> int:
    """Run what was asked for; 0 when every check passed."""
    arguments = _arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    if arguments.dry:
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments.out.mkdir(parents=True, exist_ok=True)
    good = True
    with tempfile.TemporaryDirectory(prefix="medvlp-cuda-") as scratch:
        data = arguments.data or _build_phantoms(Path(scratch) / "data")
        place = Place(arguments.dry, scratch, str(data))
        for plans, seconds in _calls(arguments):
            results = run_checks(plans, place, seconds)
            passed = sum(result.outcome == "passed" for result in results)
            judged = {} if place.dry else verdicts({result.name: result.figures for result in results})
            for text, verdict in judged.items():
                print(f"{verdict:8} {text}")
            late = ", ".join(result.name for result in results if result.outcome == NOT_RUN)
            print(f"{passed} of {len(results)}: {', '.join(map(str, plans))}", flush=True)
            if late:
                print(f"not run, for lack of time: {late}", flush=True)
            good = good and passed == len(results)
    return 0 if good else 1


def _calls(arguments: argparse.Namespace) -> list[tuple[dict[Path, list[Check]], float]]:
    """Plans by report, and the seconds for them; each call has a process, whose memory is its own."""
    calls: list[tuple[dict[Path, list[Check]], float]] = []
    for name, plan, seconds in (
        ("checks", CHECKS, arguments.seconds),
        ("figures", FIGURES, arguments.figures),
    ):
        wanted = [check for check in plan if not arguments.only or check.name in arguments.only]
        if seconds > 0 and wanted:
            calls.append(({arguments.out / f"{name}.json": wanted}, seconds))
    if not arguments.dry:
        return calls
    # One process: there imports take longest, and a check waits for a core as well.
    plans = {
        report: [replace(check, seconds=DRY_SECONDS) for check in plan]
        for of_call, _ in calls
        for report, plan in of_call.items()
    }
    return [(plans, DRY_SECONDS * sum(map(len, plans.values())))] if plans else []


def _build_phantoms(root: Path) -> Path:
    options = ["--studies", "80", "--image-size", "64", "--seed", "0", "--workers", "1"]
    command = [
        sys.executable,
        "-m",
        "launcher.main",
        "shards",
        "build",
        "phantom",
        "--out",
        str(root),
        *options,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return root


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checks.json and figures.json")
    parser.add_argument("--dry", action="store_true", help="the same checks at toy size on the CPU")
    parser.add_argument("--data", type=Path, help="folder of phantom shards; default: made here")
    for option, seconds, what in (
        ("--seconds", CHECKS_SECONDS, "all checks together; 0: no checks"),
        ("--figures", FIGURES_SECONDS, "all figures together; 0: none"),
    ):
        parser.add_argument(option, type=float, default=seconds, help=f"seconds for {what}")
    parser.add_argument("--only", nargs="*", help="names of checks; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
