"""What `medvlp doctor` says of healthy and of broken surroundings."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.doctor import checks, machine, nodes, results, software, storage
from launcher.doctor.checks import CHECKS, Surroundings
from launcher.doctor.nodes import NodeReport
from launcher.doctor.results import BadNodesError, Check, Result, UnhealthyError, examine, fail, ok, warn
from launcher.doctor.slurm_limits import check_partition, check_settings, check_slurm, minutes_of
from launcher.main import app
from launcher.slurm import slurm_commands
from medvlp.config import Config
from shards.errors import UsageError

INFINITE = resource.RLIM_INFINITY
SETTINGS = {"PreemptMode": "OFF", "MaxArraySize": "1001", "JobRequeue": "1", "KillWait": "30 sec"}
PARTITION = {"PartitionName": "gpu", "MaxTime": "1-00:00:00", "DefaultTime": "01:00:00", "State": "UP"}


def statuses(found: list[Result]) -> dict[str, str]:
    return {result.check: result.status for result in found}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor") / "data"
    build = ["shards", "build", "phantom", "--out", str(root), "--studies", "12", "--image-size", "32"]
    assert CliRunner().invoke(app, [*build, "--workers", "1"]).exit_code == 0
    return root


@pytest.mark.parametrize(("gpu", "status"), [(True, "fail"), (False, "warn")])
def test_what_offload_compiles_with_is_looked_for_where_a_run_offloads(
    gpu: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node without GPUs may lack what the nodes of the job have."""
    config = Config()
    monkeypatch.setattr(nodes, "NODE_CHECKS", nodes.NODE_CHECKS[-1:])
    assert examine(nodes.NODE_CHECKS, Surroundings(tmp_path, config=config).node) == []
    config.zero.offload_optimizer = True
    here = Surroundings(tmp_path, config=config).node
    for name in ("c++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert statuses(examine(nodes.NODE_CHECKS, here)) == {"offload": "ok"}
    (tmp_path / "c++").unlink()
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    (found,) = examine(nodes.NODE_CHECKS, here)
    assert found.status == status
    assert "there is no C++ compiler here" in found.detail
    assert "install g++ in the image" in found.remedy


def test_each_node_is_told_that_the_run_offloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = Config(), []
    config.zero.offload_optimizer = True
    monkeypatch.setattr(checks, "check_nodes", lambda folder, arguments, environment: asked.append(arguments))
    checks._nodes(Surroundings(tmp_path, config=config))
    assert "--offload" in asked[0]
    monkeypatch.setattr(nodes, "report_node", lambda token, here: here.offload)
    monkeypatch.setattr(nodes, "print_report", lambda offload: print("offload", offload))
    told = CliRunner().invoke(app, ["doctor-node", str(tmp_path / "token"), *asked[0]])
    assert "offload True" in told.output


def test_this_installation_satisfies_the_project() -> None:
    assert statuses(software.check_software()) == {"python": "ok", "packages": "ok"}


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = {"cpu": ["faiss-none"], "gpu": ["faiss-nothing"], "serving": ["grpc-none>=1"], "dev": ["absent"]}
    project = {
        "requires-python": ">=99",
        "dependencies": ["numpy>=99", "torch", "no-such-package", "absent; python_version < '3'"],
        "optional-dependencies": extras,
    }
    monkeypatch.setattr(software, "_project", lambda: project)
    python, required, faiss, serving = software.check_software()
    assert python.status == required.status == "fail"
    assert (
        required.detail
        == f"numpy is {metadata.version('numpy')}, required is >=99; no-such-package is not installed"
    )
    assert faiss.status == serving.status == "warn"
    assert "faiss-none is not installed; faiss-nothing is not installed" in faiss.detail
    assert serving.remedy == "pip install 'medvlp[serving]'"


@pytest.mark.parametrize(
    ("result", "status", "remedy"),
    [
        (machine.open_files((INFINITE, INFINITE)), "ok", ""),
        (machine.open_files((1024, 65536)), "warn", "ulimit -n 4096"),
        (machine.open_files((1024, 1024)), "warn", "ask an administrator"),
        (machine.locked_memory(INFINITE, True), "ok", ""),
        (machine.locked_memory(8 << 20, False), "ok", ""),
        (machine.locked_memory(8 << 20, True), "fail", "LimitMEMLOCK=infinity"),
    ],
)
def test_limits_of_processes(result: Result, status: str, remedy: str) -> None:
    assert result.status == status
    assert remedy in result.remedy


def test_gpus_that_slurm_gave_and_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (none,) = machine.check_accelerators({})
    (lost,) = machine.check_accelerators({"SLURM_GPUS_ON_NODE": "8"})
    (unwanted,) = machine.check_accelerators({"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu"})
    assert (none.status, lost.status, unwanted.status) == ("ok", "fail", "ok")
    assert "Slurm gave 8 GPUs" in lost.detail


def test_a_gpu_that_fell_off_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H100")
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 3))
    (found,) = machine.check_accelerators({"SLURM_GPUS_ON_NODE": "8"})
    assert found.status == "fail"
    assert "Slurm gave 8 GPUs and torch sees 7: 7 x H100; torch" in found.detail
    # No driver here: whatever computing on a GPU raises is told as a failed check.
    problems = list(machine.check_accelerators({}))
    assert {result.check for result in problems if result.status == "fail"} == {f"GPU {n}" for n in range(7)}


