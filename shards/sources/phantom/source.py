"""The phantom source: numbered synthetic studies with images, reports and exact annotations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.sources.base import Source, option
from shards.sources.phantom.anatomy import Anatomy
from shards.sources.phantom.findings import FINDINGS, Finding, draw_course
from shards.sources.phantom.questions import ask
from shards.sources.phantom.render import render
from shards.sources.phantom.report import write_report
from shards.sources.phantom.seeds import Stream, generator
from shards.sources.registry import register
from shards.study import LabelValue, Phrase, Study

_VISITS = (0.7, 0.2, 0.1)  # share of patients with one, two and three studies
_PORTABLE = 0.35  # share of AP views


@dataclass(frozen=True)
class PhantomOptions:
    """Options of `medvlp shards build phantom`."""

    studies: int = option("number of studies", 200, least=1)
    seed: int = option("seed of anatomy, findings and reports", 0, least=0)


@register("phantom", PhantomOptions)
def open_phantoms(options: PhantomOptions, image_size: int) -> PhantomSource:
    """Build from generated chest-radiograph phantoms: no download, no licence, exact annotations."""
    return PhantomSource(options.studies, image_size, options.seed)


class PhantomSource(Source):
    """A seeded generator of chest-radiograph phantoms; never real data.

    Study `i` depends on (seed, image_size, i) alone, so a larger source begins with the smaller one.

    Args:
        studies: number of studies, at least 1.
        image_size: side of the square images in pixels, 32 to 4096.
        seed: any non-negative integer.

    Raises:
        DataError: an argument is out of range.
    """

    name = "phantom"
    generated = True

    def __init__(self, studies: int, image_size: int, seed: int) -> None:
        if studies < 1 or not 32 <= image_size <= 4096 or seed < 0:
            raise DataError(
                f"phantom source: studies={studies}, image_size={image_size}, seed={seed}; "
                "studies must be >= 1, image_size 32 to 4096 and seed >= 0"
            )
        self.studies = studies
        self.image_size = image_size
        self.seed = seed
        self.label_names = [spec.name for spec in FINDINGS]
        self.arguments: dict[str, Any] = {"studies": studies, "image_size": image_size, "seed": seed}

    def __len__(self) -> int:
        return self.studies

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """Number of each patient's first study."""
        draws = generator(self.seed, Stream.PATIENTS).random(self.studies)
        visits = 1 + np.searchsorted(np.cumsum(_VISITS)[:-1], draws, side="right")
        ends = np.cumsum(visits)
        return np.concatenate([[0], ends[ends < self.studies]]).astype(np.int64)

    def _visit(self, i: int) -> tuple[int, int]:
        """Patient of study `i` and its number among the patient's studies."""
        if not 0 <= i < self.studies:
            raise IndexError(f"phantom source has studies 0 to {self.studies - 1}, not {i}")
        patient = int(np.searchsorted(self._first, i, side="right")) - 1
        return patient, i - int(self._first[patient])

    def split_key(self, i: int) -> str:
        """Patient of study `i`."""
        return f"phantom-{self.seed}-p{self._visit(i)[0]:07d}"

    def plan(self, i: int) -> tuple[tuple[Finding, ...], tuple[Finding, ...] | None, str]:
        """Findings of study `i`, those of the patient's prior study (None: there is none), and the view."""
        patient, visit = self._visit(i)
        course = draw_course(generator(self.seed, Stream.COURSE, patient), visit + 1)
        view = "AP" if generator(self.seed, Stream.VIEW, i).random() < _PORTABLE else "PA"
        return course[visit], course[visit - 1] if visit else None, view

    def load(self, i: int) -> list[Study]:
        """Render study `i` and write its report."""
        findings, prior, view = self.plan(i)
        patient, _ = self._visit(i)
        anatomy = Anatomy.draw(generator(self.seed, Stream.ANATOMY, patient))
        rendering = render(anatomy, findings, view, self.image_size, self.seed, i)
        report = write_report(findings, prior, view, generator(self.seed, Stream.REPORT, i))
        phrases = [
            Phrase(text, tuple(b for f in about for b in rendering.boxes if b.label == f.name))
            for text, about in report.statements
        ]
        labels: dict[str, LabelValue] = dict.fromkeys(self.label_names, 0)
        labels.update({finding.name: 1 if finding.certain else -1 for finding in findings})
        shown = [
            {
                "name": f.name,
                "side": f.side,
                "zone": f.zone,
                "severity": f.severity,
                "certain": f.certain,
                "kind": f.kind,
            }
            for f in findings
        ]
        return [
            Study(
                study_id=f"phantom-{self.seed}-s{i:07d}",
                patient_id=self.split_key(i),
                image=rendering.image,
                view=view,
                sections=report.sections,
                sentences=report.sentences,
                labels=labels,
                entities=report.entities,
                boxes=rendering.boxes,
                masks=rendering.masks,
                anatomy=rendering.anatomy,
                phrases=phrases,
                questions=ask(findings, view, generator(self.seed, Stream.QUESTIONS, i)),
                source=self.name,
                license="Apache-2.0",
                extra={"findings": shown},
            )
        ]
