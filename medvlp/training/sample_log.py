"""`samples.jsonl`: the sample keys of every step, for who wants to count what a run has seen."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medvlp import distributed
from medvlp.runs.metrics_file import MetricsFile
from medvlp.training.callbacks import Callback, StepRecord


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
