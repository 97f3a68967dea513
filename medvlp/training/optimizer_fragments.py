"""Where DeepSpeed 0.19 keeps each parameter's master weight and optimiser state, at every ZeRO stage.

Beside `engine.py` the only file that knows DeepSpeed's inside. It reads the places instead of calling
DeepSpeed's own checkpoint functions, whose files fit one world size and stage only, repeat the weights, and
are unpickled without limits where they are converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvlp.runs.optimizer_files import STEP, OptimizerFiles, entry_name


class Fragment(NamedTuple):
    """The part of one trainable parameter that this rank's optimiser updates.

    Attributes:
        name: of the parameter.
        start, stop: range of the flattened parameter.
        owner: tensor the optimiser updates and keeps its state under; the parameter itself, its master, or a
            flat tensor with many parameters.
        offset: where the range begins in the flattened `owner`.
    """

    name: str
    start: int
    stop: int
    owner: Tensor
    offset: int

    def of(self, state: Tensor) -> Tensor:
        """View of this fragment's elements in a (contiguous) state tensor of `owner`."""
        return state.reshape(-1).narrow(0, self.offset, self.stop - self.start)

    def share(self, rank: int, ranks: int) -> Fragment:
        """This rank's part, where all ranks hold the same: what it writes of it."""
        count = self.stop - self.start
        low, high = count * rank // ranks, count * (rank + 1) // ranks
        return self._replace(start=self.start + low, stop=self.start + high, offset=self.offset + low)


def find_fragments(
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: Any,
    stage: int,
    rank: int,
    masters: Mapping[int, Tensor],
) -> list[Fragment]:
    """Fragments of this rank, in the order of the parameters.

    Args:
        parameters: of the method, by name; frozen ones are passed over.
        optimizer: DeepSpeed's.
        stage: of ZeRO.
        rank: this rank among those that share the state.
        masters: at stage 0 in 16 bit the float32 master of each parameter, by `id`.
    """
    fragments = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if stage == 0:  # every rank holds all of it
            owner = masters.get(id(parameter), parameter)
            fragments.append(Fragment(name, 0, owner.numel(), owner, 0))
        elif stage < 3:
            # The parameters of a group lie one behind the other in one flat tensor, which is cut into as many
            # equal parts as there are ranks, wherever that falls in a parameter. DeepSpeed notes at each
            # parameter which range of it ("lp", as the model has it) this rank's part holds, and where in
            # that part ("hp", in float32) the range begins.
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:  # None: the parameter lies wholly in other ranks' parts
                # The same thing in DeepSpeed's two optimisers for these stages (bf16 at stage 1 has its own).
                parts = getattr(optimizer, "single_partition_of_fp32_groups", None)
                parts = optimizer.fp32_groups_flat_partition if parts is None else parts
                owner = parts[mapping.param_group_index]
                inside, held = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(Fragment(name, inside.start, inside.start + inside.numel, owner, held.start))
        else:
            # Here each parameter is cut by itself into equal parts of `count` elements, one a rank; the last
            # ones are filled up with padding, which belongs to no checkpoint. A rank's parts of one group lie
            # one behind the other, this one from `offset` on.
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, total = count * rank, parameter.ds_numel  # type: ignore[attr-defined]
            if start < total:
                owner = optimizer.fp32_partitioned_groups_flat[group]
                fragments.append(Fragment(name, start, min(start + count, total), owner, offset))
    return fragments


def fragment_tensors(fragments: Iterable[Fragment], optimizer: Any) -> dict[str, Tensor]:
    """Optimiser state of these fragments: `<key>:<name>` -> live 1-D view (`step`: [1]).

    Args:
        fragments: from `find_fragments`.
        optimizer: torch's or DeepSpeed's CPU Adam, the one that holds the state.
    """
    tensors = {}
    for fragment in fragments:
        for key, value in optimizer.state.get(fragment.owner, {}).items():
            if key == STEP:
                tensors[entry_name(key, fragment.name)] = torch.as_tensor(value, dtype=torch.float32).reshape(
                    1
                )
            elif isinstance(value, Tensor) and value.shape == fragment.owner.shape:
                tensors[entry_name(key, fragment.name)] = fragment.of(value)
    return tensors


