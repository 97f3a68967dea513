"""A finding: what was looked at, how it stands, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from shards.errors import MedvlpError

Status = Literal["ok", "warn", "fail"]


class UnhealthyError(MedvlpError):
    """At least one check failed, on all nodes alike or where it does not matter which node it is."""

    exit_code = 9


class BadNodesError(MedvlpError):
    """Checks failed on some nodes of the job and not on others; the message names them."""

    exit_code = 10


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        check: short name of what was looked at.
        status: "ok"; "warn": a run starts, and may suffer; "fail": a run would not start, or would lose data.
        detail: what was found.
        remedy: what to do; empty where nothing needs to be done.
        node: host it is about; empty: this one, or all of them.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""
    node: str = ""


def ok(check: str, detail: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(check, "ok", detail)


def warn(check: str, detail: str, remedy: str) -> Finding:
    """A finding that a run survives."""
    return Finding(check, "warn", detail, remedy)


def fail(check: str, detail: str, remedy: str) -> Finding:
    """A finding that a run does not survive."""
    return Finding(check, "fail", detail, remedy)


def guarded(check: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of `look`; an error inside it is a failed check, for the others still have to be made."""
    try:
        return list(look())
    except Exception as error:  # whatever a broken installation raises is what the doctor is asked for
        reason = " ".join(str(error).split())[:300]
        return [fail(check, f"{type(error).__name__}: {reason}", "the check itself could not be made")]
