"""Whether a change of the code changed what training computes: losses and final weights, bit for bit.

    python -m tests.drills.bit_identity run --tree /path/to/old/checkout --out /tmp/old
    python -m tests.drills.bit_identity run --out /tmp/new --shards /tmp/old/shards
    python -m tests.drills.bit_identity compare /tmp/old/results.json /tmp/new/results.json
    python -m tests.drills.bit_identity run --out /tmp/mixed --shards /tmp/old/shards --continue /tmp/old
    python -m tests.drills.bit_identity compare /tmp/old/results.json /tmp/mixed/results.json

`run` trains every method and one run of the prototype service through `medvlp pretrain` of the tree it is
given: 2 ranks, 20 steps, which lose everything after the checkpoint of step 10 and are started again. It
writes metrics of every step as hexadecimal floats and a digest of every final tensor by name. `--continue`
makes only the second half, from the checkpoints another tree has left. `compare` prints a table and ends with
code 1 if anything differs. Five minutes on two cores, all of it imports; compare runs of one machine only,
because another CPU rounds otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[2]
STUDIES, BATCH, STEPS, LOST_AFTER, RANKS = 64, 8, 20, 10, 2
#: Longest time of one command, in seconds.
PATIENCE = 600

#: The wide initialisation keeps an untrained text encoder's outputs apart, see tests/training/runs.py.
COMMON = [
    "text.options={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
    "initializer_range: 0.2}",
    "text.dropout=0.1", "image.name=test_vit.r160_in1k", "data.image_size=32", "data.max_tokens=24",
    "data.workers=0", "train.threads=1", "precision=fp32", "monitor.wandb=disabled",
    "monitor.progress=false", f"train.global_batch={BATCH}", f"checkpoint.every_steps={LOST_AFTER}",
    "checkpoint.keep_last=0",
]  # fmt: skip
LENGTH = [f"train.steps={STEPS}", "optimizer.lr=1e-3"]
MGCA = ["method.name=mgca", "method.prototypes=8", "method.embedding=16", "method.head_hidden=32"]
#: The prototype service in the ranks, with a refresh on both sides of the loss and before it.
SERVICE = ["prototypes.sync=true", "prototypes.refresh_steps=4", "prototypes.bank_rows=64"]
MASKS = [
    *SERVICE,
    "prototypes.false_negatives=mask",
    "prototypes.false_negatives_by=clusters",
    "prototypes.clusters=4",
]
REVIVAL = ["prototypes.init=kmeans", "prototypes.init_samples=32", "prototypes.revive_below=0.5"]

CASES = {
    "mgca": [*LENGTH, *MGCA, *REVIVAL, "prototypes.refresh_steps=4", "zero.stage=2"],
    # One phase a stage: 4, 4 and 12 steps.
    "prior": [
        "method.name=prior", "method.embedding=16", "method.pool_heads=2", "method.prototypes=8",
        "method.queries=4", "method.decoder_layers=1", "method.decoder_heads=2", "method.decoder_hidden=16",
        "method.image_decoder_width=16", "method.bank_schedule=exponential", *REVIVAL, *MASKS,
        "optimizer.phases=[{epochs: 0.5, lr: 1e-3}, {epochs: 0.5, lr: 1e-3}, {epochs: 1.5, lr: 1e-3}]",
    ],
    "medslip": [
        *LENGTH, "method.name=medslip", "method.width=16", "method.layers=1", "method.heads=2",
        "text.frozen=true", "zero.stage=1", "precision=bf16",
    ],
    "mpma": [
        *LENGTH, "method.name=mpma", "method.embedding=16", "method.head_hidden=32",
        "method.fusion_layers=1", "method.fusion_heads=2", "method.fusion_hidden=32",
        "method.memory_slots=4", "method.decoder_width=32", "method.decoder_layers=1",
        "method.decoder_heads=2", *MASKS,
    ],
    "place": [
        *LENGTH, "method.name=place", "method.embedding=16", "method.head_hidden=32", "method.queries=4",
        "method.query_layers=1", "method.decoder_width=32", "method.decoder_heads=2",
        "method.correlation_target=teacher", "method.teacher_momentum=0.5", "method.patch_drop=0.5",
        "method.token_weight=0.5", "zero.stage=3", *MASKS,
    ],
    "combination": [
        *LENGTH, "method.name=combination", "method.mgca.prototypes=8", "method.mgca.embedding=16",
        "method.mgca.head_hidden=32", "method.prior.stage=2", "method.prior.embedding=16",
        "method.prior.pool_heads=2", "method.prior.prototypes=8", "method.place.queries=4",
        "method.place.query_layers=1", "method.place.decoder_width=32", "method.place.decoder_heads=2",
        "method.place.embedding=16", "method.place.head_hidden=32", "method.place.patch_drop=0.5",
        "zero.stage=2", *MASKS,
    ],
    "clusters": [
        *LENGTH, *MGCA, "method.prototype_source=clusters", *SERVICE, "prototypes.balance=bias",
        "prototypes.false_negatives=mask", "prototypes.false_negatives_by=clusters",
    ],
}  # fmt: skip

#: What measures the machine: the last parts of these metrics' names begin so.
MEASURED = ("samples_per_second", "step_seconds", "seconds", "data_wait", "memory_gib")


def medvlp(tree: Path, folder: Path, *arguments: str) -> None:
    """Run a `medvlp` command of the given tree to its end, in `folder`, so that no other tree is imported."""
    environment = os.environ | {
        "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "launcher.main", *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with code {ended.returncode}:\n{ended.stderr[-2000:]}")


def train(tree: Path, out: Path, shards: Path, name: str, begun: Path | None) -> dict[str, Any]:
    """Train a case twice over, with a loss in the middle; what it came to."""
    folder = out / name
    command = [
        "pretrain", *COMMON, *CASES[name], f"data.root={shards}", f"run.dir={folder}", "--nproc", str(RANKS),
    ]  # fmt: skip
    if begun is None:
        medvlp(tree, out, *command)
        whole = results(folder)
    else:
        shutil.copytree(begun / name, folder)
        whole = None
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > LOST_AFTER:
            shutil.rmtree(checkpoint)
    medvlp(tree, out, *command)
    resumed = results(folder)
    return resumed | {"resume_changes_nothing": whole is None or whole == resumed}


def results(folder: Path) -> dict[str, Any]:
    """Metrics of every step and digests of the final weights of a finished run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        raise SystemExit(f"{folder}: metrics.jsonl has the steps {[line['step'] for line in lines]}")
    weights = {}
    file = folder / "checkpoints" / f"step-{STEPS:08d}" / "weights.safetensors"
    with safe_open(file, framework="np") as tensors:
        for name in sorted(tensors.keys()):
            value = tensors.get_tensor(name)
            described = f"{value.dtype} {value.shape} ".encode()
            weights[name] = hashlib.sha256(described + value.tobytes()).hexdigest()
    steps = [
        {key: value.hex() if isinstance(value, float) else value for key, value in line.items()}
        for line in lines
    ]
    kept = [{key: value for key, value in step.items() if not _measured(key)} for step in steps]
    return {"steps": kept, "weights": weights}


