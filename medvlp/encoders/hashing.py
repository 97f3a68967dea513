"""Numbers that are the same wherever they are asked for: SplitMix64 on tensors (Steele et al., OOPSLA 2014).

Written by hand: torch's own hash gives one number for a whole tensor.
"""

from torch import Tensor

#: SplitMix64's increment.
GOLDEN = 0x9E3779B97F4A7C15
WORD = 1 << 64


def signed(value: int) -> int:
    """A number of 64 bits as an int64 holds it."""
    return value - WORD if value >= WORD // 2 else value


def finalise(value: int) -> int:
    """SplitMix64's output function on a Python integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % WORD
    return value ^ (value >> 31)


def mix(values: Tensor) -> Tensor:
    """`finalise` on int64, whose products wrap; its right shift keeps the sign, hence the masks."""
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * signed(0xBF58476D1CE4E5B9)
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * signed(0x94D049BB133111EB)
    return values ^ ((values >> 31) & ((1 << 33) - 1))
