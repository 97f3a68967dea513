"""A check and what it finds; how results are shown, and the exit code that follows from them."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, Literal, TypeVar

from rich.markup import escape

from launcher.console import Console
from shards.errors import MedvlpError

Status = Literal["ok", "warn", "fail"]
#: What a check looks at.
Here = TypeVar("Here")

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


class UnhealthyError(MedvlpError):
    """At least one check failed, on all nodes alike or where it does not matter which node it is."""

    exit_code = 9


class BadNodesError(MedvlpError):
    """Checks failed on some nodes of the job and not on others; the message names them."""

    exit_code = 10


@dataclass(frozen=True)
class Result:
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


def ok(check: str, detail: str) -> Result:
    """A result that asks for nothing."""
    return Result(check, "ok", detail)


def warn(check: str, detail: str, remedy: str) -> Result:
    """A result that a run survives."""
    return Result(check, "warn", detail, remedy)


def fail(check: str, detail: str, remedy: str) -> Result:
    """A result that a run does not survive."""
    return Result(check, "fail", detail, remedy)


@dataclass(frozen=True)
class Check(Generic[Here]):
    """One look at something that a run needs.

    Attributes:
        name: short name of what is looked at.
        look: what is found there, each result with a remedy of its own where there is something to do.
        remedy: what to do when the look itself breaks off.
        applies: whether there is anything to look at.
    """

    name: str
    look: Callable[[Here], Iterable[Result]]
    remedy: str
    applies: Callable[[Here], bool] = lambda here: True


def examine(checks: Iterable[Check[Here]], here: Here) -> list[Result]:
    """Make every check that applies; one that breaks off has failed, for the others still have to be made."""
    results: list[Result] = []
    for check in checks:
        if not check.applies(here):
            continue
        try:
            results += list(check.look(here))
        except Exception as error:  # whatever a broken installation raises is what the doctor is asked for
            reason = " ".join(str(error).split())[:300]
            results.append(fail(check.name, f"{type(error).__name__}: {reason}", check.remedy))
    return results


def print_results(results: Sequence[Result]) -> None:
    """A line for each result on stdout, with its remedy below."""
    console = Console(soft_wrap=True, highlight=False)
    width = max((len(result.check) for result in results), default=0)
    for result in results:
        colour = _COLOURS[result.status]
        where = f"{result.node}: " if result.node else ""
        console.print(
            f"[{colour}]{result.status:4}[/] {result.check:{width}}  {escape(where + result.detail)}"
        )
        if result.remedy and result.status != "ok":
            console.print(f"     {'':{width}}  -> {escape(result.remedy)}")


def to_json(results: Sequence[Result]) -> str:
    """`{"status": worst, "bad_nodes": [...], "findings": [{check, status, detail, remedy, node}, ...]}`."""
    values = {
        "status": worst(results),
        "bad_nodes": bad_nodes(results),
        "findings": [asdict(result) for result in results],
    }
    return json.dumps(values, indent=1)


def worst(results: Sequence[Result]) -> str:
    """ "fail" if any check failed, else "warn" if any warned, else "ok"."""
    found = {result.status for result in results}
    return next((status for status in ("fail", "warn") if status in found), "ok")


def bad_nodes(results: Sequence[Result]) -> list[str]:
    """Nodes of failed results, sorted."""
    return sorted({result.node for result in results if result.status == "fail" and result.node})


def raise_for(results: Sequence[Result], nodes: int) -> None:
    """End with an exit code if a check failed.

    Args:
        results: all of them.
        nodes: number of nodes that were looked at.

    Raises:
        BadNodesError: only checks of some nodes failed (exit code 10): others are worth a try.
        UnhealthyError: others failed (exit code 9).
    """
    failed = [result for result in results if result.status == "fail"]
    if not failed:
        return
    named = bad_nodes(results)
    if all(result.node for result in failed) and len(named) < nodes:
        raise BadNodesError(
            f"bad nodes: {','.join(named)} ({failed[0].check}: {failed[0].detail}); "
            f"without them: --exclude={','.join(named)}"
        )
    raise UnhealthyError(f"{len(failed)} checks failed; first: {failed[0].check}: {failed[0].detail}")
