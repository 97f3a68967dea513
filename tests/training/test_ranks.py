"""The environment of torchrun, deepspeed and srun."""

import pytest

from medvlp.ranks import LaunchError, detect, first_node, tasks_on_node

SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),2", "SLURM_JOB_ID": "123456",
}  # fmt: skip


def test_without_a_launcher_there_is_one_rank() -> None:
    assert detect({}).world_size == 1


def test_torchrun_and_deepspeed() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        detect(environment)
    ranks = detect(environment | {"MASTER_ADDR": "host", "MASTER_PORT": "29501"})
    assert (ranks.launcher, ranks.rank, ranks.world_size, ranks.local_rank) == ("torchrun", 3, 4, 1)
    assert (ranks.address, ranks.port, ranks.local_world_size) == ("host", 29501, 2)


def test_srun() -> None:
    ranks = detect(SRUN)
    assert (ranks.launcher, ranks.rank, ranks.world_size, ranks.local_world_size) == ("srun", 5, 6, 2)
    assert ranks.address == "gpu07"
    assert ranks.port == 10000 + 123456 % 20000


def test_a_batch_script_is_no_rank_of_srun() -> None:
    assert detect({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}).launcher == "none"


def test_contradictions_are_errors() -> None:
    with pytest.raises(LaunchError, match="rank 6 does not exist among 6"):
        detect(SRUN | {"SLURM_PROCID": "6"})
    with pytest.raises(LaunchError, match="WORLD_SIZE is not"):
        detect({"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node[1-2]", "node1"), ("a,b", "a"), ("gpu[07,09].site,x", "gpu07.site")],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_tasks_on_node() -> None:
    assert [tasks_on_node("2(x2),1", node) for node in range(3)] == [2, 2, 1]
    with pytest.raises(LaunchError):
        tasks_on_node("2", 1)
