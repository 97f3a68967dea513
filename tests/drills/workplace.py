"""Where the drills work: a small dataset, the config of a run of seconds, and what runs are held against."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.manifest import step_folder
from tests.drills.outcomes import DrillError, expect
from tests.drills.process import Pretraining, medvlp, read_lines

STUDIES, BATCH, STEPS, SAVE_EVERY = 96, 8, 24, 3

#: The wide initialisation keeps an untrained text encoder's outputs apart, see tests/training/runs.py.
_MODEL = [
    "text.options={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
    "initializer_range: 0.2}",
    "method.name=mgca", "method.prototypes=8", "method.embedding=16", "method.head_hidden=32",
    "data.image_size=32", "data.max_tokens=24", "data.workers=0", "train.threads=1", "precision=fp32",
    "optimizer.lr=1e-4", "monitor.wandb=disabled", "monitor.progress=false", "monitor.log_samples=true",
]  # fmt: skip

#: Two epochs of two ranks with dropout, batch norm of each rank's own, and a checkpoint every three steps.
RUN = [
    *_MODEL, "image.name=test_resnet", "method.batch_norm=local", "text.dropout=0.1",
    f"train.global_batch={BATCH}", f"train.steps={STEPS}", f"checkpoint.every_steps={SAVE_EVERY}",
]  # fmt: skip

#: Divides over 1, 2 and 3 ranks, and its loss does not depend on them: no dropout, norms over all samples.
ELASTIC_RUN = [
    *_MODEL, "image.name=test_vit", "text.dropout=0", "train.global_batch=12", "train.steps=32",
    "checkpoint.every_steps=4",
]  # fmt: skip


@dataclass
class Finished:
    """What a finished run is compared by."""

    weights: bytes
    losses: list[float]
    samples: list[list[str]]


class Workplace:
    """Folders of the drills below one folder, which is emptied first.

    Args:
        folder: everything is made below it; what an earlier drill left there is deleted.
        seed: of all that is random.

    Attributes:
        whole: the uninterrupted run all others are compared with; `whole_folder` keeps all its checkpoints.
        start_seconds: what it took from its start to its first step.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder.resolve(), seed
        marker = self.folder / ".drill"
        if self.folder.exists() and any(self.folder.iterdir()) and not marker.exists():
            raise DrillError(f"{self.folder} holds something else; give an empty folder or a new one")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        marker.touch()
        self.data = self.folder / "shards"
        built = medvlp(
            "shards", "build", "phantom", "--out", str(self.data), "--studies", str(STUDIES), "--image-size",
            "32", "--seed", str(seed), "--workers", "1", "--split", "train=1",
        )  # fmt: skip
        if built.returncode:
            raise DrillError(f"no dataset: {built.stderr}")
        self.whole_folder = self.folder / "whole"
        self.start_seconds = 0.0

    def train_whole(self) -> None:
        """Train the uninterrupted run."""
        with self.start(self.whole_folder, "checkpoint.keep_last=0") as run:
            run.wait_for_step(1)
            self.start_seconds = time.monotonic() - run.started
            run.finish()
        self.whole = finished(self.whole_folder)
        check_epochs(self.whole_folder, STUDIES, BATCH)

    def start(self, folder: Path, *more: str, prefix: tuple[str, ...] = (), **variables: str) -> Pretraining:
        """Start the run all drills but the elastic one make, in `folder`."""
        return Pretraining(folder, [*RUN, f"data.root={self.data}", *more], 2, prefix, variables)

    def resume_and_compare(self, folder: Path, *more: str) -> None:
        """Start it again as a user would; it must end like the uninterrupted run.

        Raises:
            DrillError: it does not.
        """
        with self.start(folder, *more) as run:
            run.finish()
        self.compare(folder)

    def compare(self, folder: Path) -> None:
        """Hold a finished run against the uninterrupted one: same bits, same samples.

        Raises:
            DrillError: what differs first.
        """
        own = finished(folder)
        expect(own.losses == self.whole.losses, _first_difference(own.losses, self.whole.losses))
        expect(own.weights == self.whole.weights, f"{folder.name}: the final weights differ")
        expect(own.samples == self.whole.samples, f"{folder.name}: other samples, or another order")
        check_epochs(folder, STUDIES, BATCH)


def finished(folder: Path) -> Finished:
    """Read a finished run.

    Raises:
        DrillError: it is not finished.
    """
    newest = Checkpoint.find(folder)
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    expect(steps == list(range(1, len(steps) + 1)), f"{folder.name}: metrics.jsonl has steps {steps}")
    if newest is None or newest.name != step_folder(len(steps)):
        raise DrillError(f"{folder.name}: {len(steps)} steps, but the newest checkpoint is {newest}")
    samples = [
        [key for keys in line["keys"] for key in keys] for line in read_lines(folder / "samples.jsonl")
    ]
    expect(len(samples) == len(steps), f"{folder.name}: {len(samples)} lines of samples, {len(steps)} steps")
    return Finished(newest.weights.read_bytes(), [line["loss"] for line in lines], samples)


def check_epochs(folder: Path, samples: int, batch: int) -> None:
    """Count in samples.jsonl that every epoch has each sample exactly once.

    Raises:
        DrillError: it has not.
    """
    epochs: dict[int, list[str]] = {}
    for line in read_lines(folder / "samples.jsonl"):
        epochs.setdefault(line["epoch"], []).extend(key for keys in line["keys"] for key in keys)
    for epoch, keys in epochs.items():
        expect(
            len(keys) == len(set(keys)) == samples // batch * batch,
            f"{folder.name}: epoch {epoch} has {len(keys)} samples, {len(set(keys))} different ones",
        )


def _first_difference(one: list[float], other: list[float]) -> str:
    step = next((i + 1 for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    return f"the losses differ from step {step} on ({len(one)} and {len(other)} steps)"
