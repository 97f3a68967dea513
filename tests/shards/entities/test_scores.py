"""How well the rules read reports, on built phantom shards and on real reports held out."""

from __future__ import annotations

from pathlib import Path

from shards.reader import ShardReader
from shards.study import Entity
from tests.benchmarks.entity_extraction import Counts, add_report, mesh_scores, phantom_scores, read_reports


def test_phantom_shards(phantom_dataset: Path) -> None:
    reader = ShardReader(phantom_dataset)
    triples, observations = Counts(), Counts()
    for split in reader.index.splits:
        for i in range(reader.sample_count(split)):
            metadata = reader.metadata(split, i)
            entities = [Entity(*entity) for entity in metadata["entities"]]
            add_report(metadata["sections"], entities, triples, observations)
    assert min(triples.precision, triples.recall) > 0.85
    assert min(observations.precision, observations.recall) > 0.93


def test_phantom_reports() -> None:
    triples, observations = phantom_scores(300)
    assert triples.precision > 0.91
    assert triples.recall > 0.93
    assert observations.precision > 0.98
    assert observations.recall > 0.95


def test_real_reports_of_the_held_out_half(shared: Path) -> None:
    reports = list(read_reports(shared / "data" / "reports" / "reports.jsonl", "held-out"))
    assert len(reports) > 1800
    scores = mesh_scores(reports)
    assert scores["all"].recall > 0.90
    assert scores["all"].precision > 0.80
    assert mesh_scores(reports, hedged=False)["all"].f1 > 0.88
    assert all(scores[name].f1 > 0.85 for name in ("cardiomegaly", "opacity", "effusion", "low", "tortuous"))
