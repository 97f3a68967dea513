"""The order of samples: a pure function of shard sizes, seed and epoch.

Only raw Philox words and stable sorts are used: NumPy keeps raw bit streams fixed between versions, which it
does not promise for `Generator.permutation`, so an order stays the same after an upgrade.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvlp.config_files import ConfigError

Positions = NDArray[np.int64]

#: Purpose of a random stream; keeps the fixed partition of shards apart from the orders of epochs.
_PARTITION, _SHARDS, _SAMPLES, _BLOCKS = range(4)
#: Second integer of the stream that draws an image of each study (`StudyImages`); no partition has it.
_STUDIES = 1 << 63
_MASK = (1 << 64) - 1


def random_words(count: int, seed: int, *purpose: int) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words of the stream named by `seed` and up to three more integers.

    Args:
        count: number of words.
        seed: any integer (taken modulo 2**64).
        purpose: at most three integers >= 0; different ones give independent streams.
    """
    first, second, third = (*purpose, 0, 0, 0)[:3]
    counter = (first << 192) | (second << 128) | (third << 64)
    # The high half of the key keeps these streams apart from those of `transforms.SampleRandom` (epochs).
    return np.random.Philox(key=(seed & _MASK) | (_MASK << 64), counter=counter).random_raw(count)


def _permutation(count: int, seed: int, *purpose: int) -> Positions:
    return np.argsort(random_words(count, seed, *purpose), kind="stable")


class PartitionOrder:
    """The order of one partition in one epoch, worked out block by block where it is asked for.

    Sorting the keys of ten million samples takes seconds; of the one or two blocks that a global batch lies
    in, a millisecond.

    A sample has three numbers on the way from its place in the order to its position in the split: the place
    (blocks permuted, samples permuted in them), its index in the rotated sequence of pieces, and its index in
    that sequence before the rotation, from which piece and position follow.

    Args:
        starts, sizes: pieces of shards in this epoch's order.
        rotation: samples at the end of their concatenation that come first.
        block_words: a random word for each block; blocks are permuted in the order of these.
        keys: a random word for each sample; samples of a block are permuted in the order of these.
    """

    def __init__(
        self,
        starts: Positions,
        sizes: Positions,
        rotation: int,
        block_words: NDArray[np.uint64],
        keys: NDArray[np.uint64],
    ) -> None:
        self._starts, self._ends = starts, np.cumsum(sizes)
        self._rotation, self._keys = rotation, keys
        self._blocks = np.argsort(block_words, kind="stable")
        # Sample i of the rotated sequence is in block i * blocks // count, so block b begins at the
        # smallest i with i * blocks >= b * count. The two minus signs round up in whole numbers, exactly.
        self._cuts = -(-np.arange(len(block_words) + 1) * len(keys) // len(block_words))
        # The place at which each block begins once the blocks are permuted; sizes differ by one sample.
        self._offsets = np.concatenate([[0], np.cumsum(np.diff(self._cuts)[self._blocks])])
        self._sorted: dict[int, Positions] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, places: Positions) -> Positions:
        """Positions in the split (int64) of the samples at these places of the order."""
        of_place = np.searchsorted(self._offsets, places, side="right") - 1
        positions = np.empty(len(places), dtype=np.int64)
        wanted = np.unique(of_place).tolist()
        # Neighbouring batches share blocks; older ones are not asked for again.
        self._sorted = {block: self._sorted[block] for block in wanted if block in self._sorted}
        for block in wanted:
            here = of_place == block
            if block not in self._sorted:
                self._sorted[block] = self._sort(block)
            positions[here] = self._sorted[block][places[here] - self._offsets[block]]
        return positions

    def _sort(self, block: int) -> Positions:
        """Positions of the samples of the block that comes at this point of the permuted blocks."""
        low, high = self._cuts[self._blocks[block]], self._cuts[self._blocks[block] + 1]
        # Stable, so that equal keys (they are random words) fall alike on every machine.
        inside = low + np.argsort(self._keys[low:high], kind="stable")
        place = (inside - self._rotation) % len(self._keys)  # in the sequence before the rotation
        # Where it falls among the ends of the pieces says which piece it is in: "right", because a sample at
        # the end of one piece is the first of the next, and pieces without samples are passed over.
        piece = np.searchsorted(self._ends, place, side="right")
        before = np.where(piece > 0, self._ends[piece - 1], 0)
        positions: Positions = self._starts[piece] + place - before
        return positions


