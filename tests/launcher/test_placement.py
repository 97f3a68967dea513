"""Which node of a run a launcher is."""

from __future__ import annotations

import os

import pytest

from launcher.placement import Node, place_node
from medvlp.ranks import LaunchError, Ranks, available_cpus, detect, threads_of_rank

STEP = {
    "MEDVLP_NODE_LAUNCH": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,b",
    "SLURM_JOB_ID": "70001",
}  # fmt: skip


def test_alone_without_options():
    assert place_node(None, None, None, {}) == Node()
    assert place_node(1, None, None, {}) == Node()


def test_options():
    assert place_node(4, 3, "gpu01:2345", {}) == Node(4, 3, "gpu01", 2345)
    assert place_node(2, 0, "[fe80::1]:2345", STEP) == Node(2, 0, "fe80::1", 2345)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((4, None, None), "belong together"),
        ((None, 1, "a:1"), "belong together"),
        ((4, 4, "a:1"), "--node-rank 4 does not exist among 4 nodes"),
        ((4, 0, "a"), "write HOST:PORT"),
        ((4, 0, "a:port"), "write HOST:PORT"),
        ((4, 0, "a:70000"), "write HOST:PORT"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(LaunchError, match=message):
        place_node(*options, {})


def test_a_step_of_our_job_script():
    assert detect(STEP).launcher == "none"
    assert place_node(None, None, None, STEP) == Node(2, 1, "localhost", 10000 + 70001 % 20000)
    assert place_node(None, None, None, STEP | {"SLURM_STEP_NUM_NODES": "1"}) == Node()
    chosen = place_node(None, None, None, STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert (chosen.address, chosen.port) == ("10.0.0.1", 99)


def test_a_first_node_without_a_name_service_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # where there is no scontrol either
    with pytest.raises(LaunchError, match=r"no-such-node\.invalid, cannot be resolved here: set MASTER_ADDR"):
        place_node(None, None, None, STEP | {"SLURM_STEP_NODELIST": "no-such-node.invalid"})


def test_cpus_are_those_of_the_task():
    everything = available_cpus({})
    assert (
        available_cpus({"SLURM_CPUS_PER_TASK": "1"}) == everything
    )  # of the batch script's job, not of a step
    assert available_cpus({"SLURM_CPUS_PER_TASK": "1", "SLURM_STEP_ID": "0"}) == 1
    step = {"SLURM_CPUS_PER_TASK": "100000", "SLURM_STEP_ID": "0"}
    assert threads_of_rank(Ranks("srun", 0, 2, 0, 2), step) == everything
    assert threads_of_rank(Ranks("torchrun", 0, 2, 0, everything), step) == 1


def test_a_number_of_threads_that_is_said_is_taken_but_not_the_one_that_torchrun_says_unasked() -> None:
    """On a shared machine a thread more than there are cores free makes every step wait for it."""
    ranks, everything = Ranks("none"), len(os.sched_getaffinity(0))
    assert threads_of_rank(ranks, {"OMP_NUM_THREADS": str(everything + 3)}) == everything + 3
    assert threads_of_rank(ranks, {"OMP_NUM_THREADS": ""}) == everything
    torchrun = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    assert threads_of_rank(Ranks("torchrun", 0, 1, 0, 1), torchrun) == everything