def test_a_run_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = list(storage.check_run_folder(tmp_path / "deep" / "run"))
    assert found[0].status == "ok"
    assert f"made below {tmp_path}" in found[0].detail
    assert not list(tmp_path.iterdir())
    (refused,) = storage.check_run_folder(Path("/proc/run"))
    assert (refused.check, refused.status) == ("run folder", "fail")


def test_the_kind_of_file_system_counts_only_on_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "file_system", lambda folder: "ext4")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    assert statuses(list(storage.check_run_folder(tmp_path)))["shared storage"] == "warn"
    monkeypatch.setattr(storage, "file_system", lambda folder: "lustre")
    assert statuses(list(storage.check_run_folder(tmp_path)))["shared storage"] == "ok"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert "shared storage" not in statuses(list(storage.check_run_folder(tmp_path)))


def test_the_longest_mount_names_the_file_system() -> None:
    assert storage.file_system(Path("/proc/self")) == "proc"


def test_room_in_the_cache(tmp_path: Path) -> None:
    assert storage.check_cache(tmp_path / "new", 0.001, remote_data=True).status == "ok"
    small = storage.check_cache(tmp_path, 1e9, remote_data=True)
    assert (small.status, "lower data.cache_gigabytes" in small.remedy) == ("warn", True)
    assert storage.check_cache(tmp_path, 1e9, remote_data=False).status == "ok"


def test_a_damaged_dataset_is_found(shards: Path, tmp_path: Path) -> None:
    (good,) = checks.check_dataset(str(shards))
    assert good.status == "ok"
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    for shard in copy.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    (bad,) = checks.check_dataset(str(copy))
    assert bad.status == "fail"
    assert "not as the index says" in bad.detail
    assert bad.remedy == f"medvlp shards verify {copy}"
    (none,) = checks.check_dataset(str(tmp_path / "none"))
    assert none.status == "fail"


def test_tracking_offline_and_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert checks.check_tracking("disabled").detail == "disabled"
    assert "medvlp runs" in checks.check_tracking("offline").detail
    found = checks.check_tracking("online")
    assert (found.status, "cannot be reached" in found.detail) == ("warn", True)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("10:30", 11), ("02:00:00", 120), ("1-12", 2160), ("1-00:30:01", 1471), ("UNLIMITED", None)],
)
def test_times_of_slurm(text: str, minutes: int | None) -> None:
    assert minutes_of(text) == minutes


def test_limits_of_slurm() -> None:
    good = [*check_partition(SETTINGS, PARTITION, 120, 300), *check_settings(SETTINGS, 100)]
    assert {result.status for result in good} == {"ok"}
    bad = statuses(list(check_partition(SETTINGS, PARTITION | {"State": "DRAIN"}, 1441, 300)))
    assert bad["time limit"] == bad["partition"] == "warn"
    assert statuses(list(check_settings(SETTINGS, 1001)))["arrays"] == "warn"
    assert statuses(list(check_partition(SETTINGS, PARTITION, 6, 300)))["warning signal"] == "warn"


def test_every_partition_of_a_list_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"gpu": PARTITION, "short": PARTITION | {"PartitionName": "short", "MaxTime": "30:00"}}
    monkeypatch.setattr(slurm_commands, "is_installed", lambda: True)
    monkeypatch.setattr(slurm_commands, "configuration", lambda: SETTINGS)
    monkeypatch.setattr(slurm_commands, "partitions", lambda: known)
    found = list(check_slurm(None, "gpu,short", "60", None, {}))
    limits = [(result.status, result.detail) for result in found if result.check == "time limit"]
    assert [status for status, _ in limits] == ["ok", "warn"]
    assert "short allows 30:00" in limits[1][1]
    assert sum(result.check == "arrays" for result in found) == 1
    for names in ("gpu,none", "gpu,"):
        with pytest.raises(UsageError, match="there are gpu, short"):
            list(check_slurm(None, names, "60", None, {}))


@pytest.mark.parametrize(
    ("parameters", "grace", "mode", "status"),
    [
        ("preempt_send_user_signal", "60", "REQUEUE", "ok"),
        ("", "60", "REQUEUE", "warn"),
        ("preempt_send_user_signal", "0", "REQUEUE", "warn"),
        ("preempt_send_user_signal", "60", "GANG,SUSPEND", "warn"),
    ],
)
def test_preemption_without_warning_is_told(parameters: str, grace: str, mode: str, status: str) -> None:
    partition = PARTITION | {"PreemptMode": mode, "GraceTime": grace}
    found = statuses(list(check_partition(SETTINGS | {"SlurmctldParameters": parameters}, partition, 60, 60)))
    assert found["preemption"] == status


