"""Errors of the prototype files, the server and its client."""

from __future__ import annotations

from shards.errors import MedvlpError


class PrototypeFilesError(MedvlpError):
    """What a run's folder `prototypes/` holds, or should hold, cannot be used."""

    exit_code = 4


class RequestError(MedvlpError, ValueError):
    """A question that cannot be answered as it is asked: wrong size, width, format or range."""

    exit_code = 2


class UnknownClusterError(RequestError):
    """There is no cluster of that number."""


class RemoteError(MedvlpError):
    """The server refused, or does not answer; the message is its own sentence."""

    exit_code = 11
