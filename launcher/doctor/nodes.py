"""All nodes of a job: each is looked at by a task that srun starts there, and they are compared."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.doctor.machine import check_machine
from launcher.doctor.results import Check, Result, examine, fail, ok
from launcher.doctor.software import check_offload, check_software
from launcher.doctor.storage import CLOCK_SECONDS, check_cache, existing_parent, probe_name
from medvlp.network import Route, route_to
from medvlp.ranks import NODE_LAUNCH, first_node

#: How to start `medvlp` on a node, where that is not this Python: a container's command, for example.
NODE_COMMAND = "MEDVLP_NODE_COMMAND"
#: A node's lines on stdout begin so; libraries may print others.
MARK = "medvlp-node-report "
#: Longer lines of several tasks srun mixes with each other (its messages have 1024 bytes).
_LINE_LENGTH = 800
#: File systems such as NFS show another node's new file after a while.
VISIBLE_SECONDS = 10.0
_SECONDS = 300.0


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself.

    Attributes:
        node: its name for Slurm.
        time: its clock, in seconds since 1970.
        versions: of Python and the packages that can change results.
        results: of the checks made there.
        address: its own on the way to the first node of the job, over which gloo's messages go.
    """

    node: str
    time: float
    versions: dict[str, str]
    results: list[Result]
    address: str = ""


def inside_job(environment: Mapping[str, str]) -> int:
    """Number of nodes of the job this process is in; 0 outside of one."""
    return int(environment.get("SLURM_JOB_NUM_NODES", "1")) if "SLURM_JOB_ID" in environment else 0


@dataclass(frozen=True)
class NodeSurroundings:
    """What of a node is looked at: its cache, the gigabytes that may take, and whether shards go there.

    `offload`: whether the run keeps its optimiser's state in the memory of the CPU.
    """

    cache: Path
    cache_gigabytes: float
    remote_data: bool
    offload: bool = False


#: What is looked at on every node.
NODE_CHECKS: tuple[Check[NodeSurroundings], ...] = (
    Check(
        "packages",
        lambda here: check_software(),
        "make the environment anew: pip install --editable . in the checkout, with .ci/constraints.txt",
    ),
    Check(
        "machine",
        lambda here: check_machine(),
        "torch has to be importable, and its CUDA to fit the driver (nvidia-smi)",
    ),
    Check(
        "node cache",
        lambda here: [check_cache(here.cache, here.cache_gigabytes, here.remote_data)],
        "set data.cache_dir to a node-local folder",
    ),
    Check(
        "offload",
        lambda here: [check_offload()],
        "DeepSpeed has to be importable, or zero.offload_optimizer to be off",
        lambda here: here.offload,
    ),
)


def report_node(token: Path, here: NodeSurroundings) -> NodeReport:
    """The checks of this node; leaves `<token>.<node>` beside the token, which the other side looks for."""
    from medvlp.runs.run_folder import library_versions

    now = time.time()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    seen = Check[None](
        "shared storage", lambda _: [_answer(token, node)], f"see that every node can write to {token.parent}"
    )
    results = [*examine(NODE_CHECKS, here), *examine([seen], None)]
    versions = {"python": platform.python_version()} | library_versions()
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    meeting = os.environ.get("MASTER_ADDR") or (first_node(nodes) if nodes else "127.0.0.1")
    return NodeReport(node, now, versions, results, route_to(meeting).address)


def _answer(token: Path, node: str) -> Result:
    """Find the token written on the first node, and write an answer beside it."""
    remedy = f"mount {token.parent} on every node, or choose a run.dir that is"
    if not _appears(token):
        return fail("shared storage", f"a file made in {token.parent} on the first node is not there", remedy)
    try:
        token.with_name(f"{token.name}.{node}").write_bytes(token.read_bytes())
    except OSError as error:
        return fail("shared storage", f"{token.parent} cannot be written: {error.strerror}", remedy)
    return ok("shared storage", f"{token.parent} is seen by all")


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def print_report(report: NodeReport) -> None:
    """Lines on stdout for the process that started this one: node, number of the line, part of the report."""
    text = json.dumps(asdict(report))
    parts = [text[start : start + _LINE_LENGTH] for start in range(0, len(text), _LINE_LENGTH)]
    for number, part in enumerate(parts):
        print(f"{MARK}{report.node} {number}/{len(parts)} {part}", flush=True)


