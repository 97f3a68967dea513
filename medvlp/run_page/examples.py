"""Examples of a task on the page: masks and boxes over images, generated reports beside true ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup, escape

from medvlp.evaluation.examples import BoxExample, Examples, MaskExample, TextExample
from medvlp.evaluation.metrics.segmentation import dice, pixel_counts
from medvlp.evaluation.report import examples as files
from medvlp.evaluation.report.pictures import (
    SAID,
    TRUE,
    box_picture,
    drawn_boxes,
    letter,
    mask_picture,
    seen_image,
)
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.report_labels import labelled, marked, stated
from medvlp.evaluation.task import EvaluationError, tasks
from medvlp.library.dataset import Dataset, Sample
from medvlp.run_page.history import without_places
from medvlp.run_page.pictures import SIDE, data_url
from medvlp.run_page.showable import Asked, NotShownError, showable

#: Side of a picture with boxes, in pixels.
_BOX_SIDE = 320
_STATED = {1: "present", 0: "absent", -1: "uncertain"}


@dataclass(frozen=True)
class Picture:
    """A picture with what is under it, and what people hear who do not see it."""

    url: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Pictured:
    """One sample: pictures beside each other, and lines under them."""

    pictures: list[Picture]
    lines: list[str]


@dataclass(frozen=True)
class Written:
    """One sample's reports as HTML with marks, and which findings both, or only one of them state."""

    generated: Markup
    reference: Markup
    compared: str


@dataclass
class ExamplePart:
    """Examples of one unit of a task of one run; `remark`: why there are none."""

    run: str
    chosen: str = ""
    pictured: list[Pictured] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    remark: str = ""


def example_part(name: str, run: Path, evaluation: Evaluation, task: str, asked: Asked) -> ExamplePart | None:
    """The examples of the last unit of a task; None for a task that has none, or that the method cannot do.

    Args:
        name: of the run on the page.
    """
    kind = tasks().get(task)
    if kind is None or not kind.keeps_examples or not evaluation.results[task]:
        return None
    unit = next(reversed(evaluation.examples.get(task, {})), "whole")
    try:
        found = files.read(run, evaluation, task, unit)
        dataset = showable(
            str(evaluation.data.get("root")), evaluation.data["split"], evaluation.data["fingerprint"], asked
        )
        return _part(name, unit, found, dataset)
    except (EvaluationError, NotShownError) as error:
        return ExamplePart(name, remark=f"No examples: {without_places(str(error))}")


def _part(name: str, unit: str, examples: Examples, dataset: Dataset) -> ExamplePart:
    positions = {of.sample for kind in (examples.masks, examples.boxes, examples.texts) for of in kind}
    if any(position >= len(dataset) for position in positions):
        raise EvaluationError("they are of samples that the split does not have")
    part = ExamplePart(name, f"{examples.chosen} Of {unit}.")
    for mask in examples.masks:
        part.pictured.append(_masks(mask, examples, dataset[mask.sample]))
    for boxes in examples.boxes:
        part.pictured.append(_boxes(boxes, examples, dataset[boxes.sample]))
    names = labelled(dataset.label_names)
    part.written = [_texts(text, names) for text in examples.texts]
    return part


def _masks(example: MaskExample, of: Examples, sample: Sample) -> Pictured:
    image = seen_image(sample.image, of.side, of.crop, SIDE)
    truth, said = (files.mask_of(runs, of.side) for runs in (example.truth, example.predicted))
    finding = example.finding
    pictures = [
        Picture(
            data_url(mask_picture(image, mask, colour)),
            caption,
            f"Sample {sample.key}, {finding}, {caption}: {mask.mean():.1%} of the image",
        )
        for mask, colour, caption in ((truth, TRUE, "true mask"), (said, SAID, "predicted mask"))
    ]
    if truth.any():
        line = f"Dice {float(dice(pixel_counts(said, truth))):.2f}"
    else:
        line = f"known not to be there; {said.mean():.1%} of the image called"
    return Pictured(pictures, [f"{finding}: {line}"])


def _boxes(example: BoxExample, of: Examples, sample: Sample) -> Pictured:
    image = seen_image(sample.image, of.side, of.crop, _BOX_SIDE)
    truth = ", ".join(f"{box.finding} ({letter(number)})" for number, box in enumerate(example.truth))
    found = ", ".join(
        f"{box.finding} {box.score or 0:.2f} ({number})" for number, box in enumerate(drawn_boxes(example), 1)
    )
    lines = [f"True (solid): {truth}", f"Found (broken): {found or 'none'}"]
    picture = data_url(box_picture(image, example, of.side), _BOX_SIDE)
    return Pictured([Picture(picture, "", f"Sample {sample.key}. {'. '.join(lines)}")], lines)


def _texts(example: TextExample, names: list[str]) -> Written:
    both = stated([example.generated, example.reference], names).values == 1
    sides = {
        "stated as present in both": both[0] & both[1],
        "only in the generated report": both[0] & ~both[1],
        "only in the true report": both[1] & ~both[0],
    }
    compared = "; ".join(
        f"{said}: {', '.join(name for name, is_of in zip(names, of, strict=True) if is_of) or 'none'}"
        for said, of in sides.items()
    )
    return Written(_marked(example.generated, names), _marked(example.reference, names), compared)


def _marked(text: str, names: list[str]) -> Markup:
    """The text as HTML; the words that state a finding are marked, and said to be what they state."""
    shown, found = marked(text, names)
    html, end = Markup(""), 0
    for words in found:
        if words.start < end:
            continue
        kind = _STATED[words.value]
        html += escape(shown[end : words.start])
        html += Markup('<mark class="{}">{}<span class="heard"> ({})</span></mark>').format(
            kind, shown[words.start : words.end], kind
        )
        end = words.end
    return html + escape(shown[end:])
