"""Speed of the data path on one core, against the decoders alone and against a plain WebDataset pipeline.

    python tests/benchmarks/data_path.py [--studies 2600] [--rounds 5] [--data DIR]

Builds 256-pixel phantom shards (about 14 kB a JPEG; real radiographs at this size have 10 to 12 kB), then
runs every contender once a round, so that all meet the same machine; rates are medians over rounds, ratios
are medians of the ratios within a round. A run of our loader is five epochs from the start of its worker to
its end, as a training starts it once. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
import transformers
import webdataset
from rich.console import Console
from rich.table import Table

from medvlp.config import Config
from medvlp.data.loader import build_loader
from medvlp.data.text import Tokenizer
from shards.build import BuildOptions, build_shards
from shards.merge import merge
from shards.plan import Part
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.phantom import PhantomSource

SPLIT = "train"
BATCH = 144
CROP = 224
MAX_TOKENS = 112
EPOCHS = 5
#: Share of the fastest decoder's rate, and multiple of the plain pipeline's, that the loader must reach.
DECODE_SHARE, PLAIN_MULTIPLE = 0.60, 5.0

Contender = Callable[[], int]
DECODERS = ("simplejpeg", "cv2", "torchvision")
LOADER, WORKER, PLAIN, OPEN_CLIP = (
    "medvlp loader",
    "medvlp loader, one worker process",
    "WebDataset + PIL + ToTensor + tokenizer",
    "WebDataset + open_clip's transform + tokenizer",
)
PREAD, RAW = "medvlp, raw bytes", "WebDataset, raw bytes"


def build_dataset(folder: Path, studies: int, side: int = 256) -> None:
    """Write phantom shards of `side` pixels with as many processes as there are cores."""
    folder.mkdir(parents=True)
    options = BuildOptions(image=StoredImage(size=side))
    workers = os.cpu_count() or 1
    build_shards(PhantomSource(studies, side, 0), folder, options, workers, Part(1, 1))
    merge(folder)


def consume(items: Iterable[object]) -> int:
    """Draw everything; return the number of items."""
    return sum(1 for _ in items)


def decoder_contenders(images: list[bytes]) -> dict[str, Contender]:
    """Decode-only: the stored bytes from memory to grayscale pixels, nothing else."""
    arrays = [np.frombuffer(image, dtype=np.uint8) for image in images]
    # A copy, because torch refuses to wrap read-only memory without a warning.
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    gray = torchvision.io.ImageReadMode.GRAY
    decode_tensor = torchvision.io.decode_jpeg
    return {
        "simplejpeg": lambda: consume(simplejpeg.decode_jpeg(image, "GRAY") for image in images),
        "cv2": lambda: consume(cv2.imdecode(array, cv2.IMREAD_GRAYSCALE) for array in arrays),
        "torchvision": lambda: consume(decode_tensor(tensor, gray) for tensor in tensors),
    }


def loader_contender(root: Path, tokenizer: Tokenizer, workers: int) -> Contender:
    """Our training loader with MGCA's transform; epochs of whole batches, tokens included."""
    config = Config()
    config.data.root = str(root)
    config.data.image_size = CROP
    config.data.max_tokens = MAX_TOKENS
    config.data.workers = workers
    config.train.global_batch = BATCH

    def run() -> int:
        loader = build_loader(config, ShardReader(root), tokenizer, 0, 1, BATCH)
        batches = itertools.islice(loader, EPOCHS * loader.steps_per_epoch)
        return sum(len(batch.keys) for batch in batches)

    return run


