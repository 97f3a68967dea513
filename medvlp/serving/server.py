"""A gRPC server of one run's prototypes, from its address to its clean end."""

import json
import logging
import os
import resource
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from medvlp import trust
from medvlp.serving.access import StreamLimit, TokenCheck, loopback_behind
from medvlp.serving.answers import Answers
from medvlp.serving.door import Door
from medvlp.serving.layout import ADDRESS, ADDRESS_LIMIT, SERVER, PrototypeFilesError
from medvlp.serving.limits import Limits
from medvlp.serving.servicer import SERVICE, Servicer
from shards.atomic import atomic_write
from shards.errors import UsageError
from shards.strict_json import JsonError, parse_json, read_limited

logger = logging.getLogger(__name__)

#: Calls that are worked on at a time, and streams (reflection, watching health) among them.
_THREADS, STREAMS = 16, 4
#: Seconds that calls in flight get when the server ends.
_GRACE = 5.0
_KEEPALIVE = 60.0
#: Files that the process opens beside its connections, at most.
_OTHER_FILES = 512


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes:
        host: name or address of this machine. port: 0: a free one.
        tls_certificate, tls_key: PEM files; None: no TLS.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @property
    def tls(self) -> bool:
        """Whether the server speaks TLS."""
        return self.tls_certificate is not None

    def settled(self) -> "Address":
        """This address, where its host is a name for loopback the address of that.

        Others would take the name for one of the network, and send the token to whoever listens there. With
        TLS the name stays, which is that of the certificate.
        """
        own = loopback_behind(self.host)
        if own is None:
            return self
        logger.warning(
            "--host %s is %s on this machine, where nobody else reaches the server: give an address of the "
            "network to serve others", self.host, own,
        )  # fmt: skip
        return self if self.tls else replace(self, host=own)

    def advertised(self, port: int) -> str:
        """The "HOST:PORT" that clients should connect to."""
        host = socket.getfqdn() if self.host in ("0.0.0.0", "::") else self.host
        return _joined(host, port)


class PrototypeServer:
    """The server; it answers UNAVAILABLE until it is given something to answer from.

    Args:
        address: where to listen.
        token: what every call must bring.
        limits: of requests and connections.

    Raises:
        UsageError: the address is in use or not of this machine, a TLS file cannot be used, or the process
            may not open so many connections.
    """

    def __init__(self, address: Address, token: str, limits: Limits) -> None:
        _allow_files(limits.connections + _OTHER_FILES)
        self.address, self.limits = address, limits
        self.servicer = Servicer(limits)
        self._health = health.HealthServicer()
        self._door = Door(limits)
        self._server = grpc.server(
            # Calls are the parallelism: a product of one row would wake a second core for nothing.
            ThreadPoolExecutor(_THREADS, "prototypes", torch.set_num_threads, (1,)),
            interceptors=[TokenCheck(token, self._door), StreamLimit(STREAMS)],
            options=_options(limits),
            maximum_concurrent_rpcs=limits.calls,
        )
        self._server.add_generic_rpc_handlers((self.servicer.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._serving(False)
        where = _joined(address.host, address.port)
        try:
            credentials = _credentials(address)
            self.port: int = (
                self._server.add_insecure_port(where)
                if credentials is None
                else self._server.add_secure_port(where, credentials)
            )
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"cannot listen on {where}: it is in use or not of this machine (or the TLS "
                f"files do not fit together); give another --host or --port ({error})"
            ) from error

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        self._door.watch(self.port)

    def publish(self, answers: Answers) -> None:
        """Answer from these from now on."""
        answers.prepare()
        self.servicer.answers = answers
        self._serving(True)

    def stop(self, grace: float = _GRACE) -> None:
        """Take no more calls, let those in flight end within `grace` seconds, and close."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait(2 * grace + 1)
        self._door.close()

    def describe(self, folder: Path, run: Path) -> None:
        """Write `server.json`, for the client commands.

        Raises:
            PrototypeFilesError: the folder cannot be made.
        """
        answers = self.servicer.answers
        address = self.address.advertised(self.port)
        trust.remember(SERVER, [address, self.address.tls])
        content = {
            "address": address,
            "tls": self.address.tls,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "run": str(run.resolve()),
            "fingerprint": None if answers is None else answers.snapshot.table.fingerprint,
            "version": None if answers is None else answers.snapshot.table.version,
            "step": None if answers is None else answers.snapshot.origin.step,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PrototypeFilesError(f"{folder} cannot be made: {error.strerror}") from error
        atomic_write(folder / ADDRESS, (json.dumps(content, indent=1) + "\n").encode())

    def forget(self, folder: Path) -> None:
        """Remove `server.json`, unless another server has written its own since."""
        file = folder / ADDRESS
        try:
            content = parse_json(read_limited(file, ADDRESS_LIMIT), ADDRESS_LIMIT)
        except (OSError, JsonError):
            return
        own = {"pid": os.getpid(), "host": socket.gethostname()}
        if isinstance(content, dict) and own.items() <= content.items():
            file.unlink(missing_ok=True)

    def _serving(self, yes: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE.full_name):
            self._health.set(name, status.SERVING if yes else status.NOT_SERVING)


def _joined(host: str, port: int) -> str:
    """As gRPC reads it: an address of IPv6, which has colons of its own, in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _options(limits: Limits) -> list[tuple[str, int]]:
    """gRPC's own limits, see grpc/impl/channel_arg_names.h."""
    return [
        ("grpc.so_reuseport", 0),  # a second server on the same port is refused instead of sharing calls
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_metadata_size", 8192),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(1000 * limits.handshake_seconds)),
        ("grpc.max_connection_idle_ms", int(1000 * limits.idle_seconds)),
        ("grpc.keepalive_time_ms", int(1000 * _KEEPALIVE)),
        ("grpc.keepalive_timeout_ms", int(1000 * limits.handshake_seconds)),
    ]


def _allow_files(count: int) -> None:
    """Let this process open so many files: many shells start it with 1024, which the connections use up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise UsageError(
            f"--max-connections {count - _OTHER_FILES} needs {count} open files, and this process may open "
            f"{hard}: raise that (ulimit -Hn), or give a smaller --max-connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _credentials(address: Address) -> grpc.ServerCredentials | None:
    if address.tls_certificate is None and address.tls_key is None:
        return None
    if address.tls_certificate is None or address.tls_key is None:
        raise UsageError("TLS needs both --tls-cert and --tls-key")
    try:
        pair = (address.tls_key.read_bytes(), address.tls_certificate.read_bytes())
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair])
