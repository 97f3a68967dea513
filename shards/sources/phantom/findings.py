"""The findings of the phantom and which of them each study of a patient shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

#: Latent causes that make findings occur together, in the order of `FindingSpec.loadings`.
CAUSES = ("heart failure", "chronic lung disease", "injury", "infection")


@dataclass(frozen=True)
class FindingSpec:
    """What is fixed about one finding.

    Attributes:
        name: canonical name, used for labels, boxes, entities and prompts.
        synonyms: other words reports use for it, each in the singular.
        prevalence: share of studies that show it (certain or hedged).
        persistence: chance that it is still there in the patient's next study.
        loadings: weight of each of `CAUSES` on its occurrence (sum of squares below 1).
        sides: what `Finding.side` can be: "lateral" (left or right), "paired" (left, right or bilateral),
            "both" (always bilateral) or "midline" (no side).
        zones: what `Finding.zone` can be; empty where a zone has no meaning.
        scale: severity words: "size" (small ... large), "degree" (mild ... severe) or "" (none; the severity
            of a fracture is its number of bones, devices have none).
        countable: takes an article and a plural.
        site: the anatomy an entity names when the report negates the finding.
    """

    name: str
    synonyms: tuple[str, ...]
    prevalence: float
    persistence: float
    loadings: tuple[float, float, float, float]
    sides: str
    zones: tuple[str, ...]
    scale: str
    countable: bool
    site: str


_ZONES = ("upper", "mid", "lower")

FINDINGS: tuple[FindingSpec, ...] = (
    FindingSpec("pleural effusion", ("fluid collection",), 0.15, 0.5, (0.5, 0, 0.2, 0.2),
                "paired", (), "size", True, "pleural space"),
    FindingSpec("pneumothorax", ("pleural air collection",), 0.12, 0.3, (0, 0.25, 0.4, 0),
                "lateral", (), "size", True, "pleural space"),
    FindingSpec("cardiomegaly", ("enlarged heart", "cardiac enlargement"), 0.15, 0.85, (0.55, 0, 0, 0),
                "midline", (), "degree", False, "heart"),
    FindingSpec("consolidation", ("airspace opacity", "pneumonia"), 0.13, 0.3, (0, 0.1, 0, 0.45),
                "lateral", _ZONES, "degree", False, "lung"),
    FindingSpec("nodule", ("coin lesion", "round opacity"), 0.12, 0.8, (0, 0.3, 0, 0),
                "lateral", _ZONES, "size", True, "lung"),
    FindingSpec("mass", ("tumor", "mass lesion"), 0.11, 0.8, (0, 0.3, 0, 0.1),
                "lateral", _ZONES, "size", True, "lung"),
    FindingSpec("edema", ("pulmonary edema", "vascular congestion"), 0.13, 0.4, (0.55, 0, 0, 0),
                "both", (), "degree", False, "lung"),
    FindingSpec("atelectasis", ("plate-like collapse", "linear volume loss"), 0.14, 0.4, (0.1, 0, 0.3, 0.3),
                "lateral", ("mid", "lower"), "degree", False, "lung"),
    FindingSpec("emphysema", ("bullous disease", "hyperinflation"), 0.12, 0.9, (0, 0.5, 0, 0),
                "both", (), "degree", False, "lung"),
    FindingSpec("fracture", ("cortical break", "bony disruption"), 0.13, 0.8, (0, 0, 0.5, 0),
                "lateral", _ZONES, "", True, "bone"),
    FindingSpec("support device", ("tube or line", "medical device"), 0.17, 0.6, (0.25, 0, 0.25, 0.1),
                "lateral", (), "", True, "chest"),
    FindingSpec("pleural thickening", ("pleural plaque", "pleural scarring"), 0.12, 0.9, (0, 0.35, 0, 0),
                "lateral", _ZONES, "degree", False, "pleura"),
)  # fmt: skip

SPECS = {spec.name: spec for spec in FINDINGS}

DEVICES = ("central venous catheter", "pacemaker", "endotracheal tube", "chest tube")
#: Share of findings that are hedged.
HEDGED = 0.1


@dataclass(frozen=True)
class Finding:
    """One finding as it is drawn and reported.

    Attributes:
        name: canonical name.
        side: "left" or "right" of the patient, "bilateral", or "" for midline findings.
        zone: "upper", "mid", "lower" or "".
        severity: 1 to 3.
        certain: False where the report hedges; then it is drawn faintly and its label is -1.
        kind: which device (one of `DEVICES`), else "".
        shape_seed: seed of its place and shape; kept while the finding stays in a patient.
    """

    name: str
    side: str
    zone: str
    severity: int
    certain: bool
    kind: str
    shape_seed: int

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides to draw it on: one, two, or ("",) for midline findings."""
        return ("right", "left") if self.side == "bilateral" else (self.side,)


def _draw_finding(spec: FindingSpec, rng: np.random.Generator) -> Finding:
    side = ("left", "right")[int(rng.integers(2))]
    both = rng.random()
    if spec.sides == "both" or (spec.sides == "paired" and both < 0.3):
        side = "bilateral"
    elif spec.sides == "midline":
        side = ""
    zone = spec.zones[int(rng.integers(len(spec.zones)))] if spec.zones else ""
    kind = DEVICES[int(rng.integers(len(DEVICES)))] if spec.name == "support device" else ""
    if kind == "endotracheal tube":
        side = ""
    return Finding(
        name=spec.name,
        side=side,
        zone=zone,
        severity=int(rng.integers(1, 4)),
        certain=bool(rng.random() >= HEDGED),
        kind=kind,
        shape_seed=int(rng.integers(2**63)),
    )


def _evolved(finding: Finding, rng: np.random.Generator) -> Finding:
    """The finding at the patient's next study: same place and shape, perhaps another severity."""
    change = int(rng.choice([-1, 0, 1], p=[0.2, 0.6, 0.2]))
    severity = min(3, max(1, finding.severity + change))
    return replace(finding, severity=severity, certain=bool(rng.random() >= HEDGED))


def draw_course(rng: np.random.Generator, studies: int) -> list[tuple[Finding, ...]]:
    """Draw the findings of a patient's consecutive studies.

    The first study thresholds correlated normal variables (a Gaussian copula over `CAUSES`), so each
    finding has its prevalence while findings of one cause occur together. Later studies keep a finding
    with its persistence and gain new ones at the rate that keeps the prevalence.
    """
    causes = rng.standard_normal(len(CAUSES))
    course: list[tuple[Finding, ...]] = []
    for number in range(studies):
        before = {finding.name: finding for finding in course[-1]} if course else {}
        found = []
        for spec in FINDINGS:
            rest = float(np.sqrt(1.0 - np.square(spec.loadings).sum()))
            chance = NormalDist().cdf(float(np.dot(spec.loadings, causes) + rest * rng.standard_normal()))
            fresh = _draw_finding(spec, rng)
            gain = 1.0 if number == 0 else (1.0 - spec.persistence) / (1.0 - spec.prevalence)
            if spec.name in before:
                if rng.random() < spec.persistence:
                    found.append(_evolved(before[spec.name], rng))
            elif chance > 1.0 - spec.prevalence * gain:
                found.append(fresh)
        course.append(tuple(found))
    return course
