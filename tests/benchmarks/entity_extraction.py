"""How well the rules of `shards.entities.extractor` read reports: precision, recall and F1.

    python tests/benchmarks/entity_extraction.py [--studies 1500] [--reports FILE] [--half held-out]

Two yardsticks. The phantoms' reports, whose entities are known exactly: triples (landmark, observation,
value), and (observation, value) alone; the rules' author knew their grammar. The Indiana University reports,
which people have indexed with MeSH terms: whether a report has a finding, for the terms that have a class.
The rules were made on the development half of these (by a hash of the report's id); figures are stated for
the held-out half, on which nothing was tuned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shards.entities.extractor import extract
from shards.entities.landmarks import landmark
from shards.entities.observations import observation_class
from shards.sources.phantom.findings import FINDINGS, draw_course
from shards.sources.phantom.report import write_report
from shards.study import Entity

REPORTS = Path(os.environ.get("MEDVLP_SHARED", "../shared")) / "data" / "reports" / "reports.jsonl"

#: MeSH term of an indexed report, or its beginning -> the classes that state it.
MESH_CLASSES: dict[str, tuple[str, ...]] = {
    "Aorta/tortuous": ("tortuous",),
    "Aorta, Thoracic/tortuous": ("tortuous",),
    "Airspace Disease": ("opacity",),
    "Calcified Granuloma": ("calcification",),
    "Calcinosis": ("calcification",),
    "Cardiac Shadow/enlarged": ("cardiomegaly",),
    "Cardiomegaly": ("cardiomegaly",),
    "Catheters, Indwelling": ("catheter", "line", "picc"),
    "Cicatrix": ("scar",),
    "Consolidation": ("consolidation",),
    "Costophrenic Angle": ("blunt",),
    "Deformity": ("deformity",),
    "Density": ("density",),
    "Diaphragm/left/elevated": ("elevation",),
    "Diaphragm/right/elevated": ("elevation",),
    "Emphysema": ("emphysema",),
    "Fractures, Bone": ("fracture",),
    "Heart Failure": ("chf",),
    "Hernia": ("hernia",),
    "Infiltrate": ("infiltrate",),
    "Lung/hyperdistention": ("hyperinflate",),
    "Lung/hypoinflation": ("low",),
    "Mass": ("mass",),
    "Nodule": ("nodule",),
    "Opacity": ("opacity",),
    "Pleural Effusion": ("effusion",),
    "Pneumonia": ("pneumonia",),
    "Pneumothorax": ("pneumothorax",),
    "Pulmonary Atelectasis": ("atelectasis",),
    "Pulmonary Congestion": ("congestion",),
    "Pulmonary Edema": ("edema",),
    "Pulmonary Emphysema": ("emphysema",),
    "Spine/degenerative": ("degenerative",),
    "Thickening": ("thicken",),
    "Thoracic Vertebrae/degenerative": ("degenerative",),
    "Volume Loss": ("loss",),
}


@dataclass
class Counts:
    """True positives, false positives and false negatives."""

    hits: int = 0
    extra: int = 0
    missed: int = 0

    def add(self, found: set[Any], true: set[Any]) -> None:
        """Count what a report's set of statements has in common with the true one."""
        self.hits += len(found & true)
        self.extra += len(found - true)
        self.missed += len(true - found)

    @property
    def precision(self) -> float:
        """Share of the statements that are true."""
        return self.hits / max(self.hits + self.extra, 1)

    @property
    def recall(self) -> float:
        """Share of the true statements that were found."""
        return self.hits / max(self.hits + self.missed, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.hits / max(2 * self.hits + self.extra + self.missed, 1)


def phantom_scores(studies: int, seed: int = 0) -> tuple[Counts, Counts]:
    """Scores of triples (landmark, class, value) and of (class, value) on phantom reports.

    Only the classes that phantoms annotate are compared: what else a report says ("the lungs are clear", the
    synonym "pneumonia") may be true but is not annotated. Devices are one class, because phantoms annotate
    each kind as "support device".
    """
    triples, observations = Counts(), Counts()
    rng = np.random.default_rng(seed)
    for _ in range(studies // 2):
        first, second = draw_course(
            rng, 2
        )  # the grammar alone: rendering the images takes a hundred times longer
        for findings, prior in ((first, None), (second, first)):
            report = write_report(findings, prior, "PA", rng)
            add_report(report.sections, report.entities, triples, observations)
    return triples, observations


def add_report(
    sections: Mapping[str, str], entities: Iterable[Entity], triples: Counts, observations: Counts
) -> None:
    """Count one report with its exact entities; see `phantom_scores`."""
    true = {_triple(entity) for entity in entities}
    found = {triple for triple in map(_triple, extract(sections)) if triple[1] in _ANNOTATED}
    triples.add(found, true)
    observations.add({triple[1:] for triple in found}, {triple[1:] for triple in true})


_DEVICES = ("tube", "line", "catheter", "picc", "pacemaker", "lead")


def _folded(observation: str) -> str:
    name = observation_class(observation)
    return "device" if name in _DEVICES else name


_ANNOTATED = {_folded(spec.name) for spec in FINDINGS}


def _triple(entity: Entity) -> tuple[str, str, int]:
    return landmark(entity.anatomy), _folded(entity.observation), entity.value


def mesh_scores(reports: Iterable[Mapping[str, Any]], hedged: bool = True) -> dict[str, Counts]:
    """Report-level scores by class name, with the sum over all as "all".

    Args:
        reports: rows of `reports.jsonl`.
        hedged: uncertain statements count as present, as the indexers took them.
    """
    scores: dict[str, Counts] = {"all": Counts()}
    for report in reports:
        true = {
            MESH_CLASSES[begin][0]
            for term in report["mesh_major"]
            for begin in MESH_CLASSES
            if term == begin or term.startswith((f"{begin}/", f"{begin},"))
        }
        values = (1, -1) if hedged else (1,)
        stated = {_in_lungs(entity) for entity in extract(report) if entity.value in values}
        found = {classes[0] for classes in MESH_CLASSES.values() if stated & set(classes)}
        for name in true | found:
            scores.setdefault(name, Counts()).add(found & {name}, true & {name})
        scores["all"].add(found, true)
    return scores


def _in_lungs(entity: Entity) -> str:
    """Class of an entity; effusions of the pericardium are indexed by another term."""
    return "" if entity.anatomy == "pericardium" else observation_class(entity.observation)


def read_reports(path: Path, half: str) -> Iterator[dict[str, Any]]:
    """Indexed reports of the "development" or "held-out" half, without those marked "No Indexing"."""
    wanted = ("development", "held-out").index(half)
    for line in path.read_text(encoding="utf-8").splitlines():
        report = json.loads(line)
        if hashlib.blake2b(report["id"].encode(), digest_size=1).digest()[0] % 2 != wanted:
            continue
        if report["mesh_major"] and "No Indexing" not in report["mesh_major"]:
            yield report


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=1500, help="phantom studies")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="reports.jsonl with MeSH terms")
    parser.add_argument("--half", choices=("development", "held-out"), default="held-out")
    arguments = parser.parse_args()
    table = Table("what", "true", "precision", "recall", "F1")
    triples, observations = phantom_scores(arguments.studies)
    for name, counts in (("phantom triples", triples), ("phantom observations", observations)):
        _add(table, name, counts)
    if arguments.reports.is_file():
        reports = list(read_reports(arguments.reports, arguments.half))
        scores = mesh_scores(reports)
        _add(table, f"MeSH, {arguments.half} half ({len(reports)} reports)", scores.pop("all"))
        _add(table, "MeSH, hedged left out", mesh_scores(reports, hedged=False)["all"])
        frequent = Counter({name: counts.hits + counts.missed for name, counts in scores.items()})
        for name, _ in frequent.most_common():
            _add(table, f"  {name}", scores[name])
    Console(width=100).print(table)


def _add(table: Table, name: str, counts: Counts) -> None:
    figures = (f"{value:.3f}" for value in (counts.precision, counts.recall, counts.f1))
    table.add_row(name, f"{counts.hits + counts.missed:,}", *figures)


if __name__ == "__main__":
    main()
