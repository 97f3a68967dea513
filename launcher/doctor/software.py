"""Python and the packages, against what the project requires."""

import platform
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from launcher.doctor.results import Result, fail, ok, warn

#: Extras of which one is needed.
_ALTERNATIVES = ("cpu", "gpu")
#: Extras that a cluster does without.
_FOR_DEVELOPERS = ("dev",)


def check_software() -> list[Result]:
    """Python's version, every required package, and the extras."""
    project = _project()
    results = [_python(str(project.get("requires-python", "")))]
    results.append(_required(_parsed(project["dependencies"])))
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    problems = {
        extra: _problems(_parsed(texts)) for extra, texts in extras.items() if extra not in _FOR_DEVELOPERS
    }
    alternatives = [problems.pop(extra) for extra in _ALTERNATIVES if extra in problems]
    if alternatives and all(alternatives):
        text = "; ".join(problem for found in alternatives for problem in found)
        remedy = f"for the prototype service: pip install 'medvlp[{_ALTERNATIVES[0]}]'"
        results.append(warn("packages", f"no faiss: {text}", remedy))
    results += [
        warn("packages", f"{extra}: {'; '.join(found)}", f"pip install 'medvlp[{extra}]'")
        for extra, found in problems.items()
        if found
    ]
    return results


def check_offload() -> Result:
    """Whether DeepSpeed's CPU Adam can be compiled, where there are GPUs that a run would offload from."""
    import torch

    from medvlp.training.deepspeed_config import missing_build_tools

    missing = missing_build_tools()
    if not missing:
        return ok("offload", "a C++ compiler and ninja are here")
    detail = "zero.offload_optimizer makes DeepSpeed compile its CPU Adam at the first start; there is no "
    detail += " and no ".join(each.partition(":")[0] for each in missing)
    remedy = "; ".join(each.partition(": ")[2] for each in missing)
    if not torch.cuda.is_available():
        return warn("offload", detail, f"where the run's nodes are like this one: {remedy}")
    return fail("offload", detail, f"{remedy}; or turn it off")


def _project() -> dict[str, Any]:
    """The `project` table of the checkout (it may be newer than what was installed), or what pip knows."""
    checkout = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if checkout.is_file():
        table: dict[str, Any] = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        return table
    about = metadata.metadata("medvlp")
    # Among these are the extras' packages, each with a marker that `_parsed` finds untrue.
    return {"requires-python": about["Requires-Python"], "dependencies": metadata.requires("medvlp") or []}


def _parsed(texts: list[str]) -> list[Requirement]:
    """Requirements that hold on this Python and without extras."""
    parsed = [Requirement(text) for text in texts]
    return [needed for needed in parsed if needed.marker is None or needed.marker.evaluate({"extra": ""})]


def _python(required: str) -> Result:
    version = platform.python_version()
    if required and version not in SpecifierSet(required):
        return fail(
            "python",
            f"{version} at {sys.executable}; required is {required}",
            "make the environment with another Python",
        )
    return ok("python", f"{version} at {sys.executable}")


def _required(requirements: list[Requirement]) -> Result:
    problems = _problems(requirements)
    if problems:
        return fail(
            "packages",
            "; ".join(problems),
            "pip install --editable . in the checkout, with .ci/constraints.txt",
        )
    return ok("packages", f"{len(requirements)} required packages, medvlp {metadata.version('medvlp')}")


def _problems(requirements: list[Requirement]) -> list[str]:
    problems = []
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}, required is {requirement.specifier}")
    return problems
