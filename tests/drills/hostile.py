"""Thousands of damaged and hostile files in one process of bounded memory: refused in one line each, or read.

`python -m tests.drills.hostile --count 10000 --seed 0` on its own; `make drill` runs it too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load, save

from medvlp.config import Config
from medvlp.data.report import report_sentences
from medvlp.data.sample_store import EntityRows, SampleStore, checksum
from medvlp.data.text import Tokenizer
from medvlp.runs.errors import CheckpointError
from medvlp.runs.manifest import MANIFEST, Manifest
from medvlp.runs.state_files import StateFile
from shards.build import BuildOptions, build_shards
from shards.errors import DataError
from shards.format import INDEX_NAME, Index, hash_bytes
from shards.merge import merge
from shards.plan import Part
from shards.reader import ShardReader, scan_shard
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource
from shards.writer import Sample, write_shard
from tests.drills.outcomes import Case, expect
from tests.drills.workplace import Workplace
from tests.shards.hostile import SECRET, mutate_bytes, mutate_json, to_bytes

COUNT = 10_000
SECONDS = 300
#: Memory the process may take beyond what its libraries have mapped at the start.
MORE_BYTES = 1 << 30


class Fuzz:
    """A small dataset, sample store and checkpoint; each method damages one file of it and reads it again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = folder / "shards"
        self.root.mkdir()
        options = BuildOptions(image=StoredImage(size=16), records_per_shard=4, vocab_size=300)
        build_shards(PhantomSource(12, 32, 0), self.root, options, 1, Part(1, 1))
        merge(self.root)
        self.index = Index.load(self.root)
        self.index_json = (self.root / INDEX_NAME).read_bytes()
        self.tokenizer = Tokenizer.load(None, self.root)
        self.config = Config().data
        reader = ShardReader(self.root)
        self.samples = [reader.read("train", i) for i in range(4)]
        store = SampleStore.open_or_build(reader, "train", self.config, self.tokenizer)
        self.store, self.store_path = store.path.read_bytes(), store.path
        self.checkpoint = folder / "checkpoints" / "step-00000002"
        entry = StateFile(self.checkpoint / "weights.safetensors", {}).write()
        manifest = Manifest(2, 0, 1, 0, "fp32", 8, "", files={"weights.safetensors": entry}, format=2)
        self.manifest = manifest.to_json().encode()

    def json_or_bytes(self, data: bytes) -> bytes:
        """The JSON with a value changed, or its bytes damaged."""
        if self.random.random() < 0.7:
            return to_bytes(mutate_json(json.loads(data), self.random))
        return mutate_bytes(data, self.random)

    def dataset_index(self) -> None:
        """`index.json`, then a sample behind it."""
        path = self.root / INDEX_NAME
        path.write_bytes(self.json_or_bytes(self.index_json))
        try:
            reader = ShardReader(self.root)
            for split in reader.index.splits:
                if reader.sample_count(split):
                    reader.read(split, reader.sample_count(split) - 1)
        finally:
            path.write_bytes(self.index_json)

    def shard_index(self) -> None:
        """An `.idx` whose hash the index holds, then every sample behind it."""
        shard = self.index.split_shards("train")[0]
        path = self.root / shard.index_file
        whole = path.read_bytes()
        damaged = mutate_bytes(whole, self.random)
        changed = dataclasses.replace(shard, index_hash=hash_bytes(damaged))
        shards = [changed if other == shard else other for other in self.index.shards]
        try:
            path.write_bytes(damaged)
            (self.root / INDEX_NAME).write_bytes(dataclasses.replace(self.index, shards=shards).to_json())
            reader = ShardReader(self.root)
            for i in range(shard.samples):
                reader.read("train", i)
        finally:
            path.write_bytes(whole)
            (self.root / INDEX_NAME).write_bytes(self.index_json)

    def sample(self) -> None:
        """`<key>.json`, then everything a sample store makes of it."""
        key, image, metadata = self.random.choice(self.samples)
        whole = json.dumps(metadata).encode()
        shard = self.index.shards[0]
        with tempfile.TemporaryDirectory() as name:
            content = {"jpg": image, "json": self.json_or_bytes(whole)}
            write_shard(Path(name), shard.file, [Sample(key, content)])
            for _, _, found in scan_shard(Path(name), shard, self.index.label_names):
                sentences = report_sentences(found["sections"], self.config.sections, "none")
                self.tokenizer.encode([sentences])
                EntityRows.pack([found["entities"]])

    def checkpoint_manifest(self) -> None:
        """`manifest.json`, half of them without a checksum, then the files it names."""
        data = self.manifest
        if self.random.random() < 0.5:
            data = json.dumps(json.loads(data) | {"checksum": "", "format": 1}).encode()
        (self.checkpoint / MANIFEST).write_bytes(self.json_or_bytes(data))
        manifest = Manifest.read(self.checkpoint)
        manifest.problem(self.checkpoint, list(manifest.files))

    def sample_store(self) -> None:
        """A sample store with bytes damaged, or with values damaged and a true checksum."""
        damaged = mutate_bytes(self.store, self.random)
        if self.random.random() < 0.3:
            arrays = {name: array.copy() for name, array in load(self.store).items()}
            name = self.random.choice(list(arrays))
            values = mutate_bytes(arrays[name].tobytes(), self.random)
            itemsize = arrays[name].dtype.itemsize
            values = values[: len(values) // itemsize * itemsize]
            arrays[name] = type(arrays[name])(len(values) // itemsize, arrays[name].dtype, values).copy()
            damaged = save(arrays, metadata={"checksum": checksum(arrays)})
        path = self.store_path.with_name("damaged.safetensors")
        path.write_bytes(damaged)
        store = SampleStore(path)
        train = self.index.splits["train"].samples
        store.check(train, len(self.index.label_names), self.tokenizer.vocab_size)
        self.tokenizer.assemble(store.rows, store.unreadable, 16)
        store.entities.matrices(store.unreadable)


def run(folder: Path, count: int, seed: int) -> str:
    """Damage and read `count` files; what was seen, or `DrillError` with the first files that went wrong."""
    fuzz = Fuzz(folder, seed)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_BYTES, mapped + MORE_BYTES))
    kinds: list[Callable[[], None]] = [
        fuzz.dataset_index, fuzz.shard_index, fuzz.sample, fuzz.checkpoint_manifest, fuzz.sample_store,
    ]  # fmt: skip
    refused, wrong = Counter[str](), []
    started = time.process_time()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        try:
            kind()
        except (DataError, CheckpointError) as error:
            refused[kind.__name__] += 1
            if "\n" in str(error) or SECRET in str(error) or len(str(error)) > 1000:
                wrong.append(f"{kind.__name__} {number}: message {str(error)[:300]!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"{kind.__name__} {number}: {type(error).__name__}: {str(error)[:300]}")
    seconds = time.process_time() - started
    expect(not wrong, f"{len(wrong)} of {count}: " + "; ".join(wrong[:10]))
    expect(seconds < SECONDS, f"it took {seconds:.0f} s of one core, more than {SECONDS}")
    counts = ", ".join(f"{kind.__name__} {refused[kind.__name__]}" for kind in kinds)
    return f"{count} files in {seconds:.0f} s of one core, refused: {counts}; the others were read"


def cases(place: Workplace) -> list[Case]:
    """One case: a process of its own, for it limits its memory."""

    def fuzzed() -> str:
        command = [sys.executable, "-m", "tests.drills.hostile", "--seed", str(place.seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * SECONDS, check=False)
        expect(done.returncode == 0, done.stderr.strip()[-1000:])
        return done.stdout.strip()

    return [Case("hostile", f"{COUNT} damaged files", fuzzed)]


def main() -> None:
    """Run the fuzz in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), arguments.count, arguments.seed))


if __name__ == "__main__":
    main()
