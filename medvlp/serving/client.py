"""Asking a server from Python: connect, send the token, turn gRPC's errors into sentences."""

import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import psutil
from google.protobuf.message import Message

from medvlp import trust
from medvlp.serving.access import is_loopback, metadata, read_token
from medvlp.serving.layout import ADDRESS, ADDRESS_LIMIT, SERVER, TOKEN, folder_of
from medvlp.serving.messages import from_message, image_request, nearest_request, text_request
from medvlp.serving.questions import (
    Answer,
    ClusterAnswer,
    ClustersAnswer,
    ClusterSummary,
    Modality,
    NearestAnswer,
    TableAnswer,
    Wanted,
)
from medvlp.serving.wire import prototypes_pb2 as wire
from medvlp.serving.wire.prototypes_pb2_grpc import PrototypesStub
from shards.errors import MedvlpError, UsageError
from shards.strict_json import parse_json, read_limited


class RemoteError(MedvlpError):
    """The server refused, or does not answer; the message is its own sentence."""

    exit_code = 11


#: Seconds a call may take, connecting included.
TIMEOUT = 60.0

#: gRPC would follow http_proxy to 127.0.0.1 too, and the proxy could read token and reports.
_NO_PROXY = [("grpc.enable_http_proxy", 0)]

Known = TypeVar("Known", bound=Answer)


@dataclass(frozen=True)
class Connection:
    """Where a server is and how to reach it.

    Attributes:
        address: "HOST:PORT". token: what its token file holds.
        authority: PEM file with the certificates to trust, for a server with TLS; None: no TLS.
        insecure_network: go to another machine without TLS, where whoever answers may read the token.
    """

    address: str
    token: str
    authority: Path | None = None
    insecure_network: bool = False

    @property
    def host(self) -> str:
        """The address without its port, and without the brackets of IPv6."""
        return self.address.rpartition(":")[0].strip("[]")


