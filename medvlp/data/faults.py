"""Corrupt samples of a rank: how many, said sparingly, and when there are too many."""

import logging
import math

from medvlp.data.batch import Batch
from shards.errors import DataError

logger = logging.getLogger(__name__)

#: Faults logged one by one; later ones at every power of two of their count.
_LOGGED_FAULTS = 10


class FaultCounter:
    """Counts corrupt samples of one rank, logs them sparingly, and stops the run when there are too many.

    A rank reads about 1/W of an epoch of N samples. It stops when its number of replaced samples exceeds

        L + 3 * sqrt(L * (1 - 1/W))   with   L = max_bad_fraction * max(samples it has seen, N / W),

    that is, its share of the allowed number plus three standard deviations of what chance can deal to one of
    W ranks; with one rank just the allowed number.

    Args:
        max_bad_fraction: see `data.max_bad_fraction`.
        samples, world_size: N and W.
        replaced: whether a batch has others in place of its corrupt samples (training), or is smaller.
    """

    def __init__(
        self, max_bad_fraction: float, samples: int, world_size: int, replaced: bool = False
    ) -> None:
        self.max_bad_fraction, self.replaced = max_bad_fraction, replaced
        self.share = samples / world_size
        self.world_size = world_size
        self.seen = 0
        self.skipped = 0
        self._logged = 0

    def count(self, batch: Batch) -> None:
        """Take in one micro-batch.

        Raises:
            DataError: too many corrupt samples.
        """
        self.seen += len(batch.keys) + (0 if self.replaced else batch.skipped)
        self.skipped += batch.skipped
        for fault in batch.faults:
            self._logged += 1
            if self._logged <= _LOGGED_FAULTS or self._logged.bit_count() == 1:
                logger.warning("corrupt sample %d, skipped: %s", self._logged, fault)
        expected = self.max_bad_fraction * max(self.seen, self.share)
        if self.skipped > expected + 3 * math.sqrt(expected * (1 - 1 / self.world_size)):
            raise DataError(
                f"{self.skipped} of {self.seen} samples read by this rank are corrupt, more than "
                f"data.max_bad_fraction={self.max_bad_fraction} allows; the last: {batch.faults[-1]}; "
                "run medvlp shards verify"
            )
