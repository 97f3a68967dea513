"""The calls of `prototypes.proto` on a gRPC server: limits, parsing, errors as statuses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import torch
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from medvlp.serving.answers import Answers
from medvlp.serving.limits import Limits, RateLimit, peer_address
from medvlp.serving.messages import rows_of, to_message, wanted_of
from medvlp.serving.questions import Answer, RequestError, UnknownClusterError
from medvlp.serving.wire import prototypes_pb2 as wire
from shards.errors import MedvlpError

logger = logging.getLogger(__name__)

SERVICE = wire.DESCRIPTOR.services_by_name["Prototypes"]


class Servicer:
    """Answers calls from the snapshot of the moment; a call that has begun keeps the one it began with.

    Args:
        limits: of requests.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.answers: Answers | None = None
        self._rate = RateLimit(limits.rate)
        self._waiting = threading.BoundedSemaphore(limits.waiting)
        self._model = threading.Lock()
        self._cores = torch.get_num_threads()
        self._calls: dict[str, Callable[[Answers, Any, grpc.ServicerContext], Answer]] = {
            "Nearest": self._nearest,
            "NearestText": self._with_model(
                lambda answers, request: answers.nearest_text(request.texts, wanted_of(request.wanted))
            ),
            "NearestImage": self._with_model(
                lambda answers, request: answers.nearest_image(request.images, wanted_of(request.wanted))
            ),
            "Clusters": lambda answers, request, context: answers.clusters(request.first, request.count),
            "Cluster": lambda answers, request, context: answers.cluster(request.id),
            "Table": lambda answers, request, context: answers.table(),
        }

    def handlers(self) -> grpc.GenericRpcHandler[bytes, Message]:
        """What `grpc.Server.add_generic_rpc_handlers` takes.

        Requests arrive as bytes and are parsed here, because gRPC's own parsing turns malformed ones into an
        internal error of the server.
        """
        methods = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._handler(
                    method.name, GetMessageClass(method.input_type), GetMessageClass(method.output_type)
                ),
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in SERVICE.methods
        }
        return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)

    def _handler(
        self, name: str, request_type: type[Message], reply_type: type[Message]
    ) -> Callable[[bytes, grpc.ServicerContext], Message]:
        call = self._calls[name]

        def handle(data: bytes, context: grpc.ServicerContext) -> Message:
            if not self._rate.allows(peer_address(context.peer())):
                _abort(
                    context,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"more than {self.limits.rate:g} requests a second from one address: wait, or put more "
                    "rows into a request",
                )
            answers = self.answers
            if answers is None:
                _abort(
                    context,
                    grpc.StatusCode.UNAVAILABLE,
                    "the run has no checkpoint yet: try again after its first one",
                )
            try:
                return to_message(call(answers, request_type.FromString(data), context), reply_type)
            except DecodeError:
                _abort(
                    context,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"the request is no {request_type.DESCRIPTOR.full_name}: use the messages of "
                    "prototypes.proto",
                )
            except UnknownClusterError as error:
                _abort(context, grpc.StatusCode.NOT_FOUND, str(error))
            except RequestError as error:
                _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except MedvlpError as error:
                _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))

        return _logged(handle)

    def _nearest(
        self, answers: Answers, request: wire.NearestRequest, context: grpc.ServicerContext
    ) -> Answer:
        rows = rows_of(request, answers.width, self.limits.rows)
        return answers.nearest(rows, wanted_of(request.wanted), context.is_active)

    def _with_model(
        self, call: Callable[[Answers, Any], Answer]
    ) -> Callable[[Answers, Any, grpc.ServicerContext], Answer]:
        """One call at a time; a few may wait for their turn as long as their deadline and ours allow."""

        def turn(answers: Answers, request: Any, context: grpc.ServicerContext) -> Answer:
            if not self._waiting.acquire(blocking=False):
                _abort(
                    context,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self.limits.waiting} requests for the model are waiting already: try again later, or "
                    "put more texts or images into a request",
                )
            try:
                remaining = context.time_remaining()
                longest = self.limits.deadline_seconds
                timeout = longest if remaining is None else max(0.0, min(remaining, longest))
                if not self._model.acquire(timeout=timeout):
                    _abort(
                        context,
                        grpc.StatusCode.DEADLINE_EXCEEDED,
                        "the model was busy for all of the call's time: try again later",
                    )
                try:
                    torch.set_num_threads(self._cores)
                    return call(answers, request)
                finally:
                    torch.set_num_threads(1)  # as in all threads of the server
                    self._model.release()
            finally:
                self._waiting.release()

        return turn


def _logged(
    handle: Callable[[bytes, grpc.ServicerContext], Message],
) -> Callable[[bytes, grpc.ServicerContext], Message]:
    """An error nobody foresaw goes to the log; the peer gets no text of it, which could hold a report's."""

    def safely(data: bytes, context: grpc.ServicerContext) -> Message:
        try:
            return handle(data, context)
        except Exception:
            if context.code() is None:  # type: ignore[attr-defined]  # else it is gRPC's way of ending a call with a status
                logger.exception("a call failed")
                _abort(context, grpc.StatusCode.INTERNAL, "the server failed: look into its log")
            raise

    return safely


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> NoReturn:
    context.abort(code, reason)
    raise AssertionError("abort raises")
