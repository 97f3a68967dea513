"""Checks of what a step computes: against the CPU, over precisions and ZeRO stages, and after a bad loss."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import deepspeed
import torch

import medvlp
import medvlp.methods.place.terms
import medvlp.methods.prior.terms
from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch, join
from medvlp.data.batch_sizes import divide_batch
from medvlp.methods.base import Method, Progress
from medvlp.training.accumulation import exact_passes
from medvlp.training.engine import Engine, choose_kernels
from medvlp.training.step_guard import StepGuard
from tests.cuda.place import Place, free_memory
from tests.cuda.runner import Note
from tests.methods.small import REPORTS, built, names, small_batch, small_config

#: What the names of files begin with; a checkout, with all packages inside, may be called medvlp as well.
OURS, DEEPSPEED = (f"{Path(package.__file__).parent}/" for package in (medvlp, deepspeed))
#: Samples of a micro-batch; two of them make a step.
MICRO_BATCH = len(REPORTS)
#: Steps on one batch, on a dry run, and those of fp16 that may be skipped before them to find the loss scale.
STEPS, DRY_STEPS, SEARCH = 8, 5, 14
#: How far gradients in float32 may be apart: those of the CPU are up to 1.04e-4 from double precision (MGCA).
GRADIENTS = 3e-4
#: How far the first gradient's norm may be from that of fp32 at stage 0; on the CPU bf16 is 2e-2 off.
NORMS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 2e-1}


def group(place: Place, note: Note) -> None:
    """The process group of one rank, twice: bookkeeping, time limits, store, end."""
    for _ in range(2):
        device = distributed.initialize()
        assert device == place.device
        distributed.barrier()
        assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
        distributed.set_timeout(60)
        store = distributed.shared_store()
        store.set("key", "value")
        assert store.get("key") == b"value"
        row = torch.ones(2, 3, device=device, requires_grad=True)
        assert distributed.gather_with_gradient(row).shape == (2, 3)
        distributed.shutdown()


def agreement(place: Place, note: Note) -> None:
    """Every method in float32: terms and gradients are those of the CPU; in bf16 nearly the same loss."""
    if place.device.type == "cuda":
        choose_kernels(tf32=False)
    for name in names():
        config, batch = small_config(name), small_batch()
        expected_terms, expected = _gradients(built(config), batch)
        terms, found = _gradients(built(config).to(place.device), batch.to(place.device))
        apart = max(abs(terms[key] - value) / max(1.0, abs(value)) for key, value in expected_terms.items())
        gradient = gradients_apart(found, expected)
        half, _ = _gradients(built(config).to(place.device, torch.bfloat16), batch.to(place.device))
        half_apart = abs(half["loss"] / expected_terms["loss"] - 1)
        note(name, {"terms": apart, "gradients": gradient, "bf16": half_apart})
        assert apart < 2e-5, f"{name}: terms differ by {apart:.1e}"
        assert gradient < GRADIENTS, f"{name}: gradients differ by {gradient:.1e} of their largest entry"
        assert half_apart < 2e-2, f"{name}: the loss in bf16 is {half_apart:.1e} from that of the CPU"


def gradients_apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The greatest difference of a parameter's gradient, by that gradient's largest entry.

    At least by a hundredth of the largest of all: a bias before a batch norm, or of attention's keys, has a
    gradient of zero, and what is computed of it is rounding.
    """
    least = 0.01 * max(float(value.abs().max()) for value in expected.values())
    return max(
        float((found[name] - value).abs().max()) / max(float(value.abs().max()), least)
        for name, value in expected.items()
    )


def _gradients(method: Method, batch: Batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    method.train()
    output = method(batch)
    output.loss.backward()
    gradients = {name: p.grad.cpu() for name, p in method.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in output.named.items()}, gradients


def precisions(place: Place, note: Note) -> None:
    """All precisions and ZeRO stages: the loss falls, stages agree, nothing but the matching waits.

    The optimiser gets gradients as large as in fp32, whatever they were scaled by on their way.
    """
    kinds = ["fp32", "bf16"] if place.dry else ["fp32", "bf16", "fp16"]
    first: dict[str, float] = {}
    exact_norm = 0.0
    for precision in kinds:
        whole: list[float] = []
        for stage in _stages(place.dry, precision):
            losses, norm = _train(place, note, "mgca", precision, stage)
            whole, exact_norm = whole or losses, exact_norm or norm
            wrong = abs(norm / exact_norm - 1)
            assert wrong < NORMS[precision], f"{precision}, stage {stage}: the gradient is {wrong:.1e} off"
            # In 16 bit the paths part after a few steps.
            compared, allowed = (STEPS, 1e-3) if precision == "fp32" else (3, 3e-2)
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses[:compared], whole, strict=False))
            assert apart < allowed, f"{precision}: stage {stage} is {apart:.1e} from stage 0"
            first.setdefault(precision, losses[0])
        apart = abs(first[precision] / first["fp32"] - 1)
        assert apart < 2e-2, f"the first loss in {precision} is {apart:.1e} from that in fp32"


def _stages(dry: bool, precision: str) -> list[int]:
    if dry:
        return [0] if precision == "fp32" else [0, 1]
    return [0, 1, 2, 3]


def methods(place: Place, note: Note) -> None:
    """Every other method: bf16 at stages 2 and 3, fp16 at 2."""
    kinds = [("bf16", 2)] if place.dry else [("bf16", 2), ("bf16", 3), ("fp16", 2)]
    wrong = []
    for name in ["prior"] if place.dry else [name for name in names() if name != "mgca"]:
        for precision, stage in kinds:
            try:
                _train(place, note, name, precision, stage)
            except AssertionError as error:  # of the others something is to be known too
                wrong.append(str(error))
    assert not wrong, "; ".join(wrong)


