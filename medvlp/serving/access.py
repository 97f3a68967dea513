"""Who may ask: the token of a server, and whether its address may do without TLS."""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from medvlp.serving.door import Door
from medvlp.serving.layout import PrototypeFilesError
from shards.errors import UsageError

if TYPE_CHECKING:
    _Interceptor = grpc.ServerInterceptor[Any, Any]
else:  # generic in its type stubs only
    _Interceptor = grpc.ServerInterceptor

_SHORTEST = 16
_SCHEME = "Bearer "
_REMEDY = "send the one of the server's token file as metadata 'authorization: Bearer TOKEN'"


def read_token(path: Path) -> str:
    """The token in a file that nobody else can read.

    Raises:
        PrototypeFilesError: missing, readable by others, or no token.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise PrototypeFilesError(f"{path} can be read by others: run chmod 600 {path}")
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no ASCII text"
        raise PrototypeFilesError(f"the token file {path} cannot be read: {reason}") from error
    if len(token) < _SHORTEST or not token.isprintable() or " " in token:
        raise PrototypeFilesError(
            f"{path} holds no token: one line of at least {_SHORTEST} characters without spaces is needed"
        )
    return token


def make_token(path: Path) -> str:
    """The token in a file, which is made with a random one, for its owner alone, where it does not exist.

    Raises:
        PrototypeFilesError: it cannot be written, or `read_token` refuses it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return read_token(path)
    except OSError as error:
        raise PrototypeFilesError(f"the token file {path} cannot be made: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return read_token(path)


def check_network(host: str, tls: bool, insecure_network: bool) -> None:
    """Refuse to send tokens and keys over a network unprotected.

    Raises:
        UsageError: the host cannot be resolved, or is not this machine alone and there is no TLS.
    """
    if not (all(map(is_loopback, _addresses(host))) or tls or insecure_network):
        raise UsageError(
            f"--host {host} can be reached from other machines: give --tls-cert and --tls-key, or say "
            "--insecure-network where everybody on that network may read the token"
        )


def _addresses(host: str) -> list[str]:
    try:
        return [str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {error}; give an address of this machine") from error


def is_loopback(host: str) -> bool:
    """Whether an address, or `localhost`, is this machine alone; other names are not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_behind(host: str) -> str | None:
    """The address that a name has where it means this machine alone to itself, and others another address.

    Debian has a machine's own name so in /etc/hosts. None for any other name, and for addresses.

    Raises:
        UsageError: the host cannot be resolved.
    """
    found = [] if is_loopback(host) else _addresses(host)
    return found[0] if found and all(map(is_loopback, found)) else None


def metadata(token: str) -> list[tuple[str, str]]:
    """What a client sends with every call."""
    return [("authorization", _SCHEME + token)]


class TokenCheck(_Interceptor):
    """Refuses every call, health and reflection included, that does not bring the token.

    Args:
        token: the right one.
        door: counts wrong ones and remembers who has shown the right one.
    """

    def __init__(self, token: str, door: Door) -> None:
        self._expected = (_SCHEME + token).encode()
        self._door = door

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> grpc.RpcMethodHandler[Any, Any]:
        given = next(
            (value for name, value in handler_call_details.invocation_metadata if name == "authorization"), ""
        )
        given = given if isinstance(given, bytes) else given.encode("utf-8", "replace")
        if not hmac.compare_digest(given, self._expected):
            reason = f"wrong token: {_REMEDY}" if given else f"no token: {_REMEDY}"
            return _ending(lambda context: self._door.refuse(context, reason, guess=bool(given)))
        handler = continuation(handler_call_details)
        return _ending(self._unknown_method) if handler is None else _admitting(handler, self._door)

    def _unknown_method(self, context: grpc.ServicerContext) -> None:
        self._door.admit(context)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


class StreamLimit(_Interceptor):
    """Lets only a few calls with streams (reflection, watching health) run at a time: each holds a thread."""

    def __init__(self, most: int) -> None:
        self._free = threading.BoundedSemaphore(most)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: grpc.RpcMethodHandler[Any, Any] | None = continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        stream: Any = handler.stream_stream or handler.unary_stream

        def limited(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            if not self._free.acquire(blocking=False):
                context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams are open: close one, or try later"
                )
            try:
                answers = stream(request, context)
                # Watching health is told of the end of a call only where the call has not ended by now.
                if context.is_active():
                    yield from answers
            finally:
                self._free.release()

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(limited, handler.request_deserializer, handler.response_serializer)


def _ending(end: Callable[[grpc.ServicerContext], None]) -> grpc.RpcMethodHandler[Any, Any]:
    """Ends a call of any kind without reading its request."""

    def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        end(context)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)


def _admitting(handler: Any, door: Door) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler behind the door. Of every kind it makes one of streams, where a request is read here."""

    def admitted(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        door.admit(context)
        argument: Any = requests
        if not handler.request_streaming:
            with door.reading(context):
                argument = next(requests, None)
            if argument is None:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")
        if handler.response_streaming:
            yield from (handler.stream_stream or handler.unary_stream)(argument, context)
        else:
            yield (handler.unary_unary or handler.stream_unary)(argument, context)

    return grpc.stream_stream_rpc_method_handler(
        admitted, handler.request_deserializer, handler.response_serializer
    )
