"""How much later the first training step comes in a Slurm job than in a plain local launch.

    python tests/benchmarks/slurm_overhead.py [--rounds 3]

Starts the cluster of `slurm/local-cluster` in a folder of its own. By turns, the same tiny run of two ranks
is launched as `medvlp pretrain --nproc 2`, as a job of one node with two ranks, and as a job of two nodes
with one rank each. Timed from the start of the process, or of the batch script as Slurm knows it (in whole
seconds, rounded down, so a job may look up to a second slower), to the first logged step; the least of the
rounds counts, because other work only adds. Exits with 1 if a job needs more than 10 s longer.
Two nodes share this machine's cores: their second launcher costs here what it would not on a second machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.slurm import slurm_commands

LARGEST_OVERHEAD = 10.0
CLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "local-cluster"
PROGRAM = [sys.executable, "-m", "launcher.main"]
WAIT_SECONDS = 300.0
#: A run of two steps in a fraction of a second.
TINY = [
    "data.image_size=32", "data.workers=0", "image.name=test_vit.r160_in1k", "method.name=mgca",
    "text.options={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}",
    "method.embedding=16", "method.head_hidden=32", "method.prototypes=8", "train.global_batch=16",
    "train.steps=2", "train.threads=1", "precision=fp32", "monitor.wandb=disabled", "monitor.progress=false",
]  # fmt: skip


def wait_for_first_step(run: Path) -> float:
    """Seconds since 1970 when the first logged step was there."""
    deadline = time.monotonic() + WAIT_SECONDS
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and b"\n" in metrics.read_bytes()):
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text() for path in run.glob("slurm/job-*.out"))
            raise SystemExit(f"no step in {run} within {WAIT_SECONDS:g} s\n{logs}")
        time.sleep(0.02)
    return time.time()


def time_local(run: Path, options: Sequence[str]) -> float:
    """Seconds from starting `medvlp pretrain --nproc 2` to its first step."""
    started = time.time()
    command = [*PROGRAM, "pretrain", *options, f"run.dir={run}", "--nproc", "2"]
    # A session of its own, as a job's: Linux shares a busy machine out by sessions (autogroups).
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        seconds = wait_for_first_step(run) - started
        process.wait()
    return seconds


def time_job(run: Path, options: Sequence[str], nodes: int) -> float:
    """Seconds from the start of the batch script to the first step of two ranks on so many nodes."""
    resources = [
        *("--nodes", str(nodes), "--gpus-per-node", "0", "--ranks-per-node", str(2 // nodes)),
        *("--cpus-per-task", str(4 // nodes), "--time", "10"),
    ]
    submitted = subprocess.check_output(
        [*PROGRAM, "submit", *options, f"run.dir={run}", *resources], text=True
    )
    job_id = int(submitted.split()[2].rstrip(":"))
    first = wait_for_first_step(run)
    while not slurm_commands.list_jobs([job_id])[0].is_over:
        time.sleep(0.5)
    return first - slurm_commands.list_jobs([job_id])[0].start_time


def measure(folder: Path, rounds: int) -> bool:
    """Print the table; whether both overheads are within the goal."""
    build = ["shards", "build", "phantom", "--studies", "60", "--image-size", "64", "--out"]
    subprocess.run([*PROGRAM, *build, str(folder / "data")], check=True, capture_output=True)
    options = [*TINY, f"data.root={folder / 'data'}"]
    time_local(folder / "warm-up", options)
    seconds: dict[str, list[float]] = {"local launch": [], "1 node x 2 ranks": [], "2 nodes x 1 rank": []}
    for number in range(rounds):
        seconds["local launch"].append(time_local(folder / f"local-{number}", options))
        seconds["1 node x 2 ranks"].append(time_job(folder / f"one-{number}", options, 1))
        seconds["2 nodes x 1 rank"].append(time_job(folder / f"two-{number}", options, 2))
    plain = min(seconds["local launch"])
    for name, values in seconds.items():
        every = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:18} {min(values):5.1f} s ({every}), overhead {min(values) - plain:+.1f} s")
    return all(min(values) - plain <= LARGEST_OVERHEAD for values in seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if not slurm_commands.is_installed():
        print("not measured: Slurm is not installed (slurm/local-cluster install)")
        return
    with tempfile.TemporaryDirectory(prefix="medvlp-slurm-", dir="/tmp") as name:
        os.environ["MEDVLP_SLURM_DIR"], os.environ["SLURM_CONF"] = f"{name}/s", f"{name}/s/slurm.conf"
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        signal.signal(
            signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
        )  # the cluster must end too
        subprocess.run([sys.executable, str(CLUSTER), "start", "--nodes", "2"], check=True)
        try:
            reached = measure(Path(name), rounds)
        finally:
            subprocess.run([sys.executable, str(CLUSTER), "stop"], check=True)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