def check_nodes(folder: Path, arguments: list[str], environment: Mapping[str, str]) -> Iterator[Result]:
    """Look at every node of this job at once.

    Args:
        folder: the run folder.
        arguments: of `medvlp doctor-node`, without the token.
        environment: with Slurm's variables of the job.
    """
    count = inside_job(environment)
    token = existing_parent(folder) / probe_name()
    token.write_bytes(os.urandom(64))
    since = time.time()
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
    try:
        lines, complaints = run_on_nodes(command, ["doctor-node", str(token), *arguments], environment)
    except OSError:
        token.unlink(missing_ok=True)
        raise
    yield from judge_nodes(token, lines, job_nodes(environment), since, complaints)


def judge_nodes(
    token: Path, lines: Sequence[str], names: Sequence[str], since: float, complaints: str = ""
) -> Iterator[Result]:
    """What the reports of all nodes say together; removes the token and the answers to it.

    Args:
        token: the file that every node looked for.
        lines: standard output of all nodes.
        names: the nodes that were asked.
        since: this node's clock before they were, in seconds since 1970.
        complaints: what srun said about a failure.
    """
    until = time.time()
    reports = read_reports(lines)
    try:
        yield from missing_nodes(reports, names, complaints)
        reports = [_with_visible_answer(report, token) for report in reports]
    finally:
        for path in (token, *token.parent.glob(f"{token.name}.*")):
            path.unlink(missing_ok=True)
    yield from compare_clocks(reports, since, until)
    yield from compare_versions(reports)
    yield from compare_addresses(reports)
    yield from _by_check(reports)


