"""A whole run whose clusters are refreshed by a worker process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.training.runs import Overrides, read_metrics

#: Trains as the only rank, then says what it and its children are.
PROGRAM = """
import json, sys
import psutil
from tests.training.runs import train

code = train(sys.argv[1:])
children = [child.pid for child in psutil.Process().children(recursive=True)]
print(json.dumps({"code": code, "faiss": "faiss" in sys.modules, "children": children}))
"""


def test_the_worker_is_the_only_one_with_faiss_and_ends_with_the_run(
    overrides: Overrides, tmp_path: Path
) -> None:
    settings = [
        "method.prototype_source=clusters", "prototypes.sync=false", "prototypes.refresh_steps=2",
        "prototypes.stale=block", "prototypes.max_staleness=4", "train.steps=20", "monitor.log_samples=true",
        "train.global_batch=8",
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *overrides(*settings)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told == {"code": 0, "faiss": False, "children": []}
    lines = read_metrics(tmp_path / "run")
    staleness = [line["prototypes/staleness"] for line in lines]
    assert max(staleness) == 4
    versions = [line["prototypes/version"] for line in lines]
    assert versions[3:5] == [0, 1]  # training waited after the first step beyond max_staleness
    assert versions[-1] >= 3
    assert all(line["loss/prototype"] > 0 for line in lines if line["step"] > versions.index(1.0) + 1)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    used = [line["clusters"] for line in samples]
    assert used == [[0], *([int(version)] for version in versions[:-1])]  # swapped between two steps
