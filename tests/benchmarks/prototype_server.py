"""How fast the prototype server answers, beside an empty gRPC call and a plain matrix product.

    python tests/benchmarks/prototype_server.py [--clusters 500] [--width 128] [--seconds 3] [--clients 2]

Server, rival and clients are processes of their own on loopback. The clients keep several calls in flight on
one connection each. The rival of a call is one that carries the same bytes to a Python gRPC server without
token, limits or parsing, which sends them back; the limit of a batch is `torch.topk` of the matrix product in
one process. A query is one embedding with its nearest cluster. Exits with 1 where several clients get less
than 0.3 of the rival's calls a second with one query, 0.2 with 64, or where an idle connection costs the
server more than 64 KiB.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from medvlp.prototypes.table import PrototypeTable
from medvlp.serving.access import metadata
from medvlp.serving.answers import Answers
from medvlp.serving.limits import Limits
from medvlp.serving.messages import nearest_request
from medvlp.serving.questions import Wanted
from medvlp.serving.server import Address, PrototypeServer
from medvlp.serving.servicer import SERVICE
from medvlp.serving.snapshot import Origin, Snapshot, pack_keys

TOKEN = "a-token-for-the-benchmark-alone"
METHOD = f"/{SERVICE.full_name}/Nearest"
ECHO = "/rival.Echo/Echo"
SAMPLES = 20_000
#: Shares of the rival's calls with one query and with 64.
TARGETS = (0.3, 0.2)
IDLE, IDLE_BYTES = 500, 64 << 10
#: What a client sends first on an HTTP/2 connection: the preface and empty settings.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@dataclass(frozen=True)
class Load:
    """What the clients do: the bytes of a call, calls in flight on each connection, clients, seconds."""

    method: str
    data: bytes
    in_flight: int
    clients: int
    seconds: float


@dataclass(frozen=True)
class Server:
    """A server process, the pipe that ends it, and its port."""

    process: Any
    pipe: Pipe
    port: int


def serve(pipe: Pipe, clusters: int, width: int) -> None:
    """The prototype server with random clusters and samples."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(SAMPLES, width, generator=generator), dim=1)
    origin = Origin("kmeans", "benchmark", "step-00000001", 1, "data", "train", ["finding"], 224)
    snapshot = Snapshot(
        table=PrototypeTable.start(torch.randn(clusters, width, generator=generator)),
        image=rows.half(),
        report=None,
        sample=torch.arange(SAMPLES),
        labels=torch.zeros(SAMPLES, 1, dtype=torch.int8),
        keys=pack_keys([f"{number:08d}-0" for number in range(SAMPLES)]),
        origin=origin,
    )
    limits = Limits(rate=0)
    server = PrototypeServer(Address(), TOKEN, limits)
    server.publish(Answers(snapshot, _no_model, limits))
    server.start()
    pipe.send(server.port)
    pipe.recv()
    server.stop(0)


def _no_model() -> Any:
    raise AssertionError("nothing here is encoded")


