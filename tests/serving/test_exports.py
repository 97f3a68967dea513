"""The FAISS files and the gallery: stock readers open the one, people the other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image

from medvlp.config import DataConfig
from medvlp.serving.cluster_report import Members
from medvlp.serving.gallery import write_gallery
from medvlp.serving.layout import PrototypeFilesError
from medvlp.serving.snapshot import Snapshot, export_index
from shards.errors import DataError
from shards.reader import ShardReader


def test_stock_faiss_reads_centroids_with_the_same_neighbours(snapshot: Snapshot, tmp_path: Path) -> None:
    assert export_index(snapshot, tmp_path / "centroids.faiss") == 8
    index = faiss.read_index(str(tmp_path / "centroids.faiss"))
    rows = snapshot.image.float()
    cosines, found = index.search(rows.numpy(), 3)
    expected_cosines, expected = snapshot.table.nearest(rows, 3)
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_allclose(cosines, expected_cosines.numpy(), atol=1e-5)


@pytest.mark.parametrize("modality", ["image", "report"])
def test_stock_faiss_reads_samples_with_their_positions(
    modality: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    rows = snapshot.embeddings()[modality].float()
    assert export_index(snapshot, tmp_path / "samples.faiss", modality) == len(rows)
    index = faiss.read_index(str(tmp_path / "samples.faiss"))
    cosines, found = index.search(rows.numpy()[::-1].copy(), 1)
    np.testing.assert_allclose(cosines, 1, atol=1e-3)
    scores = rows @ rows.T
    best = snapshot.sample[scores.argmax(1)].numpy()[::-1]
    assert (found[:, 0] == best).mean() > 0.9, "equal images may stand for each other"


def test_exports_that_cannot_be(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(PrototypeFilesError, match="only image"):
        export_index(dataclasses.replace(snapshot, report=None), tmp_path / "x", "report")
    with pytest.raises(DataError):
        export_index(snapshot, tmp_path / "missing" / "x")


def test_the_gallery_shows_clusters_without_report_text(
    snapshot: Snapshot, data: Path, tmp_path: Path
) -> None:
    members = Members.of(snapshot)
    config = DataConfig(root=str(data))
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "old.png").touch()
    page = write_gallery(members, config, tmp_path, 4, 500)
    text = page.read_text()
    filled = [number for number in range(8) if members.images[number]]
    assert re.findall(r'src="(cluster-\d+\.png)"', text) == [
        f"cluster-{number:05d}.png" for number in sorted(filled, key=lambda n: -members.images[n])
    ]
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html", *(f"cluster-{number:05d}.png" for number in filled)
    }  # fmt: skip
    largest = int(members.images.argmax())
    first = snapshot.key_of(int(members.rows(largest)[0]))
    assert first in text
    with Image.open(page.parent / f"cluster-{largest:05d}.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.std() > 20, "pictures, not an empty sheet"
    reader = ShardReader(data)
    for position in range(reader.sample_count("train")):
        metadata = reader.metadata("train", position)
        for private in (metadata["patient_id"], *metadata["sentences"]):
            assert private not in text
    page = write_gallery(members, config, tmp_path, 1, 1)
    assert len(list(page.parent.glob("*.png"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_hostile_names_stay_text(snapshot: Snapshot, data: Path, tmp_path: Path) -> None:
    evil = '<script src="x">&'
    names = [evil, *snapshot.origin.label_names[1:]]
    labels = snapshot.labels.clone()
    labels[:, 0] = 1
    origin = dataclasses.replace(snapshot.origin, label_names=names, run=f"</title>{evil}")
    changed = dataclasses.replace(snapshot, origin=origin, labels=labels)
    page = write_gallery(Members.of(changed), DataConfig(root=str(data)), tmp_path, 2, 2)
    text = page.read_text()
    assert "<script" not in text
    assert text.count("</title>") == 1
    assert "&lt;script src=&quot;x&quot;&gt;&amp;" in text
    assert "default-src 'none'" in text


def test_another_dataset_is_refused(snapshot: Snapshot, data: Path, tmp_path: Path) -> None:
    origin = dataclasses.replace(snapshot.origin, data="another")
    members = Members.of(dataclasses.replace(snapshot, origin=origin))
    with pytest.raises(PrototypeFilesError, match="another dataset"):
        write_gallery(members, DataConfig(root=str(data)), tmp_path, 2, 2)
    assert not list(tmp_path.iterdir())
