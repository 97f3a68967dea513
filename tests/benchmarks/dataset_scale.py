"""What a dataset of hospital size costs: building, a table of a million rows, merging parts, opening it.

    python tests/benchmarks/dataset_scale.py [--images 24] [--rows 1000000] [--parts 1000] [--samples 1e7]

Images are 8-bit JPEGs of 2,544 x 3,056 pixels, made here. Building runs on one core beside the usual loop of
PIL (decode, gray, resize, encode) and beside decoding alone, the floor of both. Memory is that of a process
of its own. Exits with 1 where building reaches less than 0.85 of PIL, a reader opens in more than a second or
takes more than 20 bytes a sample of its own, or memory grows with the table by more than 100 bytes a row.
"""

import argparse
import dataclasses
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from rich.console import Console
from rich.table import Table

from shards.build import BuildOptions, build_shards
from shards.format import INDEX_NAME, Index, Shard, SplitTotals, fingerprint, hash_bytes
from shards.merge import merge
from shards.plan import Part
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.shard_index import ShardIndex
from shards.sources.phantom import PhantomSource
from shards.sources.table import TableSource

WIDTH, HEIGHT, SIZE, QUALITY = 2544, 3056, 256, 90
SAMPLES_PER_SHARD = 10_000
MAP = "image: image\npatient_id: patient\nreport: report\nlabels: [edema]\n"
#: The studies of MIMIC-CXR and CheXpert are fewer.
PLANNED = 400_000