def echo(pipe: Pipe) -> None:
    """The rival: a server that sends back what it gets."""
    server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("rival.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(port)
    pipe.recv()
    server.stop(0)


def client(pipe: Pipe) -> None:
    """A client process: for every (port, load) answers (calls, seconds, median seconds of a call)."""
    while (task := pipe.recv()) is not None:
        pipe.send(asyncio.run(ask(*task)))


async def ask(port: int, load: Load) -> tuple[int, float, float]:
    """Keep `in_flight` calls going on one connection for `seconds`."""
    times: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(load.method)
        await call(load.data, metadata=metadata(TOKEN))
        begun = time.perf_counter()

        async def repeat() -> None:
            while (now := time.perf_counter()) < begun + load.seconds:
                await call(load.data, metadata=metadata(TOKEN))
                times.append(time.perf_counter() - now)

        await asyncio.gather(*(repeat() for _ in range(load.in_flight)))
        return len(times), time.perf_counter() - begun, float(np.median(times))


@dataclass(frozen=True)
class Rate:
    """Calls a second over all clients, median seconds of a call, CPU seconds of the server for each."""

    calls: float
    median: float
    cpu: float


def measure(clients: list[Pipe], server: Server, load: Load) -> Rate:
    """Let the first `load.clients` clients ask at the same time."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times()
    for pipe in clients[: load.clients]:
        pipe.send((server.port, load))
    found = [pipe.recv() for pipe in clients[: load.clients]]
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    calls = sum(calls for calls, *_ in found)
    return Rate(
        sum(calls / seconds for calls, seconds, _ in found),
        float(np.mean([median for *_, median in found])),
        used / calls,
    )


def product_rate(clusters: int, width: int, batch: int) -> float:
    """Queries a second of the matrix product and its largest entry, in this process on one thread."""
    torch.set_num_threads(1)
    rows, centroids = torch.randn(batch, width), torch.randn(clusters, width)
    rounds = max(20, 20_000 // batch)
    started = time.perf_counter()
    for _ in range(rounds):
        (rows @ centroids.T).topk(1, dim=1)
    return rounds * batch / (time.perf_counter() - started)


def idle_cost(server: Server, hello: bytes) -> float:
    """Bytes of resident memory the server grows by for each of `IDLE` connections that only say `hello`."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(IDLE)]
    for connection in connections:
        connection.sendall(hello)
    time.sleep(1)
    grown = process.memory_info().rss - before
    for connection in connections:
        connection.close()
    return grown / IDLE


def started(target: Callable[..., None], *arguments: Any) -> tuple[Any, Pipe]:
    """A process, and the pipe to talk to it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=target, args=(other, *arguments))
    process.start()
    return process, pipe


def start_server(target: Callable[..., None], *arguments: Any) -> Server:
    """A server process that listens."""
    process, pipe = started(target, *arguments)
    return Server(process, pipe, pipe.recv())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=2)
    options = parser.parse_args()
    server = start_server(serve, options.clusters, options.width)
    rival = start_server(echo)
    clients = [started(client) for _ in range(options.clients)]
    pipes = [pipe for _, pipe in clients]
    table = Table(title=f"K = {options.clusters}, D = {options.width}, loopback, {os.cpu_count()} cores")
    columns = (
        "call",
        "clients",
        "calls/s",
        "queries/s",
        "median",
        "server CPU",
        "empty call",
        "product",
        "of empty",
        "goal",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "call" else "right")
    reached = True
    cases = [
        ("1 query", 1, 0, 1, 1, 0.0), ("1 query", 1, 0, options.clients, 8, TARGETS[0]),
        ("64 queries", 64, 0, options.clients, 8, TARGETS[1]),
        ("1024 queries", 1024, 0, options.clients, 2, 0.0),
        ("1 query and 10 samples", 1, 10, options.clients, 8, 0.0),
    ]  # fmt: skip
    for name, batch, samples, count, in_flight, goal in cases:
        rows = np.random.default_rng(0).normal(size=(batch, options.width))
        data = nearest_request(rows, Wanted(samples=samples)).SerializeToString()
        rate = measure(pipes, server, Load(METHOD, data, in_flight, count, options.seconds))
        empty = measure(pipes, rival, Load(ECHO, data, in_flight, count, options.seconds))
        reached = reached and rate.calls >= goal * empty.calls
        table.add_row(
            name, f"{count} x {in_flight}", f"{rate.calls:,.0f}", f"{batch * rate.calls:,.0f}",
            f"{1e3 * rate.median:.2f} ms", f"{1e6 * rate.cpu:,.0f} us",
            f"{empty.calls:,.0f}/s, {1e6 * empty.cpu:,.0f} us",
            f"{product_rate(options.clusters, options.width, batch):,.0f}/s",
            f"{rate.calls / empty.calls:.2f}", f"{goal:g}" if goal else "",
        )  # fmt: skip
    Console(width=130).print(table)
    silent, greeting = (idle_cost(server, hello) for hello in (b"", PREFACE))
    print(
        f"{IDLE} idle connections: {silent / 1024:.1f} KiB each, {greeting / 1024:.1f} KiB with HTTP/2 open"
    )
    for process, pipe in [(server.process, server.pipe), (rival.process, rival.pipe), *clients]:
        pipe.send(None)
        process.join()
    return 0 if reached and max(silent, greeting) <= IDLE_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
