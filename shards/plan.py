"""Decides, before anything is built, which record goes to which shard.

The plan depends on the source and the options alone, so any number of workers, parts or restarts fill the
same shards with the same samples. A record that is rejected later leaves its shard one sample shorter.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from shards.format import shard_file_name
from shards.sources.base import Source
from shards.splits import split_of


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be built: its tar name, its split and the records it holds."""

    file: str
    split: str
    records: list[int]


def plan_shards(
    source: Source, fractions: Mapping[str, float], split_seed: str, records_per_shard: int
) -> list[PlannedShard]:
    """All shards of a dataset, splits in the order of `fractions`, then any others a source prescribes."""
    records: dict[str, list[int]] = defaultdict(list, {split: [] for split in fractions})
    for i in range(len(source)):
        split = source.prescribed_split(i) or split_of(source.split_key(i), fractions, split_seed)
        records[split].append(i)
    return [
        PlannedShard(
            shard_file_name(split, number),
            split,
            members[number * records_per_shard : (number + 1) * records_per_shard],
        )
        for split, members in records.items()
        for number in range(-(-len(members) // records_per_shard))
    ]


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of the plan (`--part i/n`); shards are dealt out like cards.

    `number` is taken modulo `count`, so array jobs may count from 0 or from 1.
    """

    number: int
    count: int

    def of(self, plan: list[PlannedShard]) -> list[PlannedShard]:
        """The shards of this part."""
        return plan[self.number % self.count :: self.count]
