"""Checks of what a compiler on this machine makes: blocks by torch.compile, and DeepSpeed's CPU Adam."""

from __future__ import annotations

import os
import shutil

import torch

from medvlp.data.batch_sizes import divide_batch
from medvlp.training.engine import Engine
from medvlp.training.regional_compile import compile_regions
from tests.cuda.place import Place, free_memory
from tests.cuda.runner import Note
from tests.methods.small import REPORTS, built, small_batch, small_config

#: How far losses of three steps may be apart.
ALLOWED = 5e-3


def blocks(place: Place, note: Note) -> None:
    """Compiled blocks train as those that are not; on a dry run nothing is compiled."""
    with torch.compiler.set_stance("force_eager" if place.dry else "default"):
        plain, compiled = (_losses(place, wanted, offload=False) for wanted in (False, True))
    apart = max(abs(a - b) / abs(b) for a, b in zip(compiled, plain, strict=True))
    note("losses", {"plain": plain, "compiled": compiled, "apart": apart})
    assert apart < ALLOWED, f"losses of compiled blocks are {apart:.1e} from the others"


def offload(place: Place, note: Note) -> None:
    """Adam on the CPU, which DeepSpeed compiles here, trains as Adam on the GPU."""
    compiler = os.environ.get("CXX", "c++")
    if place.dry or shutil.which(compiler) is None:
        note("left out", "a dry run" if place.dry else f"no {compiler}")
        return
    on_gpu, on_cpu = (_losses(place, False, offload=wanted) for wanted in (False, True))
    apart = max(abs(a - b) / abs(b) for a, b in zip(on_cpu, on_gpu, strict=True))
    note("losses", {"gpu": on_gpu, "cpu": on_cpu, "apart": apart})
    assert apart < ALLOWED, f"losses with the optimiser on the CPU are {apart:.1e} from the others"


def _losses(place: Place, compile_blocks: bool, offload: bool) -> list[float]:
    """Of three steps of MGCA on one batch, in exact float32 at stage 2: in bf16 the paths would part."""
    free_memory(place.device)
    config = small_config("mgca")
    config.precision, config.zero.stage, config.zero.offload_optimizer = "fp32", 2, offload
    config.train.tf32 = False
    config.train.global_batch = len(REPORTS)
    device, method = place.join(), built(config)
    if compile_blocks:
        assert compile_regions(method.to(device), device) > 0, "nothing is compiled: the log says why"
    engine = Engine(method, config, divide_batch(config, 1), device)
    engine.objective.train()
    batch, losses = small_batch().to(device, non_blocking=False), []
    for _ in range(3):
        engine.set_learning_rate(3e-3)
        loss = engine.forward(batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.close()
    return losses