def _measured(key: str) -> bool:
    return key.startswith("checkpoint/") or key.rpartition("/")[2].startswith(MEASURED)


def run(
    tree: Path, out: Path, shards: Path | None, begun: Path | None, names: Sequence[str], parallel: int
) -> None:
    """Train the cases and write `results.json`."""
    out.mkdir(parents=True)
    if shards is None:
        shards = out / "shards"
        medvlp(
            tree, out, "shards", "build", "phantom", "--out", str(shards), "--studies", str(STUDIES),
            "--image-size", "32", "--seed", "0", "--workers", "1", "--split", "train=1",
        )  # fmt: skip
    digest = hashlib.sha256(b"".join(tar.read_bytes() for tar in sorted(shards.glob("*.tar"))))

    def timed(name: str) -> dict[str, Any]:
        started = time.monotonic()
        trained = train(tree, out, shards, name, begun)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return trained

    with ThreadPoolExecutor(parallel) as pool:
        cases = dict(zip(names, pool.map(timed, names), strict=True))
    found = {"shards": digest.hexdigest(), "cases": cases}
    (out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def compare(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Print what differs, a line for every case; whether nothing does."""
    if one["shards"] != other["shards"]:
        print("trained on different shards: give the second run the first one's --shards")
        return False
    print(f"{'case':12} {'steps':>5} {'metrics':>8} {'tensors':>8}  losses and weights")
    same = True
    for name in sorted(one["cases"].keys() | other["cases"].keys()):
        if name not in one["cases"] or name not in other["cases"]:
            verdict, counts = "only in one of the two", ("-", "-", "-")
        else:
            mine, theirs = one["cases"][name], other["cases"][name]
            verdict = _difference(mine, theirs)
            counts = (str(len(mine["steps"])), str(len(mine["steps"][-1])), str(len(mine["weights"])))
        same &= not verdict
        print(f"{name:12} {counts[0]:>5} {counts[1]:>8} {counts[2]:>8}  {verdict or 'bit-identical'}")
    return same


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs first between two results of a case; "" if nothing does."""
    if not (one["resume_changes_nothing"] and other["resume_changes_nothing"]):
        return "a resumed run does not equal the one that went through"
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"step {mine['step']}: {key} is {mine.get(key)} and {theirs.get(key)}"
    names = one["weights"].keys() | other["weights"].keys()
    differing = [name for name in sorted(names) if one["weights"].get(name) != other["weights"].get(name)]
    return f"{len(differing)} tensors differ, {differing[0]} first" if differing else ""


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train all cases")
    running.add_argument("--tree", type=Path, default=REPOSITORY, help="checkout whose code is run")
    running.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    running.add_argument("--shards", type=Path, help="dataset of an earlier run; default: built in --out")
    running.add_argument("--continue", dest="begun", type=Path, help="--out of the tree that began the runs")
    running.add_argument("--only", action="append", choices=CASES, help="cases to run; default: all")
    running.add_argument("--parallel", type=int, default=2, help="cases at a time")
    comparing = commands.add_parser("compare", help="compare two results.json")
    comparing.add_argument("results", type=Path, nargs=2)
    given = parser.parse_args()
    if given.command == "compare":
        one, other = (json.loads(file.read_text(encoding="utf-8")) for file in given.results)
        return 0 if compare(one, other) else 1
    shards, begun = (None if path is None else path.resolve() for path in (given.shards, given.begun))
    run(given.tree.resolve(), given.out.resolve(), shards, begun, given.only or list(CASES), given.parallel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
