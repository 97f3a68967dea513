"""Figures of one GPU: how fast MGCA's published networks train, where the time goes, what memory it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.batch_sizes import divide_batch
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.training.device_memory import DeviceMemoryError
from medvlp.training.engine import Engine, choose_kernels
from medvlp.training.operations import peak_tflops
from tests.cuda.place import Place, free_memory
from tests.cuda.runner import Note
from tests.methods.small import small_config

#: Steps before the clock starts, and those it times; on a dry run.
WARM_UP, TIMED = 3, 10
DRY_STEPS = (1, 1)
VOCABULARY = 28_996
#: Batches of the loader that are timed; on a dry run. As many steps are timed as each worker makes `ROUNDS`.
BATCHES, DRY_BATCHES, ROUNDS = 200, 4, 3


class Speed(NamedTuple):
    """Seconds of a step, and the peak of allocated and reserved memory in MiB (0 on a CPU)."""

    seconds: float
    allocated: int
    reserved: int


def published(dry: bool) -> Config:
    """MGCA with ViT-B/16 at 224 px and BERT-base at 112 tokens; toy networks on a dry run."""
    if dry:
        return small_config("mgca")
    config = Config()
    config.method = schemas()["mgca"](name="mgca")
    config.image.name = "vit_base_patch16_224"
    config.text.options = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                           "intermediate_size": 3072}  # fmt: skip
    return config


def networks(config: Config) -> Method:
    """Those of a config, for the words of Bio_ClinicalBERT: shards have fewer."""
    torch.manual_seed(0)
    return build_method(config, VOCABULARY)


def random_batch(config: Config, rows: int, device: torch.device) -> Batch:
    """Images and reports of full length, on the device."""
    generator = torch.Generator().manual_seed(0)
    size, length = config.data.image_size, config.data.max_tokens
    image = torch.randint(0, 256, (rows, 1, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    words = torch.arange(length).expand(rows, length).contiguous()
    sentences = (words // 16).where((words > 0) & (words < length - 1), -1)
    text = Text(ids, torch.ones_like(ids), words, sentences)
    labels = torch.full((rows, 3), torch.nan)
    return Batch(image, text, torch.arange(rows), labels, [str(row) for row in range(rows)]).to(device)


def make_engine(
    place: Place,
    precision: str,
    stage: int,
    rows: int,
    deepspeed: dict[str, Any] | None = None,
    prepare: Callable[[Method, torch.device], Any] | None = None,
) -> tuple[Engine, Config]:
    """An engine of the published networks, and their config.

    Args:
        place, precision, stage: where and how. rows: of a micro-batch.
        deepspeed: keys over ours. prepare: is given the networks, on the device, before DeepSpeed.
    """
    free_memory(place.device)
    config = published(place.dry)
    config.precision, config.zero.stage = precision, stage  # type: ignore[assignment]
    config.train.global_batch, config.deepspeed = rows, deepspeed or {}
    device, method = place.join(), networks(config)
    if prepare is not None:
        prepare(method.to(device), device)
    engine = Engine(method, config, divide_batch(config, 1), device)
    engine.objective.train()
    return engine, config


def train_once(engine: Engine, batch: Batch) -> None:
    """One step of one micro-batch."""
    engine.set_learning_rate(1e-6)
    engine.backward(engine.forward(batch).loss)
    engine.step()


def measure(action: Callable[[], Any], place: Place, steps: tuple[int, int] | None = None) -> Speed:
    """Mean seconds of an action after some that do not count; `steps`: how many of either."""
    cuda = place.device.type == "cuda"
    warm_up, timed = steps or (DRY_STEPS if place.dry else (WARM_UP, TIMED))
    for _ in range(warm_up):
        action()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(timed):
        action()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / timed
    if not cuda:
        return Speed(seconds, 0, 0)
    return Speed(seconds, torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20)


def speeds(found: Speed, rows: int, flop: float = 0.0, peak: float | None = None) -> dict[str, float]:
    """What a report says of a measurement.

    Args:
        found: of steps of `rows` samples. flop: operations of a sample, where they are known.
        peak: 10^12 operations a second of this GPU, where that is known.
    """
    per_second = rows / found.seconds
    told = found._asdict() | {"samples_per_second": per_second}
    if flop:
        told["tflop_per_second"] = flop * per_second / 1e12
        if peak:
            told["mfu"] = told["tflop_per_second"] / peak
    return told


def _peak(place: Place, precision: str = "bf16", tf32: bool = True) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(), precision, tf32) if place.device.type == "cuda" else None


def throughput(place: Place, note: Note) -> None:
    """Samples a second in bf16 at ZeRO-1 by micro-batch, and the floating-point operations of a sample."""
    sizes = [4, 8] if place.dry else [64, 128, 256, 512]
    engine, config = make_engine(place, "bf16", 1, sizes[0])
    with FlopCounterMode(display=False) as counter:
        train_once(engine, random_batch(config, sizes[0], engine.device))
    flops = counter.get_total_flops() / sizes[0]
    note("gflop_per_sample", flops / 1e9)
    for rows in sizes:
        found = _measure_if_it_fits(place, engine, config, rows)
        if found is None:
            note(f"micro-batch {rows}", "out of memory")
            break
        note(f"micro-batch {rows}", speeds(found, rows, flops, _peak(place)))
    engine.close()


def _measure_if_it_fits(place: Place, engine: Engine, config: Config, rows: int) -> Speed | None:
    """Of steps of a micro-batch; None where the GPU has too little memory for one."""
    try:
        batch = random_batch(config, rows, engine.device)
        return measure(lambda: train_once(engine, batch), place)
    except (torch.OutOfMemoryError, DeviceMemoryError):
        return None


def kernels(place: Place, note: Note) -> None:
    """What three steps spend on the GPU, kernel by kernel, and for how long it idles."""
    rows, cuda = 4 if place.dry else 256, place.device.type == "cuda"
    engine, config = make_engine(place, "bf16", 1, rows)
    batch = random_batch(config, rows, engine.device)
    for _ in range(1 if place.dry else WARM_UP):
        train_once(engine, batch)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profile:
        started = time.perf_counter()
        for _ in range(3):
            train_once(engine, batch)
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    note("step_milliseconds", 1e3 * wall / 3)
    note("idle_share", max(0.0, 1 - busy_seconds(on_device(profile.events(), cuda)) / wall))
    column = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = on_device(profile.key_averages(), cuda)
    found.sort(key=lambda event: getattr(event, column), reverse=True)
    note(
        "kernels",
        [[event.key[:100], getattr(event, column) / 3e3, event.count // 3] for event in found[:20]],
    )
    engine.close()


def on_device(events: Iterable[Any], cuda: bool) -> list[Any]:
    """What a profile says of the device itself: operations of the host bear their kernels' time once more."""
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return [event for event in events if event.device_type == kind and not event.is_user_annotation]


