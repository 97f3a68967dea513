"""The order of samples: exact, independent of the layout of ranks, resumable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config_files import ConfigError
from medvlp.data.order import SampleOrder, rank_rows

shard_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 8)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=50)


@quick
@given(shard_sizes, seeds, st.integers(0, 5), st.integers(1, 200), st.integers(1, 8))
def test_every_sample_is_seen_exactly_once_an_epoch(
    sizes: list[int], seed: int, epoch: int, block: int, partitions: int
) -> None:
    order = SampleOrder(sizes, seed, block, partitions).epoch_order(epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))


@quick
@given(shard_sizes, seeds, st.integers(1, 8), st.integers(1, 3), st.sampled_from(["drop", "wrap"]))
def test_batches_cut_the_epoch_order(
    sizes: list[int], seed: int, rows: int, partitions: int, tail: str
) -> None:
    order = SampleOrder(sizes, seed, block=16, partitions=partitions)
    batch = rows * partitions
    if tail == "drop" and sum(sizes) // partitions < rows:
        with pytest.raises(ConfigError, match="larger than the split"):
            order.steps_per_epoch(batch, tail)
        return
    steps = order.steps_per_epoch(batch, tail)
    epoch = 1
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        reached, positions = order.batch(step, batch, tail)
        assert reached == epoch
        assert positions.shape == (batch,)
        seen.append(positions)
    counts = np.bincount(np.concatenate(seen), minlength=sum(sizes))
    if tail == "drop":
        assert counts.max() == 1
        assert counts.sum() > sum(sizes) - batch - partitions
    else:
        assert counts.min() == 1
        assert counts.sum() < sum(sizes) + batch + partitions


@quick
@given(shard_sizes, seeds, st.integers(1, 40), st.sampled_from(["drop", "wrap"]))
def test_seeking_gives_what_an_uninterrupted_run_sees(
    sizes: list[int], seed: int, start: int, tail: str
) -> None:
    uninterrupted = SampleOrder(sizes, seed, block=16)
    history = [uninterrupted.batch(step, 4, tail) for step in range(start + 3)]
    resumed = SampleOrder(sizes, seed, block=16)
    for step in range(start, start + 3):
        epoch, positions = resumed.batch(step, 4, tail)
        assert epoch == history[step][0]
        np.testing.assert_array_equal(positions, history[step][1])


@quick
@given(
    seeds,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 30),
)
def test_the_set_of_a_step_depends_on_no_layout(
    seed: int, world_size: int, accumulation: int, partitions: int, step: int
) -> None:
    _, positions = SampleOrder([100, 37, 63], seed, 32, partitions).batch(step, 16)
    ranks = [rank_rows(positions, partitions, accumulation, world_size, rank) for rank in range(world_size)]
    assert all(len(rows) == 16 // accumulation // world_size for rank in ranks for rows in rank)
    np.testing.assert_array_equal(np.sort(np.concatenate([np.concatenate(rank) for rank in ranks])),
                                  np.sort(positions))  # fmt: skip
    if partitions == 1:
        in_order = [ranks[rank][k] for k in range(accumulation) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(in_order), positions)


def test_a_rank_reads_only_its_partitions() -> None:
    order = SampleOrder([50] * 8, seed=3, block=64, partitions=4)
    homes: list[set[int]] = [set() for _ in range(4)]
    for step in range(60):
        _, positions = order.batch(step, 16)
        for rank in range(4):
            for rows in rank_rows(positions, 4, accumulation=2, world_size=4, rank=rank):
                homes[rank] |= set((rows // 50).tolist())
    assert [len(home) for home in homes] == [2, 2, 2, 2]
    assert set.union(*homes) == set(range(8))


def test_seed_and_epoch_change_the_order() -> None:
    order = SampleOrder([40] * 5, seed=0, block=64)
    assert not np.array_equal(order.epoch_order(0), order.epoch_order(1))
    assert not np.array_equal(order.epoch_order(0), SampleOrder([40] * 5, 1, 64).epoch_order(0))
    dropped = [
        set(range(200)) - set(np.concatenate([order.batch(step, 48)[1] for step in range(e * 4, e * 4 + 4)]))
        for e in range(3)
    ]
    assert dropped[0] != dropped[1] != dropped[2]


def test_a_block_touches_few_shards_but_neighbours_change() -> None:
    order = SampleOrder([100] * 50, seed=0, block=200)
    windows = order.epoch_order(0).reshape(-1, 200) // 100
    assert max(len(np.unique(window)) for window in windows) <= 4
    one_shard = SampleOrder([1000], seed=0, block=100)
    mates = [set(one_shard.epoch_order(epoch)[:100].tolist()) for epoch in range(4)]
    assert len(set.union(*mates)) > 200


def test_one_block_shuffles_everything() -> None:
    order = SampleOrder([500, 500], seed=0, block=4096).epoch_order(0)
    # Displacements of a uniform permutation average a third of its length.
    assert 280 < np.abs(order - np.arange(1000)).mean() < 390


def test_the_order_is_the_same_for_ever() -> None:
    """Frozen values: another order would silently change what a resumed run sees."""
    assert SampleOrder([5, 3, 4], seed=7, block=4).epoch_order(2).tolist() == [
        2, 3, 0, 1, 10, 9, 8, 4, 11, 5, 7, 6,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_sizes": [], "seed": 0}, "no samples"),
        ({"shard_sizes": [3], "seed": 0, "block": 0}, "shuffle_block"),
        ({"shard_sizes": [3], "seed": 0, "partitions": 4}, "partitions"),
    ],
)
def test_impossible_orders_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleOrder(**arguments)  # type: ignore[arg-type]


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of data\.partitions"):
        SampleOrder([50], 0, partitions=4).steps_per_epoch(6)
    with pytest.raises(ConfigError, match="multiple of accumulation x ranks"):
        rank_rows(np.arange(12), 1, accumulation=2, world_size=4, rank=0)
