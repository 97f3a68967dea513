"""Everything of one run that stands on the page, and why some of it does not."""

from __future__ import annotations

from pathlib import Path

import medvlp
from medvlp.evaluation.report import results
from medvlp.run_page.clusters import cluster_part
from medvlp.run_page.examples import example_part
from medvlp.run_page.history import read_history, without_places
from medvlp.run_page.page import RunPart
from medvlp.run_page.samples import Shown, shown_samples
from medvlp.run_page.showable import Asked, NotShownError, showable
from medvlp.runs.manifest import WEIGHTS, Manifest
from shards.errors import NotFiniteError, UsageError
from shards.strict_json import PLAIN_NAME


def collect(run: Path, result: Path, asked: Asked, taken: set[str]) -> RunPart:
    """One run.

    Args:
        result: of its evaluation; need not be there.
        taken: names of the runs that are on the page; its own is told apart from them by its folder.

    Raises:
        MedvlpError: it is no run folder, or a file of it cannot be read.
    """
    history = read_history(run)
    history.name = _told_apart(history.name, run.resolve(), taken)
    part = RunPart(history, results.read(result) if result.is_file() else None)
    try:
        part.samples = _samples(part, run, asked)
    except (NotShownError, UsageError, NotFiniteError) as error:
        part.no_samples = without_places(str(error))
    if part.evaluation is not None:
        found = {task: example_part(history.name, run, part.evaluation, task, asked)
                 for task in part.evaluation.results}  # fmt: skip
        part.examples = {task: of for task, of in found.items() if of is not None}
    part.clusters = cluster_part(history, asked)
    return part


def _told_apart(name: str, folder: Path, taken: set[str]) -> str:
    """A name that is not taken: with the shortest end of its folder that tells it apart, if it has to be."""
    ends = ["/".join(folder.parts[-count:]) for count in range(2, len(folder.parts))]
    names = [name, *(f"{name} ({end})" for end in [*ends, folder])]
    return next(free for free in names if free not in taken)


def _samples(part: RunPart, run: Path, asked: Asked) -> list[Shown]:
    if part.evaluation is None:
        raise NotShownError("the run was not evaluated")
    about = part.evaluation.data
    dataset = showable(str(about.get("root")), about["split"], about["fingerprint"], asked)
    model = part.evaluation.model
    name = str(model.get("checkpoint"))
    checkpoint = run / "checkpoints" / name
    if not PLAIN_NAME.fullmatch(name) or not checkpoint.is_dir():
        raise NotShownError("the evaluated checkpoint is gone")
    # Another training in the same folder has checkpoints of the same names; files of before say no weights.
    weights = Manifest.read(checkpoint).files.get(WEIGHTS, {}).get("xxh3_128")
    if model.get("weights", "") not in ("", weights):
        raise NotShownError(f"{name} holds other weights than were evaluated")
    return shown_samples(medvlp.load(checkpoint), dataset, asked.samples)
