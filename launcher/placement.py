"""Which node of a run this machine is, and where the nodes meet. No torch."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.slurm import slurm_commands
from medvlp.ranks import NODE_LAUNCH, LaunchError, first_node, job_port


@dataclass(frozen=True)
class Node:
    """Place of this machine in a run.

    Attributes:
        count: nodes of the run. index: this one, from 0.
        address, port: where global rank 0, on node 0, listens; port 0 of a single node: any that is free.
    """

    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def place_node(
    count: int | None, index: int | None, meet: str | None, environment: Mapping[str, str] = os.environ
) -> Node:
    """The place given on the command line, else by a Slurm step with one task a node, else of a single node.

    Args:
        count, index, meet: --nodes, --node-rank and --meet; all of them or none.
        environment: of this process.

    Raises:
        LaunchError: incomplete or contradictory options, or a first node that no name service knows.
    """
    if count is not None or index is not None or meet is not None:
        return _given(count, index, meet)
    if NODE_LAUNCH in environment and "SLURM_STEP_ID" in environment:
        return _slurm(environment)
    return Node()


def _given(count: int | None, index: int | None, meet: str | None) -> Node:
    if count == 1 and index in (None, 0) and meet is None:
        return Node()
    if count is None or index is None or meet is None:
        raise LaunchError("--nodes, --node-rank and --meet HOST:PORT belong together: give all three")
    if not 0 <= index < count:
        raise LaunchError(f"--node-rank {index} does not exist among {count} nodes: they count from 0")
    host, _, port = meet.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LaunchError(f"--meet {meet!r}: write HOST:PORT, the same on every node, of node 0")
    return Node(count, index, host.strip("[]"), int(port))


def _slurm(environment: Mapping[str, str]) -> Node:
    count = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
    if count == 1:
        return Node()
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or _reachable(first_node(nodes))
    port = int(environment.get("MASTER_PORT") or job_port(environment))
    return Node(count, int(environment["SLURM_NODEID"]), address, port)


def _reachable(node: str) -> str:
    """A node's name, or where names of nodes are Slurm's alone, the address that Slurm reaches it at."""
    try:
        socket.getaddrinfo(node, None)
    except socket.gaierror:
        address = slurm_commands.node_address(node)
        if address is None:
            raise LaunchError(
                f"the name of the first node, {node}, cannot be resolved here: set MASTER_ADDR in the "
                "cluster's environment"
            ) from None
        return address
    return node