def busy_seconds(events: Iterable[Any]) -> float:
    """How long at least one of the events lasted; those of several streams overlap."""
    total, until = 0.0, -math.inf
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def float32(place: Place, note: Note) -> None:
    """fp32 with and without TF32."""
    rows = 4 if place.dry else 64
    for tf32 in (False, True):
        found = _measure_float32(place, rows, tf32)
        note("TF32" if tf32 else "exact", speeds(found, rows))


def _measure_float32(place: Place, rows: int, tf32: bool) -> Speed:
    """By an engine that ends with the call, as its memory must not count for the next one."""
    engine, config = make_engine(place, "fp32", 0, rows)
    if not place.dry:
        choose_kernels(tf32)
    batch = random_batch(config, rows, engine.device)
    found = measure(lambda: train_once(engine, batch), place)
    engine.close()
    return found


def loader(place: Place, note: Note) -> None:
    """What the data workers alone bring to the device beside what a step needs, and training from them."""
    from medvlp.data.cache import open_reader
    from medvlp.data.loader import build_loader
    from medvlp.data.text import Tokenizer
    from medvlp.training.on_device import on_device as ahead
    from tests.training.runs import load_config

    workers, rows = (1, 4) if place.dry else (14, 256)
    engine, trained = make_engine(place, "bf16", 1, rows)
    config = load_config(place.overrides("loader", f"data.workers={workers}", "train.global_batch=4"))
    config.train.global_batch, config.data.tail = rows, "wrap"
    config.data.image_size, config.data.max_tokens = trained.data.image_size, trained.data.max_tokens
    reader = open_reader(config.data)
    tokenizer = Tokenizer.load(None, config.data.root)
    note("workers", workers)

    def stream() -> Iterator[Batch]:
        return iter(build_loader(config, reader, tokenizer, 0, 1, rows))

    host = next(stream())
    batch, size = host.to(engine.device), bytes_of(host) / 1e9
    alone = measure(lambda: train_once(engine, batch), place)
    copies = measure(lambda: host.to(engine.device), place)
    # New workers, and their speed first: it leaves none of the batches that wait for the consumer.
    batches = stream()
    timed = math.ceil((DRY_BATCHES if place.dry else BATCHES) / workers) * workers
    found = batches_per_second(batches, workers, timed, engine.device)
    for name, value in {
        "batches": timed,
        "samples_per_second": rows * found,
        "gigabytes_per_second": size * found,
        "needed": {"samples_per_second": rows / alone.seconds, "gigabytes_per_second": size / alone.seconds},
        "gigabytes_per_second of a copy": size / copies.seconds,
    }.items():
        note(name, value)
    fetched = ahead(batches, engine.device)
    fed = measure(lambda: train_once(engine, next(fetched)[1]), place, (0, ROUNDS * workers))
    note("training on one batch", speeds(alone, rows))
    note("training from the loader", speeds(fed, rows))
    note("share", alone.seconds / fed.seconds)
    engine.close()


def bytes_of(batch: Batch) -> int:
    """That travel to the device."""
    sizes: list[int] = []
    batch._map(lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def batches_per_second(
    batches: Iterator[Batch], workers: int, count: int, device: torch.device | None = None
) -> float:
    """Of workers that all begin at once, with their way to the device: their first batches count no time."""
    moved: Batch | None = None
    for number in range(workers + count):
        if number == workers:
            started = time.perf_counter()
        batch = next(batches)
        if device is not None:
            moved = batch.to(device)
    if moved is not None and moved.image.is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


def matrices(place: Place, note: Note) -> None:
    """How fast this GPU multiplies large bf16 matrices: what the figures above can be held against."""
    size = 256 if place.dry else 8192
    left, right = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    found = measure(lambda: left @ right, place)
    note("tflop_per_second", 2 * size**3 / found.seconds / 1e12)
    note("device", torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu")
