"""Figures of one GPU: how fast MGCA's published networks train, where the time goes, what memory it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.data.batch_sizes import divide_batch
from medvlp.losses.matching import match
from medvlp.losses.sinkhorn import sinkhorn
from medvlp.methods.instance_contrast import instance_contrast
from medvlp.methods.registry import schemas
from medvlp.training.device_memory import DeviceMemoryError
from medvlp.training.engine import Engine, choose_kernels
from tests.cuda.place import Place, free_memory
from tests.cuda.runner import Note
from tests.methods.small import built, small_config

#: Steps before the clock starts, and those it times; on a dry run.
WARM_UP, TIMED = 3, 10
DRY_STEPS = (1, 1)
#: Batches of each data worker while the clock runs.
ROUNDS = 3


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
                           "intermediate_size": 3072, "vocab_size": 28996}  # fmt: skip
    return config


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


def _engine(place: Place, precision: str, stage: int, rows: int) -> tuple[Engine, Config]:
    free_memory(place.device)
    config = published(place.dry)
    config.precision, config.zero.stage = precision, stage  # type: ignore[assignment]
    config.train.global_batch = rows
    engine = Engine(built(config), config, divide_batch(config, 1), place.join())
    engine.objective.train()
    return engine, config


def _step(engine: Engine, batch: Batch) -> None:
    engine.set_learning_rate(1e-6)
    engine.backward(engine.forward(batch).loss)
    engine.step()


def _measure(action: Callable[[], Any], place: Place) -> Speed:
    """Mean seconds of an action after some that do not count."""
    cuda = place.device.type == "cuda"
    warm_up, timed = DRY_STEPS if place.dry else (WARM_UP, TIMED)
    for _ in range(warm_up):
        action()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(timed):
        action()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / timed
    if not cuda:
        return Speed(seconds, 0, 0)
    return Speed(seconds, torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20)


def throughput(place: Place, note: Note) -> None:
    """Samples a second in bf16 at ZeRO-1 by micro-batch, and the floating-point operations of a sample."""
    sizes = [4, 8] if place.dry else [64, 128, 256, 512]
    engine, config = _engine(place, "bf16", 1, sizes[0])
    with FlopCounterMode(display=False) as counter:
        _step(engine, random_batch(config, sizes[0], engine.device))
    flops = counter.get_total_flops() / sizes[0]
    note("gflop_per_sample", flops / 1e9)
    for rows in sizes:
        found = _measure_if_it_fits(place, engine, config, rows)
        if found is None:
            note(f"micro-batch {rows}", "out of memory")
            break
        speed = rows / found.seconds
        note(
            f"micro-batch {rows}",
            found._asdict() | {"samples_per_second": speed, "tflop_per_second": flops * speed / 1e12},
        )
    engine.close()


def _measure_if_it_fits(place: Place, engine: Engine, config: Config, rows: int) -> Speed | None:
    """Of steps of a micro-batch; None where the GPU has too little memory for one."""
    try:
        batch = random_batch(config, rows, engine.device)
        return _measure(lambda: _step(engine, batch), place)
    except (torch.OutOfMemoryError, DeviceMemoryError):
        return None


def kernels(place: Place, note: Note) -> None:
    """What three steps spend on the GPU, kernel by kernel, and for how long it idles."""
    rows, cuda = 4 if place.dry else 256, place.device.type == "cuda"
    engine, config = _engine(place, "bf16", 1, rows)
    batch = random_batch(config, rows, engine.device)
    for _ in range(1 if place.dry else WARM_UP):
        _step(engine, batch)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profile:
        started = time.perf_counter()
        for _ in range(3):
            _step(engine, batch)
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
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
        note("TF32" if tf32 else "exact", found._asdict() | {"samples_per_second": rows / found.seconds})


def _measure_float32(place: Place, rows: int, tf32: bool) -> Speed:
    """By an engine that ends with the call, as its memory must not count for the next one."""
    engine, config = _engine(place, "fp32", 0, rows)
    if not place.dry:
        choose_kernels(tf32)
    batch = random_batch(config, rows, engine.device)
    found = _measure(lambda: _step(engine, batch), place)
    engine.close()
    return found


def loader(place: Place, note: Note) -> None:
    """How many samples the data workers bring, without a network that takes them."""
    from medvlp.data.cache import open_reader
    from medvlp.data.loader import build_loader
    from medvlp.data.text import Tokenizer
    from tests.training.runs import load_config

    workers, rows = (1, 8) if place.dry else (14, 256)
    config = load_config(
        place.overrides("loader", f"data.workers={workers}", f"train.global_batch={min(rows, 16)}")
    )
    config.train.global_batch, config.data.image_size = rows, 64 if place.dry else 224
    config.data.tail = "wrap"
    reader = open_reader(config.data)
    tokenizer = Tokenizer.load(None, config.data.root)
    batches = iter(build_loader(config, reader, tokenizer, 0, 1, rows))
    note("samples_per_second", rows * batches_per_second(batches, workers))
    note("workers", workers)


def batches_per_second(batches: Iterator[Any], workers: int) -> float:
    """Of workers that all begin at once: their first batches come together, and count no time."""
    for _ in range(workers):
        next(batches)
    started = time.perf_counter()
    for _ in range(ROUNDS * workers):
        next(batches)
    return ROUNDS * workers / (time.perf_counter() - started)


def losses(place: Place, note: Note) -> None:
    """Milliseconds forward and backward of loss heads alone, and the memory they take beside their inputs."""
    free_memory(place.device)
    device, rows, candidates = place.device, 8 if place.dry else 256, 16 if place.dry else 8192
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device).requires_grad_()

    image, text, many, scores = unit(rows, 128), unit(rows, 128), unit(candidates, 128), unit(rows, 500)
    costs, valid = unit(rows, 16, 16).detach(), torch.ones(rows, 16, dtype=torch.bool, device=device)
    actions: dict[str, Callable[[], Any]] = {
        "instance contrast": lambda: instance_contrast(image, text, 0.07, "global")[0].backward(),
        f"logits of {candidates} candidates": lambda: F.cross_entropy(
            image @ many.T / 0.07, torch.arange(rows, device=device)
        ).backward(),
        "sinkhorn of 500 prototypes": lambda: sinkhorn(scores.detach()),
        "matching (waits for the host)": lambda: match(costs, valid),
    }
    for name, action in actions.items():
        given = torch.cuda.memory_allocated() >> 20 if device.type == "cuda" else 0
        found = _measure(action, place)
        note(name, {"milliseconds": 1e3 * found.seconds, "peak_mib": found.allocated - given})


def matrices(place: Place, note: Note) -> None:
    """How fast this GPU multiplies large bf16 matrices: what the figures above can be held against."""
    size = 256 if place.dry else 8192
    left, right = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    found = _measure(lambda: left @ right, place)
    note("tflop_per_second", 2 * size**3 / found.seconds / 1e12)
    note("device", torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu")
