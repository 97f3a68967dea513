"""`train.compile`: blocks of the encoders and projection heads through torch.compile, one region at a time.

Regions and not the whole model: blocks of one kind share what is compiled, so it takes seconds and not
minutes, and losses, which gather over ranks and differ by method, stay as they are.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from medvlp.encoders.projection import ProjectionHead
from medvlp.methods.base import Objective

logger = logging.getLogger(__name__)

#: Graphs of one kind of block: lengths of reports, training and evaluation, with gradient and without. Beyond
#: these torch goes on without compiling.
_GRAPHS = 64


def compile_regions(objective: Objective, device: torch.device) -> int:
    """Compile in place, before DeepSpeed takes the objective; parameters, buffers and their names stay.

    Where this machine cannot compile (no C++ compiler, or no Triton for its GPU) one warning says so, and
    training goes on without.

    Args:
        objective: on the device. device: of the run.

    Returns:
        the number of regions.
    """
    found = list(regions(objective))
    reason = _obstacle(device)
    if reason is not None:
        logger.warning("train.compile: nothing is compiled, because torch.compile fails here: %s", reason)
        return 0
    settings = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):  # the second until torch 2.6
        if hasattr(settings, name):
            setattr(settings, name, max(_GRAPHS, getattr(settings, name)))
            break
    for region in found:
        region.compile(dynamic=False)
    logger.info("train.compile: %d blocks and heads will be compiled at the first steps", len(found))
    return len(found)


def regions(objective: nn.Module) -> Iterator[nn.Module]:
    """Blocks that stand in a row with others of their kind, and projection heads.

    Left out: blocks with batch norm (its statistics travel between ranks), and the last of each row, which
    hands out attention maps through lists that would be part of what is compiled.
    """
    for module in objective.modules():
        if isinstance(module, ProjectionHead):
            yield module
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            blocks = list(module)
            if len({type(block) for block in blocks}) == 1 and _is_block(blocks[0]):
                yield from blocks[:-1]


def _is_block(module: nn.Module) -> bool:
    parts = list(module.modules())
    linear = sum(isinstance(part, nn.Linear) for part in parts)
    return linear > 1 and not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)


def _obstacle(device: torch.device) -> str | None:
    """Why a small function cannot be compiled on the device; None: it can."""

    def doubled(value: Tensor) -> Tensor:
        return (value * 2).relu() + 1

    try:
        torch.compile(doubled)(torch.ones(64, device=device))
    except Exception as error:  # compilers fail in many ways; without one training is as right
        return (str(error) or type(error).__name__).splitlines()[0]
    return None