def connection_of(run: Path, token_file: Path | None = None, authority: Path | None = None) -> Connection:
    """The server of a run, from what it has written into `RUN/prototypes/server.json`.

    Raises:
        RemoteError: no server has, or its file is no description of one; it has ended, or listens on the
            loopback of another machine; or it speaks TLS and no authority is given.
        TrustError: the server is on another machine, and this user has not started it.
        PrototypeFilesError: the token cannot be read.
    """
    folder = folder_of(run)
    file = folder / ADDRESS
    try:
        content = parse_json(read_limited(file, ADDRESS_LIMIT), ADDRESS_LIMIT)
        address, tls = str(content["address"]), bool(content["tls"])
        if is_loopback(Connection(address, "").host):
            _check_is_here(run, file, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RemoteError(
            f"{file} names no server ({error}); start one: medvlp prototypes serve {run}"
        ) from error
    found = Connection(address, "", authority, insecure_network=not tls)
    # Texts and images are sent there: a stranger's folder must not say where, nor take TLS away.
    if not is_loopback(found.host) and not trust.is_said(SERVER, [address, tls]):
        raise trust.TrustError(
            f"{file} names a server on another machine that you have not started: if it is meant, ask it "
            f"with --server {shlex.quote(address)} --token-file {folder / TOKEN} --tls-ca CERTIFICATE"
        )
    if tls and authority is None:
        raise RemoteError(f"the server at {address} speaks TLS: give the certificate to trust with --tls-ca")
    return replace(found, token=read_token(token_file or folder / TOKEN))


def _check_is_here(run: Path, file: Path, content: dict[str, Any]) -> None:
    """Refuse to ask whoever listens on this machine's loopback in place of the server that `file` names.

    Raises:
        RemoteError: the server runs on another machine, or has ended.
    """
    if content["host"] != socket.gethostname():
        raise RemoteError(
            f"the server that {file} names listens on the loopback of "
            f"{shlex.quote(str(content['host']))} alone: ask there, ask the files "
            "with --offline, or start it with --host and TLS"
        )
    port = int(str(content["address"]).rpartition(":")[2])
    try:
        process = psutil.Process(int(content["pid"]))
        if process.uids().real == os.getuid() and any(
            of.status == psutil.CONN_LISTEN and of.laddr.port == port for of in process.net_connections("tcp")
        ):
            return
    except psutil.Error:
        pass  # gone, or another user's
    raise RemoteError(
        f"the server that {file} names (process {content['pid']}) is no more, or is another user's: start "
        f"one: medvlp prototypes serve {run}, or ask the files with --offline"
    )


class PrototypeClient:
    """Calls of one server; a context manager, safe to share by threads.

    Args:
        connection: where it is.
        timeout: seconds a call may take.

    Raises:
        RemoteError: the authority's file cannot be read.
        UsageError: the address is of another machine, and there is neither TLS nor `insecure_network`.
    """

    def __init__(self, connection: Connection, timeout: float = TIMEOUT) -> None:
        self.connection, self.timeout = connection, timeout
        self._metadata = metadata(connection.token)
        if connection.authority is None:
            if not (is_loopback(connection.host) or connection.insecure_network):
                raise UsageError(
                    f"{connection.address} may be another machine: give the certificate to trust with "
                    "--tls-ca, or say --insecure-network where everybody on that network may read "
                    "token and question"
                )
            self._channel = grpc.insecure_channel(connection.address, _NO_PROXY)
        else:
            try:
                trusted = grpc.ssl_channel_credentials(connection.authority.read_bytes())
            except OSError as error:
                raise RemoteError(f"{connection.authority} cannot be read: {error.strerror}") from error
            self._channel = grpc.secure_channel(connection.address, trusted, _NO_PROXY)
        self._stub = PrototypesStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def nearest(
        self, embeddings: Any, clusters: int = 1, samples: int = 0, of: Modality = "image"
    ) -> NearestAnswer:
        """[n, D] float16 or float32 embeddings -> their nearest clusters and samples.

        This and all calls below raise RemoteError with the server's sentence.
        """
        return self._call(
            "Nearest", nearest_request(embeddings, Wanted(clusters, samples, of)), NearestAnswer
        )

    def nearest_text(
        self, texts: Sequence[str], clusters: int = 1, samples: int = 0, of: Modality = "image"
    ) -> NearestAnswer:
        """The same for texts."""
        return self._call("NearestText", text_request(texts, Wanted(clusters, samples, of)), NearestAnswer)

    def nearest_image(
        self, files: Sequence[bytes], clusters: int = 1, samples: int = 0, of: Modality = "image"
    ) -> NearestAnswer:
        """The same for image files."""
        return self._call("NearestImage", image_request(files, Wanted(clusters, samples, of)), NearestAnswer)

    def clusters(self, first: int = 0, count: int = 0) -> ClustersAnswer:
        """A page of clusters."""
        return self._call("Clusters", wire.ClustersRequest(first=first, count=count), ClustersAnswer)

    def all_clusters(self) -> Iterator[ClusterSummary]:
        """Every cluster, page by page.

        Raises:
            RemoteError: also when the server changes to other clusters meanwhile.
        """
        page = self.clusters()
        first, stamp = 0, page.fingerprint
        while page.clusters:
            if page.fingerprint != stamp:
                raise RemoteError(
                    f"{self.connection.address} serves new clusters since the first page: ask again"
                )
            yield from page.clusters
            first += len(page.clusters)
            if first >= page.total:
                return
            page = self.clusters(first)

    def cluster(self, number: int) -> ClusterAnswer:
        """One cluster with its most typical samples."""
        return self._call("Cluster", wire.ClusterRequest(id=number), ClusterAnswer)

    def table(self) -> TableAnswer:
        """What is served, and the limits of requests."""
        return self._call("Table", wire.TableRequest(), TableAnswer)

    def _call(self, name: str, request: Message, kind: type[Known]) -> Known:
        try:
            reply = getattr(self._stub, name)(request, timeout=self.timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise RemoteError(self._sentence(error)) from error
        return from_message(reply, kind)

    def _sentence(self, error: Any) -> str:
        code, details = error.code(), error.details()
        where = self.connection.address
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
            return (
                f"no server answers at {where} ({details}): start one: medvlp prototypes serve RUN, or ask "
                "the files with --offline"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the server at {where} did not answer in {self.timeout:g} s ({details}): try again later"
        return f"the server at {where} refused ({code.name}): {details}"