def plain_contender(
    urls: list[str], tokenizer_folder: Path, transform: Callable[[object], torch.Tensor], decoded: str
) -> Contender:
    """What a short tutorial builds: WebDataset decodes with PIL, a transform, one tokenizer call a report."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_folder))

    def prepare(sample: tuple[object, dict[str, dict[str, str]]]) -> tuple[torch.Tensor, ...]:
        image, metadata = sample
        report = " ".join(metadata["sections"].get(name, "") for name in ("findings", "impression"))
        tokens = tokenizer(
            report, truncation=True, max_length=MAX_TOKENS, padding="max_length", return_tensors="pt"
        )
        return transform(image), tokens["input_ids"][0], tokens["attention_mask"][0]

    def run() -> int:
        samples = webdataset.WebDataset(urls, shardshuffle=False).decode(decoded).to_tuple("jpg", "json")
        return sum(len(batch[0]) for batch in samples.map(prepare).batched(BATCH))

    return run


def plain_contenders(urls: list[str], tokenizer_folder: Path, console: Console) -> dict[str, Contender]:
    """The plain pipeline, and the same with the training transform of open_clip where that is installed."""
    crop = torchvision.transforms.RandomCrop(CROP)
    transform = torchvision.transforms.Compose([crop, torchvision.transforms.ToTensor()])
    # "pill" is grayscale PIL: the plain pipeline is spared the conversion to RGB.
    contenders = {PLAIN: plain_contender(urls, tokenizer_folder, transform, "pill")}
    try:
        import open_clip
    except ImportError:
        console.print("open_clip is not installed (pip install open_clip_torch): its transform is left out")
        return contenders
    theirs = open_clip.image_transform(CROP, is_train=True)
    return contenders | {OPEN_CLIP: plain_contender(urls, tokenizer_folder, theirs, "pilrgb")}


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Samples per second of every contender in every round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()  # page cache, lazy imports
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - start))
    return rates


def ratio(rates: dict[str, list[float]], name: str, others: tuple[str, ...]) -> float:
    """Median over rounds of the rate of `name` by the best rate of `others` in the same round."""
    best = [max(values) for values in zip(*(rates[other] for other in others), strict=True)]
    return median(rate / limit for rate, limit in zip(rates[name], best, strict=True))


def report(rates: dict[str, list[float]], console: Console) -> bool:
    """Print the table; whether both targets are met."""
    table = Table("contender", "samples/s", "of the decode limit", "of the plain pipeline")
    for name in rates:
        whole = name in (LOADER, WORKER, PLAIN, OPEN_CLIP)
        table.add_row(
            name,
            f"{median(rates[name]):,.0f}",
            f"{ratio(rates, name, DECODERS):.0%}" if whole or name in DECODERS else "",
            f"{ratio(rates, name, (PLAIN,)):.1f} x" if whole else "",
        )
    console.print(table)
    share, multiple = ratio(rates, WORKER, DECODERS), ratio(rates, LOADER, (PLAIN,))
    verdicts = [
        (
            share >= DECODE_SHARE,
            f"one worker on the rank's core at {share:.0%} of the decode limit, target {DECODE_SHARE:.0%}",
        ),
        (
            multiple >= PLAIN_MULTIPLE,
            f"loader at {multiple:.1f} x the plain pipeline, target {PLAIN_MULTIPLE} x",
        ),
    ]
    for met, sentence in verdicts:
        console.print(f"{'met   ' if met else 'MISSED'}  {sentence}")
    console.print(f"raw bytes by pread: {ratio(rates, PREAD, (RAW,)):.1f} x WebDataset")
    return all(met for met, _ in verdicts)


def run(root: Path, rounds: int, console: Console) -> bool:
    """Measure the dataset at `root` on one core; whether both targets are met."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    reader = ShardReader(root)
    count = reader.sample_count(SPLIT)
    images = [reader.image(SPLIT, i) for i in range(count)]
    urls = [str(root / shard.file) for shard in reader.index.split_shards(SPLIT)]
    tokenizer = Tokenizer.load(None, root)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        contenders = {
            **decoder_contenders(images),
            LOADER: loader_contender(root, tokenizer, workers=0),
            WORKER: loader_contender(root, tokenizer, workers=1),
            **plain_contenders(urls, Path(folder), console),
            PREAD: lambda: consume(reader.image(SPLIT, i) for i in range(count)),
            RAW: lambda: consume(webdataset.WebDataset(urls, shardshuffle=False)),
        }
        size = np.mean([len(image) for image in images]) / 1000
        console.print(f"{count} samples of {size:.1f} kB, {rounds} rounds, one core")
        return report(measure(contenders, rounds), console)


def main() -> int:
    """Build or take a dataset, measure, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies", type=int, default=2600, help="phantom studies to build (about 80 %% of them train)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="measure this dataset instead of building one")
    arguments = parser.parse_args()
    console = Console(width=110)
    if arguments.data:
        return 0 if run(arguments.data, arguments.rounds, console) else 1
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_dataset(Path(folder) / "shards", arguments.studies)
        console.print(f"built {arguments.studies} studies in {time.perf_counter() - start:.0f} s")
        return 0 if run(Path(folder) / "shards", arguments.rounds, console) else 1


if __name__ == "__main__":
    sys.exit(main())
