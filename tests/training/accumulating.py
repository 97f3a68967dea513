"""Steps with exact accumulation on ranks of the gloo pool, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch, join
from medvlp.methods.base import DividedMethod, Progress
from tests.distributed_pool import GlooPool
from tests.methods.small import REPORTS, built, reordered, small_batch, small_config
from tests.methods.small_mgca import IMAGES, rows_of
from tests.training.runs import Precision
from tests.training.test_loss_scale import fp16_on_cpu

#: Samples of a step, and of a pass where so many ranks make one.
ROWS, MICRO = 16, {1: 4, 2: 4, 4: 2}
#: What a gradient may be off: by the largest entry in float32 (`largest_difference`), by the length of a part
#: of the model in 16 bit (`distance`), where the micro-batches of the reference add up in 16 bit.
GOALS: dict[Precision, float] = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-3}
#: The same in float32 between numbers of ranks. Batch norms of 16 samples magnify rounding: torch's kernel,
#: which one rank takes, is 1.7e-5 from the gradient in double precision (MGCA), the merging of ranks 1.1e-5.
GOAL_OF_RANKS = 5e-5

Arrays = dict[str, NDArray[np.float32]]


class Step(NamedTuple):
    """What a step has left: terms of this rank, all gradients (on rank 0), and this rank's buffers."""

    terms: dict[str, float]
    gradients: Arrays
    buffers: Arrays


def prepared(
    name: str,
    image: str = "vit",
    dropout: float = 0.0,
    precision: Precision = "fp32",
    frozen: bool = False,
    groups: int = 1,
) -> tuple[Config, DividedMethod]:
    """The config and the method; `dropout` is that of encoders and decoders alike."""
    config = small_config(name)
    for key, value in IMAGES[image].items():
        setattr(config.image, key, value)
    config.text.dropout, config.text.length_groups = dropout, groups
    config.image.frozen = frozen
    config.text.frozen = config.text.frozen or frozen
    if dropout:
        config.image.options = {**config.image.options, "proj_drop_rate": dropout}
    for key in ("dropout", "fusion_dropout", "decoder_dropout", "channel_dropout"):
        if dropout and hasattr(config.method, key):
            setattr(config.method, key, dropout)
    config.optimizer.name, config.optimizer.betas = "sgd", [0.0, 0.999]
    config.optimizer.weight_decay, config.precision = 0.0, precision
    # Of fp16: a loss scale that the first gradient survives.
    config.deepspeed = {"fp16": {"initial_scale_power": 2}} if precision == "fp16" else {}
    method = built(config)
    assert isinstance(method, DividedMethod)
    return config, method.train()


def samples(seed: int = 0) -> Batch:
    """All samples of a step, longer texts before shorter ones, so that sorting them moves them."""
    batch = small_batch([*REPORTS, *(report[::-1] for report in REPORTS)], seed=seed)
    return reordered(batch, torch.arange(ROWS).flip(0))


def encode_in_pieces(method: DividedMethod, rows: int) -> None:
    """Let a method encode so many samples at a time, all in one graph: with the draws of micro-batches."""
    encode = method.encode

    def in_pieces(batch: Batch) -> Any:
        pieces = [batch.rows(start, start + rows) for start in range(0, len(batch.keys), rows)]
        parts = [tree_flatten(encode(piece)) for piece in pieces]
        columns = zip(*(values for values, _ in parts), strict=True)
        joined = [torch.cat(of) if isinstance(of[0], Tensor) else of[0] for of in columns]
        return tree_unflatten(joined, parts[0][1])

    method.encode = in_pieces  # type: ignore[method-assign]


