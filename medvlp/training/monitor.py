"""Metrics of a run: reduced over ranks, then to the console, `metrics.jsonl` and W&B."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medvlp import distributed
from medvlp.data.batch import Batch
from medvlp.methods.base import StepOutput, is_metric
from medvlp.runs.manifest import VALIDATION_PREFIX
from medvlp.runs.metrics_file import MetricsFile, last_lines
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.operations import StepWork
from medvlp.training.wandb_run import WandbRun

logger = logging.getLogger(__name__)

GIB = 2**30
#: Lines before a checkpoint that W&B is told again when a run goes on from it.
LOGGED_AGAIN = 1000


class Monitor(Callback):
    """Reads, reduces and writes the metrics of logged steps.

    Losses, `grad_norm`, `lr` and `tflop` (10^12 operations of the step on all GPUs) are those of the logged
    step; `samples_per_second`, `step_seconds`, `data_wait` (share of the time spent waiting for data) and
    `mfu` (share of the GPUs' peak arithmetic) cover all steps since the last logged one. `memory_gib` and
    `memory_reserved_gib` are the greatest so far of all ranks.

    Args:
        path: of `metrics.jsonl`.
        total_steps: steps of the run.
        wandb_run: where rank 0 sends metrics; None on other ranks.
        console: of the progress bar; None for none.
        work: what `tflop` and `mfu` are counted by; None: they are left out.

    Attributes:
        latest: finite metrics of the last logged step, the same on all ranks.
        latest_step: that step.
    """

    name = "monitor"

    def __init__(
        self,
        path: Path,
        total_steps: int,
        wandb_run: WandbRun | None,
        console: Console | None,
        work: StepWork | None = None,
    ):
        self.path = path
        self.work = work
        self.total_steps = total_steps
        self.wandb_run = wandb_run
        self.extra: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.latest_step = 0
        self.skipped = 0
        self._file: MetricsFile | None = None
        self._progress = _progress_bar(console) if console is not None else None
        self._bar: Any = None
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._data_seconds, self._samples = 0.0, 0.0, 0
        self._step, self._step_flop, self._flop = -1, 0.0, 0.0

    def add(self, metrics: dict[str, float]) -> None:
        """Metrics, equal on all ranks, that join the next logged line."""
        self.extra |= metrics

    def on_start(self, step: int) -> None:
        """Cut lines of steps that will be done again; start the bar.

        W&B writes what it is told every 15 s, so a lost machine takes steps with it that a checkpoint has:
        the last lines before the checkpoint are logged again, and W&B leaves out the steps that it has.
        """
        if distributed.is_main():
            self._file = MetricsFile(self.path, step)
            if self.wandb_run is not None and step > 0:
                for line in last_lines(self.path, LOGGED_AGAIN):
                    self.wandb_run.log(line, line["step"])
        if self._progress is not None:
            self._progress.start()
            self._bar = self._progress.add_task("training", total=self.total_steps, completed=step)

    def on_micro_batch(self, batch: Batch, output: StepOutput, step: int) -> None:
        """Sum up operations, which follow from the shapes."""
        if self.work is None:
            return
        if step != self._step:
            self._step, self._step_flop = step, 0.0
        flop = self.work.of(batch, step)
        self._step_flop += flop
        self._flop += flop

    def on_step(self, record: StepRecord) -> None:
        """Sum up times; at logged steps read, reduce and write."""
        self._seconds += record.seconds
        self._data_seconds += record.data_seconds
        self._samples += record.samples
        self.skipped += record.skipped
        if self._progress is not None:
            self._progress.update(self._bar, completed=record.step)
        if record.logged or record.last:
            self._write(record, self._reduce(record))
            self._clear()

    def metrics_of(self, step: int) -> dict[str, float]:
        """What a checkpoint of a step is known by: `latest`, without a validation of other weights."""
        if step == self.latest_step:
            return self.latest
        return {name: value for name, value in self.latest.items() if not name.startswith(VALIDATION_PREFIX)}

    def _reduce(self, record: StepRecord) -> dict[str, float | None]:
        """All metrics of this step; all ranks call this together and get the same."""
        terms = sorted(record.losses)
        read = torch.stack([record.losses[term].float() for term in terms]).tolist()
        of_terms, of_rank = _means(
            dict(zip(terms, read, strict=True)),
            [self._seconds, self._data_seconds, float(self.skipped), self._step_flop, self._flop],
        )
        seconds, data_seconds, skipped, step_flop, flop = of_rank
        memory, reserved = distributed.greatest_over_ranks(_memory(record.engine.device))
        values = {
            "loss": of_terms["loss"],
            **{
                term if "/" in term else f"loss/{term}": mean
                for term, mean in of_terms.items()
                if term != "loss"
            },
            "lr": record.learning_rate,
            "grad_norm": record.engine.gradient_norm(),
            "samples_per_second": self._samples / seconds,
            "step_seconds": seconds * record.samples / self._samples,
            "data_wait": data_seconds / seconds,
            **self._arithmetic(step_flop, flop / seconds),
            "memory_gib": memory / GIB,
            **({"memory_reserved_gib": reserved / GIB} if record.engine.device.type == "cuda" else {}),
            "skipped_samples": round(skipped * distributed.world_size()),
            **self.extra,
        }
        self.extra = {}
        self.latest_step = record.step
        self.latest = {name: value for name, value in values.items() if math.isfinite(value)}
        finite = {name: self.latest.get(name) for name in values}
        return {"step": record.step, "epoch": record.epoch, **finite}

    def _arithmetic(self, step_flop: float, speed: float) -> dict[str, float]:
        """Of operations of a rank in the step, and a second of all steps since the last logged one."""
        if self.work is None:
            return {}
        return {"tflop": step_flop * distributed.world_size() / 1e12, "mfu": speed / self.work.peak}

    def _write(self, record: StepRecord, metrics: dict[str, float | None]) -> None:
        if self._file is None:
            return
        self._file.write(metrics)
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, record.step)
        logger.info(
            "step %d/%d epoch %d loss %.4f lr %.2e grad %s %.1f samples/s data wait %.0f%%%s",
            record.step,
            self.total_steps,
            record.epoch,
            metrics["loss"] if metrics["loss"] is not None else math.nan,
            record.learning_rate,
            "-" if metrics["grad_norm"] is None else f"{metrics['grad_norm']:.3g}",
            metrics["samples_per_second"],
            100 * (metrics["data_wait"] or 0.0),
            "" if (mfu := metrics.get("mfu")) is None else f" mfu {100 * mfu:.1f}%",
        )

    def on_end(self) -> None:
        """Close the bar, the file and the W&B run."""
        if self._progress is not None:
            self._progress.stop()
        try:
            if self._file is not None:
                self._file.close()
        finally:
            if self.wandb_run is not None:
                self.wandb_run.finish()

    def state_dict(self) -> dict[str, Any]:
        """Samples skipped so far on this rank, and metrics not yet logged."""
        return {"skipped": self.skipped, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.skipped = state.get("skipped", 0)
        self.extra = dict(state.get("extra", {}))

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Rank 0 goes on counting for all ranks."""
        self.load_state_dict(states[0])
        self.skipped = sum(state.get("skipped", 0) for state in states) if distributed.is_main() else 0


def _means(terms: dict[str, float], others: list[float]) -> tuple[dict[str, float], list[float]]:
    """Means over ranks, of the terms over those that have them."""
    there = [not (is_metric(term) and math.isnan(value)) for term, value in terms.items()]
    read = [value if here else 0.0 for value, here in zip(terms.values(), there, strict=True)]
    count, means = len(terms), distributed.mean_over_ranks([*read, *map(float, there), *others])
    shares = means[count : 2 * count]
    of_terms = [mean / share if share else math.nan for mean, share in zip(means, shares, strict=False)]
    return dict(zip(terms, of_terms, strict=True)), means[2 * count :]


def _memory(device: torch.device) -> list[float]:
    """Bytes: peaks of what CUDA's allocator gave out and holds, or what this process has on a CPU (and 0)."""
    if device.type == "cuda":
        return [float(torch.cuda.max_memory_allocated(device)), float(torch.cuda.max_memory_reserved(device))]
    return [float(psutil.Process().memory_info().rss), 0.0]


def _progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


class SampleLog(Callback):
    """Writes {"step", "epoch", "keys": [keys of rank 0, of rank 1, ...]} for each step, each step once.

    Costs a gathering of the keys over ranks in every step, so it is off unless `monitor.log_samples` asks.
    It must stand before the checkpoint among the callbacks: then a saved step has its line.

    Args:
        path: of `samples.jsonl`.
        noted: what else each rank tells of itself in each step, by name: lists of one value for each rank.
    """

    name = "sample_log"

    def __init__(self, path: Path, noted: Mapping[str, Callable[[], Any]] | None = None):
        self.path = path
        self.noted = noted or {}
        self._file: MetricsFile | None = None

    def on_start(self, step: int) -> None:
        """Cut lines of steps that will be done again."""
        if distributed.is_main():
            self._file = MetricsFile(self.path, step)

    def on_step(self, record: StepRecord) -> None:
        """Write the line of this step; all ranks call this together.

        Raises:
            RunFolderError: the disk refused.
        """
        told = distributed.gather_objects([record.keys, *(look() for look in self.noted.values())])
        if self._file is not None:
            columns = dict(zip(["keys", *self.noted], map(list, zip(*told, strict=True)), strict=True))
            self._file.write({"step": record.step, "epoch": record.epoch, **columns})

    def on_end(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