def _train(place: Place, note: Note, name: str, precision: str, stage: int) -> tuple[list[float], float]:
    """Losses of `STEPS` steps that were made, all on one batch, and the first one's gradient norm.

    Notes figures, refuses a loss that stays.
    """
    engine, batches = _engine(place, name, precision, stage)
    guard = StepGuard(engine.objective, 0.0, engine.device)
    losses, norms, skipped = [], [], 0
    waits: list[str] = []
    while len(losses) < (DRY_STEPS if place.dry else STEPS):
        engine.objective.on_progress(Progress(0, len(losses), STEPS, 0))
        watched = waits if len(losses) in (3, 4, 5) else None
        loss = _step(engine, guard, batches, watched)
        if not engine.applied:
            skipped += 1
            assert precision == "fp16", f"{name} {precision} stage {stage}: a step was refused"
            assert skipped <= SEARCH, f"{name} fp16 stage {stage}: {skipped} steps overflowed"
            guard.undo()
            continue
        losses.append(loss)
        norms.append(engine.gradient_norm())
    engine.close()
    place_name = f"{name} {precision} stage {stage}"
    figures: dict[str, Any] = {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
        "waits": sorted(set(waits)),
    }
    if place.device.type == "cuda":
        figures["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    note(place_name, figures)
    assert has_fallen(losses), f"{place_name}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    ours = [wait for wait in waits if wait.startswith(OURS)]
    assert not ours, f"{place_name}: a step waits for the device in {ours[0]}"
    return losses, norms[0]


def has_fallen(losses: list[float]) -> bool:
    """By a seventh, in the mean of the last three: MPMA hides other words in each step, some harder ones."""
    return fmean(losses[-3:]) < 0.85 * losses[0]


def _engine(place: Place, name: str, precision: str, stage: int) -> tuple[Engine, list[Batch]]:
    free_memory(place.device)
    config: Config = small_config(name)
    config.precision, config.zero.stage = precision, stage  # type: ignore[assignment]
    config.train.tf32 = precision != "fp32"  # exact, where stages are compared to a thousandth
    config.train.global_batch, config.train.micro_batch = 2 * MICRO_BATCH, MICRO_BATCH
    engine = Engine(built(config), config, divide_batch(config, 1), place.join())
    engine.objective.train()
    return engine, [small_batch(seed=seed) for seed in (0, 1)]


def _step(engine: Engine, guard: StepGuard, batches: list[Batch], waits: list[str] | None) -> float:
    """One step as the trainer makes it, of two micro-batches; its loss."""
    engine.set_learning_rate(3e-3)
    guard.begin()
    batch = join(batches).to(engine.device, non_blocking=False)
    with _noting_waits(engine.device, waits):
        loss = exact_passes(engine, batch, None, guard).loss.detach()
    engine.step()
    return float(loss)


@contextmanager
def _noting_waits(device: torch.device, found: list[str] | None) -> Iterator[None]:
    """Collect where the host waits for the GPU; the matching of PRIOR and PLACE, which must, is left out."""
    if found is None or device.type != "cuda":
        yield
        return
    terms = (medvlp.methods.place.terms, medvlp.methods.prior.terms)
    matches = [module.match for module in terms]

    def waiting(cost: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode(0)
        try:
            return matches[0](cost, valid)
        finally:
            torch.cuda.set_sync_debug_mode(1)

    for module in terms:
        module.match = waiting
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = noting(found)
            torch.cuda.set_sync_debug_mode(1)
            yield
    finally:
        torch.cuda.set_sync_debug_mode(0)
        for module, match in zip(terms, matches, strict=True):
            module.match = match


def noting(found: list[str]) -> Callable[..., None]:
    """What Python calls with each warning: adds who waits, by the innermost line of ours or of DeepSpeed."""

    def note(message: Warning | str, *where: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            frames = reversed(traceback.extract_stack())
            places = (f"{frame.filename}:{frame.lineno}" for frame in frames)
            found.append(
                next((place for place in places if place.startswith((OURS, DEEPSPEED))), "elsewhere")
            )

    return note


def guard(place: Place, note: Note) -> None:
    """A step whose loss is NaN leaves weights and buffers bit for bit; the next one is made."""
    for precision in ["bf16"] if place.dry else ["bf16", "fp16"]:
        engine, batches = _engine(place, "mgca", precision, 2)
        step_guard = StepGuard(engine.objective, 0.0, engine.device)
        _step_that_counts(engine, step_guard, batches)
        before = {name: value.clone() for name, value in engine.full_weights().items()}
        with _poisoned(engine.objective):
            loss = _step(engine, step_guard, batches, None)
        assert loss != loss
        assert not engine.applied
        step_guard.undo()
        after = engine.full_weights()
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert not changed, f"{precision}: a refused step changed {changed[:3]}"
        if engine.loss_scale is not None:
            engine.loss_scale.restore()
        _step_that_counts(engine, step_guard, batches)
        engine.close()
        note(precision, "unchanged by a NaN")


def _step_that_counts(engine: Engine, guard: StepGuard, batches: list[Batch]) -> None:
    """One that is made: in fp16 some overflow before it, also after another at the same loss scale."""
    for _ in range(SEARCH):
        _step(engine, guard, batches, None)
        if engine.applied:
            return
        guard.undo()
    raise AssertionError(f"none of {SEARCH} steps was made")


@contextmanager
def _poisoned(method: Method) -> Iterator[None]:
    """Every forward pass of the image encoder gives NaN, as a damaged image would."""
    encoder = method.get_submodule("image_encoder")

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output * torch.nan
        return type(output)(*(v * torch.nan if isinstance(v, torch.Tensor) else v for v in output))

    handle = encoder.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()
