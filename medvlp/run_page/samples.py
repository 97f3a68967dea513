"""A few test images with what the model says of them; they make a page as confidential as its data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvlp.data.report import report_sentences
from medvlp.evaluation.prompts import read as read_prompts
from medvlp.evaluation.tasks.zero_shot import prompts_of
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
        report: the true one. nearest: the report nearest to the image. rank: of the true one among the
            `among` reports that the model reads; None where it does not read this one.
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
    asked = list(prompts_of(read_prompts(None), names)) if model.method.scores_prompts else []
    scores = model.zero_shot([films[row] for row in chosen], asked) if asked and chosen else None
    similar = None
    reports = [_read_by(model, sample) for sample in read]
    readable = [row for row, report in enumerate(reports) if _has_words(model, report)]
    if model.method.embeds_reports and readable and chosen:
        shown = model.encode_image([films[row] for row in chosen])
        similar = (shown @ model.encode_text([reports[row] for row in readable]).T).numpy()
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
                []
                if similar is None
                else [readable[of] for of in np.argsort(-similar[place], kind="stable")],
            )
        )
    return found


def _read_by(model: Model, sample: Sample) -> str:
    """The sections of a report that the model was trained on."""
    sections = sample.metadata["sections"]
    return "\n".join(sections[name] for name in model.config.data.sections if sections.get(name))


def _has_words(model: Model, report: str) -> bool:
    """Whether `encode_text` takes the report: the cleaning of the training may leave nothing of it."""
    sentences = report_sentences({"findings": report}, ["findings"], model.config.data.cleaning)
    return any(sentence.strip() for sentence in sentences)


def _shown(model: Model, read: list[Sample], row: int, scores: dict[str, float], nearest: list[int]) -> Shown:
    """One sample; `nearest`: rows of the readable reports, the nearest first."""
    sample = read[row]
    present = [name for name, value in sample.labels.items() if value == 1]
    overlay = finding = ""
    if model.method.grounds and present:
        finding = present[0]
        overlay = data_url(model.ground(sample.image, finding).overlay())
    return Shown(
        sample.key, data_url(sample.image), overlay, finding, present, scores, _read_by(model, sample),
        _read_by(model, read[nearest[0]]) if nearest else "",
        nearest.index(row) + 1 if row in nearest else None, len(nearest),
    )  # fmt: skip