def alone(action: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(action, arguments)


def private_bytes() -> int:
    """Memory that only this process holds; pages of mapped files, which all share, are not counted."""
    return 1024 * int(re.search(r"^Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])  # type: ignore[index]


def write_films(folder: Path, count: int) -> list[bytes]:
    """Smooth films with noise, as detectors give them, in folder/images and folder/films.csv."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = ["image,patient,report,edema"]
    films = []
    for number in range(count):
        smooth = cv2.resize(
            random.integers(0, 256, (24, 20), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
        )
        noisy = np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
        films.append(simplejpeg.encode_jpeg(noisy[:, :, None], quality=95, colorspace="GRAY"))
        (folder / "images" / f"{number}.jpg").write_bytes(films[-1])
        rows.append(f"{number}.jpg,p{number},No edema is seen in the lungs of this film.,0")
    (folder / "films.csv").write_text("\n".join(rows) + "\n")
    (folder / "map.yaml").write_text(MAP)
    return films


def build_speed(folder: Path, films: list[bytes]) -> tuple[float, float, float]:
    """Images a second on one core: ours with everything a build does, PIL, decoding alone."""
    cv2.setNumThreads(1)
    source = TableSource(folder / "films.csv", folder / "images", folder / "map.yaml")
    options = BuildOptions(image=StoredImage(SIZE, "jpg", QUALITY))
    started = time.perf_counter()
    build_shards(source, folder / "built", options, 1, Part(0, 1))
    ours = len(films) / (time.perf_counter() - started)
    started = time.perf_counter()
    for film in films:
        image = (
            Image.open(io.BytesIO(film))
            .convert("L")
            .resize((SIZE * WIDTH // HEIGHT, SIZE), Image.Resampling.BOX)
        )
        image.save(io.BytesIO(), "JPEG", quality=QUALITY)
    pil = len(films) / (time.perf_counter() - started)
    started = time.perf_counter()
    for film in films:
        simplejpeg.decode_jpeg(film, colorspace="GRAY")
    return ours, pil, len(films) / (time.perf_counter() - started)


def table_memory(folder: Path, rows: int) -> tuple[int, float]:
    """Bytes that opening a table of `rows` takes, and seconds."""
    table = folder / f"{rows}.csv"
    with table.open("w") as file:
        file.write("image,patient,report,edema\n")
        for number in range(rows):
            file.write(
                f"{number}.jpg,p{number // 3},Film {number}: heart and lungs are as they were before.,1\n"
            )
    before, started = private_bytes(), time.perf_counter()
    source = TableSource(table, folder / "images", folder / "map.yaml")
    seconds = time.perf_counter() - started
    assert len(source) == rows
    return private_bytes() - before, seconds


def merge_seconds(folder: Path, parts: int) -> float:
    """Seconds to complete a dataset that was built in `parts` parts of two studies."""
    source = PhantomSource(studies=2 * parts, image_size=32, seed=0)
    options = BuildOptions(image=StoredImage(32), records_per_shard=2, fractions={"train": 1.0})
    build_shards(source, folder / "parts", options, os.cpu_count() or 1, Part(0, 1))
    started = time.perf_counter()
    merge(folder / "parts")
    return time.perf_counter() - started


def write_many_samples(folder: Path, samples: int) -> None:
    """An index of many shards, all links to one sparse tar; only what opening reads is there."""
    (folder / "many").mkdir()
    member, tail = 20_480, 10_240
    plan = [
        (f"{row:08d}-0", {"jpg": (1024 + row * member, 15_000), "json": (17_408 + row * member, 2_000)})
        for row in range(SAMPLES_PER_SHARD)
    ]
    data = ShardIndex.from_members(plan).to_bytes()
    (folder / "one.idx").write_bytes(data)
    with (folder / "one.tar").open("wb") as file:
        file.truncate(SAMPLES_PER_SHARD * member + tail)
    shards = []
    for number in range(samples // SAMPLES_PER_SHARD):
        name = f"train-{number:06d}"
        for ending in ("idx", "tar"):
            os.link(folder / f"one.{ending}", folder / "many" / f"{name}.{ending}")
        size = SAMPLES_PER_SHARD * member + tail
        shards.append(
            Shard(f"{name}.tar", "train", SAMPLES_PER_SHARD, size, "xxh3:" + "0" * 32, hash_bytes(data))
        )
    built = Index.load(folder / "parts")
    totals = SplitTotals(
        samples, samples // 2, samples // 2, len(shards), sum(shard.bytes for shard in shards)
    )
    index = dataclasses.replace(
        built, splits={"train": totals}, shards=shards, fingerprint=fingerprint(shards), tokenizer=None
    )
    (folder / "many" / INDEX_NAME).write_bytes(index.to_json())


def open_many(folder: Path, samples: int) -> tuple[float, float, int]:
    """Seconds to open and find one sample, seconds to visit every shard, bytes of its own afterwards."""
    before, started = private_bytes(), time.perf_counter()
    reader = ShardReader(folder / "many")
    reader.key("train", samples // 2)
    opened = time.perf_counter() - started
    for position in range(0, samples, SAMPLES_PER_SHARD):
        reader.key("train", position)
    return opened, time.perf_counter() - started, private_bytes() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--parts", type=int, default=1_000)
    parser.add_argument("--samples", type=lambda text: int(float(text)), default=10_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, pil, floor = build_speed(folder, write_films(folder, options.images))
        few, _ = alone(table_memory, folder, options.rows // 100)
        many, seconds = alone(table_memory, folder, options.rows)
        growth = (many - few) / (options.rows - options.rows // 100)
        merging = merge_seconds(folder, options.parts)
        write_many_samples(folder, options.samples)
        opened, visited, held = alone(open_many, folder, options.samples)
    table = Table("what", "measured")
    table.add_row(
        f"building from {WIDTH} x {HEIGHT} JPEG to {SIZE} pixels, images/s on one core",
        f"{ours:.1f}; PIL {pil:.1f} ({ours / pil:.2f} times); decoding {floor:.1f} ({ours / floor:.0%})",
    )
    table.add_row(f"{PLANNED:,} such images on 16 cores", f"{PLANNED / ours / 16 / 3600:.1f} h")
    table.add_row(
        f"opening a table of {options.rows:,} rows",
        f"{seconds:.0f} s, {many / 1e6:.0f} MB, {growth:.0f} bytes a row",
    )
    table.add_row(f"merging {options.parts:,} parts", f"{merging:.1f} s")
    table.add_row(
        f"opening {options.samples:,} samples",
        f"{opened:.2f} s; every shard visited {visited:.1f} s, {held / options.samples:.1f} bytes a sample",
    )
    Console(width=130).print(table)
    good = ours > 0.85 * pil and opened < 1.0 and held < 20 * options.samples and growth < 100
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