class SampleOrder:
    """In which order the samples of a split are seen.

    The shards, permuted once by the seed, are cut into `partitions` parts of equal size (to one sample; a
    shard on a cut belongs to both sides). In every epoch each partition permutes its pieces of shards,
    rotates the resulting sequence, cuts it into blocks of about `block` samples, permutes the samples inside
    the blocks, and permutes the blocks. So every sample occurs exactly once, a window of `block` samples
    touches few shards, and neighbours change from epoch to epoch. A node that always reads the same
    partitions (see `rank_rows`) needs only their shards.

    Tail policy: with "drop" the last samples of each partition that do not fill a global batch are left out
    of the epoch; the order differs between epochs, so they are others every time. With "wrap" the last
    global batch is filled from the start of the same epoch's order, so some samples are seen twice.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block: int = 4096, partitions: int = 1) -> None:
        """Take the samples of each shard in index order.

        Raises:
            ConfigError: no samples, a block or partition count below 1, or more partitions than samples.
        """
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(sizes.sum())
        if self.samples < 1 or (sizes < 0).any():
            raise ConfigError(f"the split has no samples to order (shard sizes {list(shard_sizes)[:8]})")
        if block < 1:
            raise ConfigError(f"data.shuffle_block must be at least 1, not {block}")
        if not 1 <= partitions <= self.samples:
            raise ConfigError(
                f"data.partitions must lie in [1, {self.samples}] (the samples), not {partitions}"
            )
        self.seed = seed
        self.block = block
        self.partitions = partitions
        self._pieces = self._partition(sizes)
        self._cache: tuple[int, list[PartitionOrder]] | None = None

    def _partition(self, sizes: Positions) -> list[tuple[Positions, Positions]]:
        """(starts, sizes) of the pieces of shards that make up each partition."""
        starts = np.cumsum(sizes) - sizes
        order = _permutation(len(sizes), self.seed, _PARTITION)
        starts, sizes = starts[order], sizes[order]
        shard_ends = np.cumsum(sizes)
        cuts = np.arange(self.partitions + 1) * self.samples // self.partitions
        pieces = []
        for low, high in itertools.pairwise(cuts.tolist()):
            left = np.maximum(shard_ends - sizes, low)
            right = np.minimum(shard_ends, high)
            inside = right > left
            offset = (left - (shard_ends - sizes))[inside]
            pieces.append((starts[inside] + offset, (right - left)[inside]))
        return pieces

    def _partition_order(self, partition: int, epoch: int) -> PartitionOrder:
        starts, sizes = self._pieces[partition]
        stream = (epoch << 2, partition)
        shuffled = _permutation(len(starts), self.seed, stream[0] | _SHARDS, stream[1])
        count = int(sizes.sum())
        blocks = max(1, round(count / self.block))
        words = random_words(blocks + 1, self.seed, stream[0] | _BLOCKS, stream[1])
        keys = random_words(count, self.seed, stream[0] | _SAMPLES, stream[1])
        rotation = int(words[-1] % np.uint64(count))
        return PartitionOrder(starts[shuffled], sizes[shuffled], rotation, words[:-1], keys)

    def partition_orders(self, epoch: int) -> list[PartitionOrder]:
        """The order of every partition in this epoch (the last epoch asked for is kept)."""
        if self._cache is None or self._cache[0] != epoch:
            orders = [self._partition_order(partition, epoch) for partition in range(self.partitions)]
            self._cache = (epoch, orders)
        return self._cache[1]

    def epoch_order(self, epoch: int) -> Positions:
        """All positions of the split, each exactly once: int64 [samples], partition after partition."""
        return np.concatenate([part[np.arange(len(part))] for part in self.partition_orders(epoch)])

    def steps_per_epoch(self, global_batch: int, tail: str = "drop") -> int:
        """Number of global batches of an epoch.

        Raises:
            ConfigError: unknown tail policy, a batch that the partitions do not divide, or (with "drop")
                a batch larger than the split.
        """
        if global_batch < 1 or global_batch % self.partitions:
            raise ConfigError(
                f"train.global_batch ({global_batch}) must be a multiple of data.partitions "
                f"({self.partitions})"
            )
        rows = global_batch // self.partitions
        if tail == "wrap":
            largest_partition = -(-self.samples // self.partitions)
            return -(-largest_partition // rows)
        if tail != "drop":
            raise ConfigError(f"data.tail must be drop or wrap, not {tail!r}")
        steps = self.samples // self.partitions // rows
        if steps == 0:
            raise ConfigError(
                f"train.global_batch ({global_batch}) is larger than the split ({self.samples} samples in "
                f"{self.partitions} partitions); make it smaller or set data.tail=wrap"
            )
        return steps

    def batch(self, step: int, global_batch: int, tail: str = "drop") -> tuple[int, Positions]:
        """Epoch and positions (int64 [global_batch]) of the global batch of training step `step`, from 0.

        The rows of partition 0 come first, then those of partition 1, and so on.
        """
        epoch, index = divmod(step, self.steps_per_epoch(global_batch, tail))
        rows = global_batch // self.partitions
        window = np.arange(index * rows, (index + 1) * rows)
        # With "drop" no index reaches the end; with "wrap" the modulo fills the last batch from the start.
        return epoch, np.concatenate([part[window % len(part)] for part in self.partition_orders(epoch)])


class StudyImages:
    """Draws one image of each study in every epoch, by (seed, epoch, study) alone.

    Args:
        studies: int64 [N], equal for samples of one study.
        mask: bool [N], samples that may be drawn.
        seed: of the run.

    Attributes:
        first: bool [N], the first such sample of each study, which stands for it in the order.
        members: those that may be drawn, study by study.
    """

    def __init__(self, studies: Positions, mask: NDArray[np.bool_], seed: int) -> None:
        self.seed = seed
        self.members = np.flatnonzero(mask)
        self.members = self.members[np.argsort(studies[self.members], kind="stable")]
        _, starts, self._sizes = np.unique(studies[self.members], return_index=True, return_counts=True)
        self._starts = starts.astype(np.int64)
        self._firsts = self.members[self._starts]
        self.first = np.zeros(len(studies), dtype=bool)
        self.first[self._firsts] = True
        self._by_first = np.argsort(self._firsts, kind="stable")
        self._words: tuple[int, NDArray[np.uint64]] | None = None

    def draw(self, epoch: int, firsts: Positions) -> Positions:
        """For samples that stand for their studies, the images drawn of these in this epoch."""
        study = self._by_first[np.searchsorted(self._firsts[self._by_first], firsts)]
        if self._words is None or self._words[0] != epoch:
            self._words = epoch, random_words(len(self._firsts), self.seed, epoch, _STUDIES)
        chosen = (self._words[1][study] % self._sizes[study].astype(np.uint64)).astype(np.int64)
        drawn: Positions = self.members[self._starts[study] + chosen]
        return drawn


def rank_rows(
    positions: Positions, partitions: int, accumulation: int, world_size: int, rank: int
) -> list[Positions]:
    """Cut a global batch into the micro-batches of one rank.

    With one partition, micro-batch k of all ranks together is rows [k*m*W, (k+1)*m*W) for W ranks of m
    samples, and rank r takes the r-th slice of m rows. With several partitions each micro-batch takes an
    equal share of every partition, so that a rank meets the same partitions in every micro-batch.

    Args:
        positions: int64 [B] from `SampleOrder.batch`.
        partitions: partitions of that order.
        accumulation: micro-batches of a step.
        world_size: number of ranks.
        rank: this rank.

    Returns:
        `accumulation` arrays of B / (accumulation * world_size) positions.

    Raises:
        ConfigError: B does not divide evenly.
    """
    batch = len(positions)
    if batch % (accumulation * world_size) or batch % (accumulation * partitions):
        raise ConfigError(
            f"train.global_batch ({batch}) must be a multiple of accumulation x ranks ({accumulation} x "
            f"{world_size}) and of accumulation x data.partitions ({accumulation} x {partitions})"
        )
    grid = positions.reshape(partitions, accumulation, -1).transpose(1, 0, 2).reshape(accumulation, -1)
    return list(grid.reshape(accumulation, world_size, -1)[:, rank])
