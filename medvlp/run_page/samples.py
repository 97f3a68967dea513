"""A few test images with what the model says of them; they make a page as confidential as its data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvlp.library.dataset import Dataset, Sample
from medvlp.library.model import Model
from medvlp.run_page.pictures import data_url
from shards.errors import UsageError

#: Reports among which the nearest is looked for.
AMONG = 64


@dataclass(frozen=True)
class Shown:
    """One image.

    Attributes:
        key: of the sample. picture, overlay: data URLs; overlay "" where the method gives no maps.
        finding: the finding of the overlay, "" without. present: findings its labels state.
        scores: finding -> zero-shot score, the highest three of the labels.
        report: the true one. nearest: the report nearest to the image. rank: of the true one among `among`.
    """

    key: str
    picture: str
    overlay: str
    finding: str
    present: list[str]
    scores: dict[str, float]
    report: str
    nearest: str
    rank: int | None
    among: int


def shown_samples(model: Model, dataset: Dataset, count: int) -> list[Shown]:
    """The first samples with a present finding, each beside its nearest report.

    Raises:
        UsageError: the model compares no images with texts.
    """
    if not model.method.embeds_images:
        raise UsageError(f"{model.name} embeds no images: nothing it says of one can be shown")
    read = [dataset[number] for number in range(min(AMONG, len(dataset)))]
    chosen = sorted(range(len(read)), key=lambda row: 1 not in read[row].labels.values())[:count]
    films = [sample.image for sample in read]
    names = dataset.label_names
    asked = names if model.method.scores_prompts else []
    scores = model.zero_shot([films[row] for row in chosen], asked) if asked and chosen else None
    similar = None
    reports = [_read_by(model, sample) for sample in read]
    if model.method.embeds_reports and all(report.strip() for report in reports):
        shown = model.encode_image([films[row] for row in chosen])
        similar = (shown @ model.encode_text(reports).T).numpy()
    found = []
    for place, row in enumerate(chosen):
        best: dict[str, float] = {}
        if scores is not None:
            best = {str(name): float(value) for name, value in scores.iloc[place].nlargest(3).items()}
        found.append(
            _shown(
                model,
                read,
                row,
                {str(name): float(value) for name, value in best.items()},
                None if similar is None else similar[place],
            )
        )
    return found


def _read_by(model: Model, sample: Sample) -> str:
    """The sections of a report that the model was trained on."""
    sections = sample.metadata["sections"]
    return "\n".join(sections[name] for name in model.config.data.sections if sections.get(name))


def _shown(
    model: Model, read: list[Sample], row: int, scores: dict[str, float], similar: NDArray[np.floating] | None
) -> Shown:
    sample = read[row]
    present = [name for name, value in sample.labels.items() if value == 1]
    overlay = finding = ""
    if model.method.grounds and present:
        finding = present[0]
        overlay = data_url(model.ground(sample.image, finding).overlay())
    order = [] if similar is None else np.argsort(-similar, kind="stable").tolist()
    return Shown(
        sample.key, data_url(sample.image), overlay, finding, present, scores, _read_by(model, sample),
        _read_by(model, read[order[0]]) if order else "", order.index(row) + 1 if order else None, len(read),
    )  # fmt: skip
