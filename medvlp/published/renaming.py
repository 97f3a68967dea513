"""Published keys -> names of our method, with an account of every key: used, known and unused, or unknown."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medvlp.published.reading import PublishedFile, PublishedFileError, printable


def same(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def without_last_axis(tensor: Tensor) -> Tensor:
    """[out, in, 1] of a 1x1 convolution -> [out, in] of the same linear layer; anything else as it is."""
    return tensor[..., 0] if tensor.ndim == 3 and tensor.shape[-1] == 1 else tensor


def part(number: int, parts: int = 3) -> Callable[[Tensor], Tensor]:
    """A function that takes one of equal parts along the first axis (packed queries, keys, values)."""

    def take(tensor: Tensor) -> Tensor:
        rows = len(tensor) // parts if tensor.ndim else 0
        return tensor[number * rows : (number + 1) * rows] if tensor.ndim else tensor

    return take


@dataclass(frozen=True)
class Rule:
    """How tensors of ours are made of published ones.

    Attributes:
        ours: regular expression of whole names in our state dict.
        published: keys they are made of, with the groups of `ours` as `\\1`, `\\2`.
        make: function of the published tensors, in this order; makes views, or sums of small ones.
    """

    ours: str
    published: Sequence[str]
    make: Callable[..., Tensor] = same


@dataclass
class Renamed:
    """What a file gives.

    Attributes:
        state: our name -> float32 (or integer) tensor of the expected shape, on the CPU.
        unused: published key -> why it is not used. unknown: keys that no published model has.
    """

    state: dict[str, Tensor]
    unused: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def rename(
    file: PublishedFile,
    what: str,
    expected: Mapping[str, Tensor],
    rules: Sequence[Rule],
    unused: Mapping[str, str],
    allow_unknown: bool = False,
) -> Renamed:
    """Make every tensor of `expected`, checking names and shapes before a value is read.

    Args:
        file: the published weights.
        what: what the file is said to be, for messages.
        expected: our name -> a tensor of the right shape and kind of number.
        rules: the first that fits makes a tensor.
        unused: regular expression of published keys that nothing reads -> why.
        allow_unknown: list keys that are neither used nor known instead of refusing them.

    Raises:
        PublishedFileError: missing or unknown keys, other shapes or kinds of numbers, values that are not
            finite.
    """
    made: dict[str, Tensor] = {}
    missing, used, wrong = [], set(), []
    for name, target in expected.items():
        rule, keys = _published(name, rules)
        absent = [key for key in keys if key not in file.tensors]
        used |= set(keys)
        if absent:
            missing += absent
            continue
        tensor = rule.make(*(file.tensors[key] for key in keys))
        if tensor.shape != target.shape or tensor.is_floating_point() != target.is_floating_point():
            shapes = " and ".join(str(list(file.tensors[key].shape)) for key in keys)
            wrong.append(f"{printable(keys)} is {shapes} and makes no {list(target.shape)} ({name})")
        made[name] = tensor
    left = [key for key in file.tensors if key not in used]
    account = {key: why for key in left for pattern, why in unused.items() if re.fullmatch(pattern, key)}
    unknown = [key for key in left if key not in account]
    if not used & file.tensors.keys():
        raise PublishedFileError(
            f"{file.path} is no {what}: none of its keys is one of it (it has {printable(unknown)})"
        )
    if missing:
        missing = list(dict.fromkeys(missing))
        more = f"; it also has {len(unknown)} unknown ones: {printable(unknown)}" if unknown else ""
        raise PublishedFileError(
            f"{file.path} is no whole {what}: it lacks {len(missing)} keys: {printable(missing)}{more}"
        )
    if wrong:
        raise PublishedFileError(f"{file.path} is another {what}: {wrong[0]}")
    _check_shared(file, expected, made)
    if unknown and not allow_unknown:
        raise PublishedFileError(
            f"{file.path} has {len(unknown)} keys that no {what} has: {printable(unknown)}. Is it another "
            "model? Where they are not needed, leave them out with --allow-unknown"
        )
    return Renamed({name: _values(file, name, value) for name, value in made.items()}, account, unknown)


def _published(name: str, rules: Sequence[Rule]) -> tuple[Rule, list[str]]:
    """The rule for one of our names and the keys it reads."""
    for rule in rules:
        if found := re.fullmatch(rule.ours, name):
            return rule, [found.expand(key) for key in rule.published]
    raise KeyError(f"no rule makes {name}")  # a recipe of this package that was not tried


def _check_shared(file: PublishedFile, expected: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Refuse two values for names that stand for one tensor of ours (a norm that two decoders share)."""
    first: dict[int, str] = {}
    for name, target in expected.items():
        other = first.setdefault(target.data_ptr(), name)
        if other != name and not torch.equal(made[name], made[other]):
            raise PublishedFileError(
                f"{file.path} has two values for what is one in the published model ({other} and {name})"
            )


def _values(file: PublishedFile, name: str, tensor: Tensor) -> Tensor:
    copied = tensor.detach().to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
    if copied.is_floating_point() and not torch.isfinite(copied).all():
        raise PublishedFileError(f"{file.path}: {name} is to hold values that are not finite numbers")
    return copied.contiguous()
