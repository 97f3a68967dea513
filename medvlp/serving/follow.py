"""What a server answers from: the stored snapshot of a run, or always the newest of one that trains."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from medvlp.data.cache import open_reader
from medvlp.device import device_named
from medvlp.runs import saved_run
from medvlp.runs.manifest import MANIFEST, step_folders
from medvlp.runs.saved_run import SavedRun
from medvlp.serving.answers import Answers
from medvlp.serving.build import SnapshotOptions, make_snapshot, sole_builder, store
from medvlp.serving.layout import SNAPSHOT, DamagedFileError, PrototypeFilesError, folder_of
from medvlp.serving.limits import Limits
from medvlp.serving.run_model import RunModel, checkpoint_of
from medvlp.serving.snapshot import Origin, Snapshot
from shards.errors import MedvlpError

logger = logging.getLogger(__name__)

#: In place of a checkpoint where there is none.
_NONE = (-1, 0, 0)


class Source:
    """Reads and makes snapshots of a run.

    Args:
        run: run folder.
        options: how to build; its `source` and `out` are set here.
        limits: of the answers.
        say: receives one line of progress at a time.
    """

    def __init__(
        self, run: Path, options: SnapshotOptions, limits: Limits, say: Callable[[str], None]
    ) -> None:
        self.run, self.limits, self.say = run, limits, say
        self.folder = folder_of(run)
        # A process that serves has threads, and a data worker forked from it could find their locks taken.
        self._options = replace(options, source=run, out=None, workers=0)
        self._device = device_named(options.device)
        self._seen: tuple[int, int] | None = None
        self._newest = _NONE
        self._problem = ""

    def load(self) -> Answers:
        """Answers from the stored snapshot, which is made first where there is none.

        Raises:
            MedvlpError: it cannot be read, is not what the options ask for, or cannot be made.
        """
        if not (self.folder / SNAPSHOT).is_file():
            return self.build()
        newest, signature = self._newest_checkpoint(), self._signature()
        snapshot = Snapshot.read(self.folder / SNAPSHOT)
        source = checkpoint_of(self.run, snapshot.origin)
        if differences := self._differences(snapshot, source):
            self._seen = signature  # another look at the same file would find the same
            raise PrototypeFilesError(
                f"{self.folder / SNAPSHOT} holds {'; '.join(differences)}: build it anew with these options "
                f"(medvlp prototypes build {self.run}), or serve without them"
            )
        model = RunModel(source, self._device, reads_data=False)
        self._seen = signature  # only now: what could not be read is to be tried again
        return self._answers(snapshot, model, newest)

    def build(self) -> Answers:
        """Answers from a new snapshot of the newest good checkpoint, which is stored.

        Raises:
            MedvlpError: as `medvlp.serving.build.build`.
        """
        newest = self._newest_checkpoint()
        source = saved_run.locate(self.run)
        with sole_builder(self.folder, "RUN"):
            model = RunModel(source, self._device, self._options.data)
            snapshot = make_snapshot(model, self._options, self.say)
            store(snapshot, self.folder)
            self._seen = self._signature()
        return self._answers(snapshot, model, newest)

    def newer(self) -> Answers | None:
        """Answers from something newer than the last, or None: a new checkpoint, or a file built by others.

        A checkpoint is new also where its step is not: a run that has fallen back comes to the same steps
        again, with other weights.

        Raises no MedvlpError and no OSError: what cannot be read now (a checkpoint that is being deleted, a
        run that has not begun, a file server that does not answer), or finds no room on a GPU that a training
        fills, is logged once and tried again at the next call.
        """
        try:
            if self._newest_checkpoint() not in (_NONE, self._newest):
                return self._load_or_build()
            if self._seen is not None and self._signature() not in (None, self._seen):
                return self.load()
        except torch.OutOfMemoryError:
            problem = "the GPU has no room for it: serve with --device cpu"
        except (MedvlpError, OSError) as error:
            problem = str(error)
        else:
            return None
        torch.cuda.empty_cache()  # here the error no longer holds what was built
        if problem != self._problem:
            logger.warning("not followed yet: %s", problem)
            self._problem = problem
        return None

    def _differences(self, snapshot: Snapshot, source: SavedRun) -> list[str]:
        """In what a stored snapshot is not what the options ask for; what they leave open may be anything.

        Raises:
            MedvlpError: the dataset that they name cannot be read.
        """
        asked, origin = self._options, snapshot.origin
        clusters, samples = len(snapshot.table.centroids), len(snapshot.sample)
        found = []
        if asked.split not in (None, origin.split):
            found.append(f"split {origin.split}, not {asked.split}")
        if asked.clusters is not None and (origin.source, clusters) != ("kmeans", asked.clusters):
            found.append(f"{clusters} clusters ({origin.source}), not {asked.clusters} by k-means")
        if asked.limit not in (None, origin.limit, samples) and not _all(asked.limit, origin):
            found.append(f"{samples} samples, not those of --limit {asked.limit}")
        if asked.data is not None:
            config = saved_run.load_config(source, [], asked.data)
            if open_reader(config.data).index.fingerprint != origin.data:
                found.append(f"samples of another dataset than {asked.data}")
        return found

    def _load_or_build(self) -> Answers:
        """The stored snapshot where it is of the newest checkpoint, else a new one; errors as `build`."""
        if (self.folder / SNAPSHOT).is_file():
            # Damaged, of a checkpoint that has been replaced, or made with other options: it is made anew.
            with suppress(DamagedFileError):
                stored = Snapshot.read(self.folder / SNAPSHOT)
                if stored.origin.step >= self._newest_checkpoint()[0]:
                    with suppress(PrototypeFilesError):
                        return self.load()
        return self.build()

    def _answers(self, snapshot: Snapshot, model: RunModel, newest: tuple[int, int, int]) -> Answers:
        # Not the snapshot's own step: the newest checkpoint may be a damaged one that was passed over.
        self._newest, self._problem = newest, ""
        return Answers(snapshot, lambda: model, self.limits)

    def _newest_checkpoint(self) -> tuple[int, int, int]:
        """Steps of the newest finished checkpoint, damaged or not, and which file its manifest is."""
        for step, folder in reversed(step_folders(self.run / "checkpoints")):
            with suppress(FileNotFoundError):
                status = (folder / MANIFEST).stat()
                return step, status.st_mtime_ns, status.st_ino
        return _NONE

    def _signature(self) -> tuple[int, int] | None:
        try:
            status = (self.folder / SNAPSHOT).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino


def _all(limit: int | None, origin: Origin) -> bool:
    """Whether neither this limit nor that of a snapshot leaves a sample out."""
    limits, candidates = (limit, origin.limit), origin.candidates
    return candidates is not None and all(of is not None and (of == 0 or of >= candidates) for of in limits)