@torch.no_grad()
def load_fragments(fragments: Iterable[Fragment], optimizer: Any, files: OptimizerFiles) -> None:
    """Put stored optimiser state into a fresh optimiser.

    Where parameters share one counter (ZeRO 1 to 3) and the stored counters differ (a part of the model that
    had no gradient in some steps, at stage 0), the largest is taken.
    """
    for fragment in fragments:
        state = optimizer.state[fragment.owner]
        for key in files.keys(fragment.name):
            if key not in state:
                state[key] = torch.zeros_like(fragment.owner)
            stored = files.part(fragment.name, key, fragment.start, fragment.stop)
            if stored.numel() == fragment.owner.numel():  # whole, perhaps in another memory format
                state[key].copy_(stored.view(fragment.owner.shape))
            else:
                fragment.of(state[key]).copy_(stored)
        step = files.step(fragment.name)
        if step is not None:
            step = max(step, float(state.get(STEP, 0.0)))
            state[STEP] = _counter(step, fragment.owner, optimizer)


def _counter(step: float, owner: Tensor, optimizer: Any) -> Tensor | int:
    """The counter as the optimiser keeps it: torch's a tensor, DeepSpeed's CPU Adam an int."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):  # before torch 2.7 not one class
        return int(step)
    defaults = optimizer.defaults
    on_device = defaults.get("fused") or defaults.get("capturable")
    return torch.tensor(step, dtype=torch.float32, device=owner.device if on_device else "cpu")


@torch.no_grad()
def write_elements(fragment: Fragment, optimizer: Any, places: Tensor, values: Tensor) -> None:
    """Set elements of a master and make them new to the optimiser: their moments become zero.

    Args:
        fragment: from `find_fragments`. optimizer: the one that holds the state.
        places: [m] int64 in the flattened whole parameter, on the CPU; those outside the fragment do not
            count.
        values: [m].
    """
    inside = (places >= fragment.start) & (places < fragment.stop)
    own = (places[inside] - fragment.start).to(fragment.owner.device)
    fragment.of(fragment.owner)[own] = values[inside].to(fragment.owner)
    for value in optimizer.state.get(fragment.owner, {}).values():
        if isinstance(value, Tensor) and value.shape == fragment.owner.shape:
            fragment.of(value)[own.to(value.device)] = 0


@torch.no_grad()
def write_model_elements(parameter: nn.Parameter, rank: int, places: Tensor, values: Tensor) -> None:
    """Set elements of what the forward pass reads: the model's own copy of a parameter, sharded or whole.

    Args as in `write_elements`; `rank` is this rank among those that share the state.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is not None:  # ZeRO-3
        first = part.numel() * rank
        inside = (places >= first) & (places < first + part.numel())
        part.data.view(-1)[(places[inside] - first).to(part.device)] = values[inside].to(part)
        if parameter.numel() != parameter.ds_numel:  # type: ignore[attr-defined]
            return  # else small ones stay whole on every rank too
    parameter.data.view(-1)[places.to(parameter.device)] = values.to(parameter)


@torch.no_grad()
def load_masters(fragments: Iterable[Fragment], weights: Any) -> None:
    """Put whole stored float32 weights into the masters.

    Args:
        fragments: from `find_fragments`.
        weights: an opened safetensors file with the whole parameters.
    """
    for fragment in fragments:
        stored = weights.get_tensor(fragment.name).float().reshape(-1)[fragment.start : fragment.stop]
        if stored.numel() == fragment.owner.numel():
            fragment.owner.copy_(stored.view(fragment.owner.shape))
        else:
            fragment.of(fragment.owner).copy_(stored)
