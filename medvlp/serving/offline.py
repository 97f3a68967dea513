"""The answers of a server without one: from the files of a run, in this process."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from medvlp.device import device_named
from medvlp.serving.answers import Answers
from medvlp.serving.layout import SNAPSHOT, folder_of
from medvlp.serving.questions import (
    ClusterAnswer,
    ClusterSummary,
    Modality,
    NearestAnswer,
    TableAnswer,
    Wanted,
)
from medvlp.serving.run_model import RunModel, checkpoint_of
from medvlp.serving.snapshot import Snapshot


class RunFiles:
    """Has the calls of `medvlp.serving.client.PrototypeClient`; they raise RequestError.

    Args:
        run: run folder with `prototypes/`.
        device: "auto", "cpu" or "cuda", for the run's method.

    Raises:
        PrototypeFilesError: the snapshot cannot be used. (Texts and images also need its checkpoint.)
    """

    def __init__(self, run: Path, device: str = "auto") -> None:
        snapshot = Snapshot.read(folder_of(run) / SNAPSHOT)

        @cache
        def model() -> RunModel:
            return RunModel(checkpoint_of(run, snapshot.origin), device_named(device), reads_data=False)

        self._answers = Answers(snapshot, model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is held open."""

    def nearest(
        self, embeddings: Any, clusters: int = 1, samples: int = 0, of: Modality = "image"
    ) -> NearestAnswer:
        """[n, D] float16 or float32 embeddings -> their nearest clusters and samples."""
        return self._answers.nearest(embeddings, Wanted(clusters, samples, of))

    def nearest_text(
        self, texts: Sequence[str], clusters: int = 1, samples: int = 0, of: Modality = "image"
    ) -> NearestAnswer:
        """The same for texts."""
        return self._answers.nearest_text(texts, Wanted(clusters, samples, of))

    def nearest_image(
        self, files: Sequence[bytes], clusters: int = 1, samples: int = 0, of: Modality = "image"
    ) -> NearestAnswer:
        """The same for image files."""
        return self._answers.nearest_image(files, Wanted(clusters, samples, of))

    def all_clusters(self) -> Iterator[ClusterSummary]:
        """Every cluster."""
        return map(self._answers.summary, range(len(self._answers.snapshot.table.centroids)))

    def cluster(self, number: int) -> ClusterAnswer:
        """One cluster with its most typical samples."""
        return self._answers.cluster(number)

    def table(self) -> TableAnswer:
        """What is asked about."""
        return self._answers.table()