def step(
    name: str,
    stage: int,
    micro: int,
    whole: bool = False,
    deepspeed: dict[str, Any] | None = None,
    **prepare: Any,
) -> Step:
    """A step of `ROWS` samples, of which each pass on each rank has `micro`.

    Args:
        name: of the method.
        stage: of ZeRO.
        micro: samples of a pass.
        whole: the reference, without a second pass: the same micro-batches are encoded in one graph.
        deepspeed: over the config's section of that name.
        prepare: see `prepared`.
    """
    from medvlp.data.batch_sizes import divide_batch
    from medvlp.training.accumulation import exact_passes
    from medvlp.training.engine import Engine
    from medvlp.training.step_guard import StepGuard

    config, method = prepared(name, **prepare)
    device = distributed.initialize()
    rank, ranks = distributed.rank(), distributed.world_size()
    # As the loader cuts them: the k-th micro-batch of all ranks is one piece of the global batch.
    starts = range(rank * micro, ROWS, ranks * micro)
    config.zero.stage, config.train.global_batch = stage, ROWS
    config.train.micro_batch = micro * len(starts) if whole else micro
    config.deepspeed |= deepspeed or {}
    if whole:
        encode_in_pieces(method, micro)
    method.on_progress(Progress(1, 1, 4))
    with ExitStack() as stack:
        if config.precision == "fp16":
            stack.enter_context(fp16_on_cpu())
        engine = Engine(method, config, divide_batch(config, ranks), device)
        guard = StepGuard(method, 0.0, device)
        before = engine.full_weights()
        for seed, rate in (1, 0.0), (0, 1.0):  # two steps, so that gradients left by the first would show
            engine.set_learning_rate(rate)
            torch.manual_seed(3 + rank)
            guard.begin()
            parts = [rows_of(samples(seed), start, start + micro) for start in starts]
            for part in parts:
                part.text.lengths = tuple(part.text.attention_mask.sum(1).tolist())
            batch = join(parts)
            if engine.exact:
                output = exact_passes(engine, batch, None, guard)
            else:
                output = engine.forward(batch)
                engine.backward(output.loss)
            engine.step()
            assert engine.applied
            if rate == 0.0:
                guard.undo()
        after, buffers = engine.full_weights(), {n: v.clone().numpy() for n, v in engine.buffers().items()}
        assert engine._engine.micro_steps == 2 * engine.sizes.accumulation
        engine.close()
    terms = {term: value.item() for term, value in output.named.items()}
    return Step(terms, {n: (before[n] - after[n]).numpy() for n in before if n not in buffers}, buffers)


def largest_difference(found: Arrays, expected: Arrays) -> float:
    """Between entries of two gradients, as a share of the largest entry."""
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(value).max()) for value in expected.values() if value.size)
    assert largest > 0
    return max(
        float(np.abs(found[name] - value).max() / largest) for name, value in expected.items() if value.size
    )


def distance(found: Arrays, expected: Arrays) -> float:
    """Of two gradients as a share of their length: the largest among the parts of the model.

    Parts with less than a thousandth of the gradient do not count: in 16 bit they are rounding.
    """
    parts: dict[str, list[str]] = {}
    for name in expected:
        parts.setdefault(name.partition(".")[0], []).append(name)
    whole = [
        [np.concatenate([of[name].ravel() for name in names]) for of in (found, expected)]
        for names in parts.values()
    ]
    least = 1e-3 * max(float(np.linalg.norm(b)) for _, b in whole)
    norms = [(float(np.linalg.norm(a - b)), float(np.linalg.norm(b))) for a, b in whole]
    return max(error / length for error, length in norms if length > least)


class References:
    """Steps without a second pass, each made once, and how far steps with micro-batches are from them."""

    def __init__(self, pools: Callable[[int], GlooPool]) -> None:
        self._pools = pools
        self._made: dict[tuple[str, int, Precision, float], Step] = {}

    def get(self, name: str, ranks: int, precision: Precision, dropout: float) -> Step:
        """The step of a method at ZeRO stage 0, with the draws of micro-batches."""
        key = name, ranks, precision, dropout
        if key not in self._made:
            run = partial(step, name, 0, MICRO[ranks], True, precision=precision, dropout=dropout)
            self._made[key] = self._pools(ranks).run(run)[0]
        return self._made[key]

    def error(self, name: str, ranks: int, precision: Precision, stage: int) -> float:
        """Of the gradient with dropout on, against the reference on as many ranks (see `GOALS`)."""
        expected = self.get(name, ranks, precision, 0.3)
        run = partial(step, name, stage, MICRO[ranks], precision=precision, dropout=0.3)
        found = self._pools(ranks).run(run)[0]
        np.testing.assert_allclose([*found.terms.values()], [*expected.terms.values()], rtol=1e-5, atol=1e-5)
        compare = largest_difference if precision == "fp32" else distance
        return compare(found.gradients, expected.gradients)

    def error_of_ranks(self, name: str, ranks: int, stage: int) -> float:
        """Of the float32 gradient without dropout, against that of one rank (see `GOAL_OF_RANKS`)."""
        found = self._pools(ranks).run(step, name, stage, MICRO[ranks])[0]
        return largest_difference(found.gradients, self.get(name, 1, "fp32", 0.0).gradients)
