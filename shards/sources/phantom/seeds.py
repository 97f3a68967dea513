"""Random generators that depend on nothing but their keys."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for; keeps streams of one seed apart."""

    PATIENTS = 0
    ANATOMY = 1
    COURSE = 2
    POSE = 3
    EXPOSURE = 4
    REPORT = 5
    SHAPE = 6
    BONES = 7
    VESSELS = 8
    VIEW = 9
    QUESTIONS = 10


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """A PCG64 generator for (seed, stream, keys): the same in every process and in every order of calls."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(stream), *keys])))
