"""The doctor's report: a line for each finding, JSON for scripts, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from launcher.doctor.findings import BadNodesError, Finding, UnhealthyError

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def print_findings(findings: Sequence[Finding]) -> None:
    """A line for each finding on stdout, with its remedy below."""
    console = Console(soft_wrap=True, highlight=False)
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        colour = _COLOURS[finding.status]
        where = f"{finding.node}: " if finding.node else ""
        console.print(
            f"[{colour}]{finding.status:4}[/] {finding.check:{width}}  {escape(where + finding.detail)}"
        )
        if finding.remedy and finding.status != "ok":
            console.print(f"     {'':{width}}  -> {escape(finding.remedy)}")


def to_json(findings: Sequence[Finding]) -> str:
    """`{"status": worst, "bad_nodes": [...], "findings": [{check, status, detail, remedy, node}, ...]}`."""
    values = {
        "status": worst(findings),
        "bad_nodes": bad_nodes(findings),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(values, indent=1)


def worst(findings: Sequence[Finding]) -> str:
    """ "fail" if any check failed, else "warn" if any warned, else "ok"."""
    found = {finding.status for finding in findings}
    return next((status for status in ("fail", "warn") if status in found), "ok")


def bad_nodes(findings: Sequence[Finding]) -> list[str]:
    """Nodes of failed findings, sorted."""
    return sorted({finding.node for finding in findings if finding.status == "fail" and finding.node})


def raise_for(findings: Sequence[Finding], nodes: int) -> None:
    """End with an exit code if a check failed.

    Args:
        findings: all of them.
        nodes: number of nodes that were looked at.

    Raises:
        BadNodesError: only checks of some nodes failed (exit code 10): others are worth a try.
        UnhealthyError: others failed (exit code 9).
    """
    failed = [finding for finding in findings if finding.status == "fail"]
    if not failed:
        return
    named = bad_nodes(findings)
    if all(finding.node for finding in failed) and len(named) < nodes:
        raise BadNodesError(
            f"bad nodes: {','.join(named)} ({failed[0].check}: {failed[0].detail}); "
            f"without them: --exclude={','.join(named)}"
        )
    raise UnhealthyError(f"{len(failed)} checks failed; first: {failed[0].check}: {failed[0].detail}")
