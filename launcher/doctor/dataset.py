"""A dataset can be read, and a sample of it is what its index says."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.doctor.results import Result, fail, ok

#: Shards whose hash is compared, and samples that are decoded, spread over the dataset.
SHARDS, SAMPLES = 2, 16


def check_dataset(root: str) -> Iterator[Result]:
    """Compare the hashes of `SHARDS` shards with the index, and decode `SAMPLES` images.

    Args:
        root: dataset folder or URL; of a URL only the index is read.
    """
    from shards.errors import DataError
    from shards.format import Index, hash_file, is_remote
    from shards.images import decode_image
    from shards.reader import ShardReader

    started = time.monotonic()
    try:
        index = Index.load(root)
    except DataError as error:
        yield fail("dataset", str(error), "see data.root; build one with `medvlp shards build`")
        return
    if is_remote(root):
        yield ok("dataset", f"{root}: index read, {len(index.shards)} shards (not fetched)")
        return
    choose = random.Random(index.fingerprint)
    shards = choose.sample(index.shards, min(SHARDS, len(index.shards)))
    try:
        damaged = [shard.file for shard in shards if hash_file(Path(root) / shard.file) != shard.hash]
    except OSError as error:
        yield fail("dataset", f"{root}: {error.filename}: {error.strerror}", f"medvlp shards verify {root}")
        return
    if damaged:
        yield fail(
            "dataset", f"{root}: {', '.join(damaged)}: not as the index says", f"medvlp shards verify {root}"
        )
        return
    reader = ShardReader(root)
    try:
        for split in index.splits:
            count = reader.sample_count(split)
            for position in choose.sample(range(count), min(SAMPLES // len(index.splits) + 1, count)):
                decode_image(reader.image(split, position))
    except DataError as error:
        yield fail("dataset", f"{root}: {error}", f"medvlp shards verify {root}")
        return
    finally:
        reader.close()
    seconds = time.monotonic() - started
    yield ok(
        "dataset",
        f"{root}: {index.name}, {len(index.shards)} shards; {len(shards)} compared and samples decoded "
        f"in {seconds:.1f} s",
    )
