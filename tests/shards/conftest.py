"""Small real datasets and tables for the tests of `shards`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build import BuildOptions
from shards.images import encode_jpeg
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource
from tests.shards.toy_data import MAP, Rows, build


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve random JPEGs, 0.jpg to 11.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (40, 30 + number), dtype=np.uint8)
        (folder / f"{number}.jpg").write_bytes(encode_jpeg(pixels))
    return folder


@pytest.fixture
def rows() -> Rows:
    """One good row for each image of `image_folder`, two patients to three images."""
    return [
        {
            "image": f"{n}.jpg",
            "patient": f"p{n * 2 // 3}",
            "report": f"FINDINGS: Finding {n} seen. No effusion.",
        }
        for n in range(12)
    ]


@pytest.fixture
def map_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a map; its argument is added to the three required lines."""

    def write(more: str = "") -> Path:
        path = tmp_path / "map.yaml"
        path.write_text(MAP + more)
        return path

    return write


@pytest.fixture(scope="session")
def phantom_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty phantoms of 64 pixels in small shards; tests must not change it."""
    out = tmp_path_factory.mktemp("phantom") / "dataset"
    build(PhantomSource(40, 64, 0), out, BuildOptions(image=StoredImage(size=64), records_per_shard=10))
    return out


@pytest.fixture(scope="session")
def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()