def run_on_nodes(
    command: list[str], arguments: list[str], environment: Mapping[str, str]
) -> tuple[list[str], str]:
    """Run `medvlp ARGUMENTS` by an srun command; (lines of stdout, end of stderr).

    A failure shows by what is absent from stdout.
    """
    # A step that shares the job's CPUs: another one may be running.
    full = [*command, "--overlap", *program(environment), *arguments]
    try:
        # Else these tasks would take themselves for what starts the ranks of a node.
        inherited = {name: value for name, value in environment.items() if name != NODE_LAUNCH}
        done = subprocess.run(
            full, env=inherited, capture_output=True, text=True, timeout=_SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        output = (
            error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        )
        return output.splitlines(), f"no answer within {_SECONDS:g} s"
    return done.stdout.splitlines(), " ".join(done.stderr.split())[-300:]


def program(environment: Mapping[str, str]) -> list[str]:
    """The command that is `medvlp` on a node."""
    given = environment.get(NODE_COMMAND)
    return shlex.split(given) if given else [sys.executable, "-m", "launcher.main"]


def read_reports(lines: Sequence[str]) -> list[NodeReport]:
    """The reports among the lines of all tasks; one that is not whole is none."""
    parts: dict[str, dict[str, str]] = {}
    for line in lines:
        if line.startswith(MARK):
            node, place, part = line.removeprefix(MARK).split(" ", 2)
            parts.setdefault(node, {})[place] = part
    reports = []
    for found in parts.values():
        count = int(next(iter(found)).partition("/")[2])
        places = [f"{number}/{count}" for number in range(count)]
        if set(places) == found.keys():
            values: dict[str, Any] = json.loads("".join(found[place] for place in places))
            results = [Result(**result) for result in values.pop("results")]
            reports.append(NodeReport(results=results, **values))
    return sorted(reports, key=lambda report: report.node)


def missing_nodes(reports: Sequence[NodeReport], names: Sequence[str], complaints: str) -> Iterator[Result]:
    """A failed result for each node that did not report."""
    for name in sorted(set(names) - {report.node for report in reports}):
        detail = f"did not report. {complaints}".rstrip()
        remedy = f"look at the node (sinfo -N -l), or leave it out: --exclude={name}"
        yield replace(fail("nodes", detail, remedy), node=name)


def job_nodes(environment: Mapping[str, str]) -> list[str]:
    """Names of the nodes of this job.

    Raises:
        SlurmError: `scontrol` is not at hand.
    """
    from launcher.slurm.slurm_commands import host_names

    return host_names(environment["SLURM_JOB_NODELIST"])


def _with_visible_answer(report: NodeReport, token: Path) -> NodeReport:
    """The report, with a failed result if what that node wrote is not seen here."""
    answered = any(result.check == "shared storage" and result.status == "ok" for result in report.results)
    answer = token.with_name(f"{token.name}.{report.node}")
    if not answered or (_appears(answer) and answer.read_bytes() == token.read_bytes()):
        return report
    result = fail(
        "shared storage", f"what this node writes to {token.parent} is not seen by the first node",
        "it has a folder of its own there: mount the shared file system on every node",
    )  # fmt: skip
    others = [other for other in report.results if other.check != "shared storage"]
    return replace(report, results=[*others, result])


def compare_clocks(reports: list[NodeReport], before: float, after: float) -> Iterator[Result]:
    """Every node read its clock between two readings of this one's, so what lies outside is skew.

    Args:
        reports: of the nodes.
        before, after: seconds since 1970, here, around the time when the nodes wrote their reports.
    """
    skewed = False
    for report in reports:
        apart = max(before - report.time, report.time - after, 0.0)
        if apart > CLOCK_SECONDS:
            skewed = True
            detail = f"differs from the first node's by at least {apart:.1f} s"
            yield replace(fail("clock", detail, "look at NTP (chronyc tracking)"), node=report.node)
    if reports and not skewed:
        yield ok("clock", f"{len(reports)} nodes agree within the {after - before:.1f} s that asking took")


def compare_versions(reports: list[NodeReport]) -> Iterator[Result]:
    """All nodes should have the versions that most of them have."""
    for package in sorted({name for report in reports for name in report.versions}):
        versions = [report.versions.get(package, "none") for report in reports]
        usual = max(versions, key=versions.count)
        for report, version in zip(reports, versions, strict=True):
            if version != usual:
                result = fail(
                    "packages", f"{package} is {version}, on other nodes {usual}",
                    "use one environment on shared storage, or one container image",
                )  # fmt: skip
                yield replace(result, node=report.node)


def compare_addresses(reports: list[NodeReport]) -> Iterator[Result]:
    """Every node's address must be one that the others reach; only nodes on one machine may use loopback.

    A first node whose name is 127.0.1.1 to itself is common, and the run then waits until its time is over.
    """
    own = {report.node: Route(report.address) for report in reports if report.address}
    remote = [node for node, route in own.items() if not route.is_loopback]
    if not remote:
        return
    for node in own.keys() - set(remote):
        detail = f"reaches the first node at {own[node].address}, where no other node reaches it"
        remedy = (
            "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) in the cluster file's environment to the "
            f"interface between nodes, or correct the node's name in /etc/hosts ({own[remote[0]].address} "
            f"is {remote[0]}'s address)"
        )
        yield replace(fail("network", detail, remedy), node=node)
    if len(remote) == len(own):
        yield ok("network", ", ".join(f"{node} {route.address}" for node, route in sorted(own.items())[:4]))


def _by_check(reports: list[NodeReport]) -> Iterator[Result]:
    """One line for each check all nodes pass, and one for each node and check that does not."""
    for check in dict.fromkeys(result.check for report in reports for result in report.results):
        about = [
            replace(result, node=report.node)
            for report in reports
            for result in report.results
            if result.check == check
        ]
        bad = [result for result in about if result.status != "ok"]
        good = sorted({result.detail for result in about if result.status == "ok"})
        yield from bad
        if good and not bad:
            more = f" (and {len(good) - 1} others)" if len(good) > 1 else ""
            yield ok(check, f"{len(reports)} nodes: {good[0]}{more}")