def node(name: str, time: float = 100.5, torch: str = "2.6", *found: Result) -> NodeReport:
    return NodeReport(name, time, {"torch": torch}, list(found))


def lines_of(reports: list[NodeReport], capsys: pytest.CaptureFixture[str]) -> list[str]:
    for entry in reports:
        nodes.print_report(entry)
    return ["noise of a library", *capsys.readouterr().out.splitlines()]


def test_nodes_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / ".token"
    token.write_bytes(b"secret")
    shared = ok("shared storage", "seen")
    for name in ("n1", "n2"):
        token.with_name(f"{token.name}.{name}").write_bytes(b"secret")
    reports = [
        node("n1", 1e12, "2.6", shared),
        node("n2", 0.0, "2.6", shared),
        node("n3", 0.0, "2.7", fail("shared storage", "not there", "mount it")),
    ]
    found = list(
        nodes.judge_nodes(token, lines_of(reports, capsys), ["n1", "n2", "n3", "n4"], 0.0, "refused")
    )
    failed = {(result.node, result.check) for result in found if result.status == "fail"}
    assert failed == {("n1", "clock"), ("n3", "packages"), ("n3", "shared storage"), ("n4", "nodes")}
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadNodesError, match="n1,n3,n4"):
        results.raise_for(found, 5)
    with pytest.raises(UnhealthyError):
        results.raise_for(found, 3)


def test_reports_are_put_together_from_mixed_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [node(name, 1.5, "2.6", ok("x", f"{name} " * 700)) for name in ("n1", "n2")]
    first, second = (lines_of([entry], capsys) for entry in reports)
    assert max(map(len, first + second)) < 1000
    mixed = [line for pair in zip(second, first, strict=True) for line in pair]
    assert nodes.read_reports(mixed) == reports
    assert nodes.read_reports(mixed[:-1]) == reports[1:]


def test_a_node_that_only_it_can_reach_is_found() -> None:
    """The first node's name is 127.0.1.1 to itself; gloo would wait there for the others."""
    wrong, right = (replace(node(name), address=a) for name, a in (("n1", "127.0.1.1"), ("n2", "10.0.0.2")))
    [found] = nodes.compare_addresses([wrong, right])
    assert (found.node, found.status) == ("n1", "fail")
    assert "127.0.1.1" in found.detail
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    [found] = nodes.compare_addresses([replace(wrong, address="10.0.0.1"), right])
    assert (found.status, found.detail) == ("ok", "n1 10.0.0.1, n2 10.0.0.2")
    assert list(nodes.compare_addresses([wrong, replace(right, address="127.0.0.1")])) == []


def test_a_folder_of_the_nodes_own_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "VISIBLE_SECONDS", 0.3)
    token = tmp_path / ".token"
    token.write_bytes(b"secret")
    lines = lines_of([node("n1", 0.0, "2.6", ok("shared storage", "seen"))], capsys)
    found = list(nodes.judge_nodes(token, lines, ["n1"], 0.0))
    assert statuses(found)["shared storage"] == "fail"


def test_the_report_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    found = [ok("a", "fine"), warn("b", "so so [x]", "do this"), fail("c", "broken", "do that")]
    results.print_results(found)
    printed = capsys.readouterr().out
    assert "so so [x]" in printed
    assert "-> do that" in printed
    values = json.loads(results.to_json(found))
    assert (values["status"], values["bad_nodes"], len(values["findings"])) == ("fail", [], 3)
    assert results.worst(found[:2]) == "warn"
    results.raise_for(found[:2], 0)
    with pytest.raises(UnhealthyError, match="c: broken") as raised:
        results.raise_for(found, 0)
    assert raised.value.exit_code == 9


def test_a_check_that_breaks_off_has_failed_with_the_remedy_of_its_table() -> None:
    checks = [
        Check[int]("x", lambda here: [ok("x", str(1 / here))], "do not divide"),
        Check[int]("y", lambda here: [ok("y", str(here))], ""),
        Check[int]("z", lambda here: [ok("z", "")], "", lambda here: here > 0),
    ]
    broken, fine = examine(checks, 0)
    assert (broken.check, broken.status, broken.remedy) == ("x", "fail", "do not divide")
    assert "ZeroDivisionError" in broken.detail
    assert fine == ok("y", "0")
    assert all(check.remedy for check in (*CHECKS, *nodes.NODE_CHECKS))


def test_the_command_on_this_machine(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("launcher.slurm.slurm_commands.is_installed", lambda: False)
    words = ["doctor", "--run-dir", str(tmp_path), "--data", str(shards), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    assert {result["check"] for result in values["findings"]} >= {"python", "packages", "dataset", "slurm"}
    broken = CliRunner().invoke(app, [*words[:4], str(tmp_path / "none")])
    assert isinstance(broken.exception, UnhealthyError)
    assert sys.executable in result.output
