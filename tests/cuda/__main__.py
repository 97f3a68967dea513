"""`python -m tests.cuda`: check a GPU machine, measure it, and leave one JSON of each."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cuda.place import Place
from tests.cuda.plan import CHECKS, FIGURES
from tests.cuda.runner import run_checks

REPOSITORY = Path(__file__).resolve().parents[2]


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
        for name, plan, seconds in (
            ("checks", CHECKS, arguments.seconds),
            ("figures", FIGURES, arguments.figures),
        ):
            if seconds <= 0:
                continue
            place = Place(arguments.dry, str(Path(scratch) / name), str(data))
            wanted = [check for check in plan if not arguments.only or check.name in arguments.only]
            report = arguments.out / f"{name}.json"
            report.with_suffix(".log").unlink(missing_ok=True)
            results = run_checks(wanted, place, report, seconds)
            passed = sum(result.outcome == "passed" for result in results)
            print(f"{passed} of {len(results)} {name}: {report}", flush=True)
            good = good and passed == len(results)
    return 0 if good else 1


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
    parser.add_argument("--seconds", type=float, default=300.0, help="for all checks together; 0: no checks")
    parser.add_argument("--figures", type=float, default=200.0, help="seconds for all figures; 0: none")
    parser.add_argument("--only", nargs="*", help="names of checks; default: all")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
