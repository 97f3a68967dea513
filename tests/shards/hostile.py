"""Content that no program of ours writes, for the tests and the drill that feed it to every reader."""

from __future__ import annotations

import json
import random
from typing import Any

#: A word that a message must never repeat.
SECRET = "Mustermann"

#: Values that are put in place of any value of a JSON file.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**53 + 1, 10**400, -(10**18), 1.5, 1e308, float("nan"), float("inf"), "", SECRET,
    "\0", "../../etc/passwd", "/etc/passwd", "a\nb", "\x1b[2J", "\ud800", "x" * 100_000, [], {}, [[]],
    [SECRET] * 3, {SECRET: SECRET}, {"": {"": None}},
)  # fmt: skip


def mutate_json(value: Any, random: random.Random) -> Any:
    """A copy of parsed JSON with one value (any node, at any depth) replaced, removed or named twice."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(list(value))
        changed = dict(value)
        if random.random() < 0.1:
            del changed[name]
        elif random.random() < 0.1:
            changed[random.choice(["../x", "\0", SECRET, "\ud800"])] = changed.pop(name)
        else:
            changed[name] = mutate_json(value[name], random)
        return changed
    if isinstance(value, list) and value and random.random() < 0.9:
        place = random.randrange(len(value))
        if random.random() < 0.1:
            return value[:place] + value[place + 1 :]
        if random.random() < 0.1:
            return [*value, value[place]]
        return [*value[:place], mutate_json(value[place], random), *value[place + 1 :]]
    if random.random() < 0.05:
        return nested(random.choice([30, 40, 900, 200_000]))
    return random.choice(VALUES)


class nested:  # noqa: N801 - stands for a value
    """Brackets inside each other, written without recursion."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


def to_bytes(value: Any) -> bytes:
    """JSON of a mutated value, rules of JSON or not."""
    depths: list[int] = []

    def default(item: Any) -> str:
        depths.append(item.depth)
        return "@nested@"

    text = json.dumps(value, default=default)
    for depth in depths:
        text = text.replace('"@nested@"', "[" * depth + "]" * depth, 1)
    return text.encode()


def mutate_bytes(data: bytes, random: random.Random) -> bytes:
    """Bytes flipped, cut off, cut out, repeated, spliced or overwritten with extreme integers."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 4, 30])):
        place = random.randrange(len(changed) + 1)
        length = random.choice([1, 2, 8, 64, 500])
        match random.randrange(7):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << random.randrange(8)
            case 1:
                del changed[place:]
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                other = random.randrange(len(changed) + 1)
                changed[place:] = changed[other:]
            case 5:
                extreme = random.choice([0, -1, 2**62, -(2**63), 2**31, 512, 1 << 40])
                changed[place : place + 8] = extreme.to_bytes(8, "little", signed=True)
            case _:
                changed[place : place + length] = random.randbytes(length)
    return bytes(changed)
