"""`python -m tests.cuda.prepare`: gather in one folder what `make gpu` needs on a machine without a network.

Wheels for Linux x86-64 with CPython 3.12 and phantom shards, for a machine that has torch; see README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
#: What may travel to such a machine together, the tracked files with it.
LIMIT = 64 << 20
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def main() -> int:
    """Fill the folder; 1 when it and the tracked files are more than may travel."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.prepare", description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".gpu")
    out: Path = parser.parse_args().out
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    constraints = ["--constraint", str(REPOSITORY / ".ci" / "constraints.txt")]
    place = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for name in _PLATFORMS:
        place += ["--platform", f"{name}_x86_64"]
    names = ["--requirement", str(REPOSITORY / "tests" / "cuda" / "wheels.txt")]
    _pip("download", "--no-deps", "--dest", str(wheels), *place, *constraints, *names)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), *constraints, "deepspeed")
    if not (out / "data" / "index.json").is_file():
        options = ["--studies", "400", "--image-size", "224", "--seed", "0"]
        command = ["-m", "launcher.main", "shards", "build", "phantom", "--out", str(out / "data"), *options]
        subprocess.run([sys.executable, *command], check=True, cwd=REPOSITORY)
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], check=True, cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split("\0")
    files = [REPOSITORY / name for name in tracked if name] + [
        path for path in out.rglob("*") if path.is_file()
    ]
    size = sum(path.stat().st_size for path in files if path.is_file())
    print(f"{out}: with the tracked files {size / 2**20:.1f} of {LIMIT >> 20} MiB")
    return 0 if size <= LIMIT else 1


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
