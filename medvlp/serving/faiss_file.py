"""Clusters and samples as plain FAISS index files, which `faiss.read_index` opens without this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medvlp.losses.normalise import unit_norm
from medvlp.serving.layout import PrototypeFilesError
from medvlp.serving.snapshot import Snapshot
from shards.atomic import atomic_write


def export_index(snapshot: Snapshot, path: Path, samples: str | None = None) -> int:
    """Write an index of unit-norm float32 rows with inner product, that is, cosine.

    Args:
        snapshot: what to export.
        path: the file; replaced whole.
        samples: "image" or "report": the embeddings of the samples, each with its position in the split as
            its id; None: the centroids, with cluster numbers as ids.

    Returns:
        Number of rows.

    Raises:
        PrototypeFilesError: the snapshot holds no such embeddings.
        DataError: the file cannot be written.
    """
    import faiss

    width = snapshot.table.centroids.shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if samples is None:
        index.add(snapshot.table.centroids.float().cpu().numpy())
    else:
        rows = snapshot.embeddings().get(samples)
        if rows is None:
            known = " and ".join(snapshot.embeddings())
            raise PrototypeFilesError(f"no {samples} embeddings are stored for this run, only {known}")
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(unit_norm(rows.float()).numpy(), snapshot.sample.numpy().astype(np.int64))
    atomic_write(path, faiss.serialize_index(index).tobytes())
    return int(index.ntotal)
