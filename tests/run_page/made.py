"""Pages read as text, and run folders with an evaluation, examples and clusters, for tests of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp.evaluation.examples import (
    Box,
    BoxExample,
    Examples,
    TextExample,
    mask_example,
)
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report import examples, results, scores
from medvlp.evaluation.task import Scores
from medvlp.runs.manifest import Manifest
from medvlp.serving.build import SnapshotOptions, build
from shards.reader import ShardReader
from tests.export.saved import save_run

_VOID = {"meta", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *(str(word) for word in words)])


def made_scores() -> Scores:
    """Of edema: two present, of which one is called, and two absent, of which none is."""
    truth = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    trained = np.array([[2.0, 1.0], [-1.0, 2.0], [-2.0, 3.0], [0.5, 0.0]])
    models = {"trained": trained, "pixels": trained[::-1].copy()}
    return Scores(np.arange(4), ["edema", "mass"], truth, models, {"trained": {"edema": 1.0}})


#: Units of the tasks with examples.
UNIT = "fraction-1-seed-0"


def make_run(data: Path, run: Path, auroc: float, *overrides: str) -> Path:
    """A run folder with metrics, events and an evaluation of the phantoms."""
    save_run(data, run, *overrides)
    lines = [{"step": n, "epoch": 0, "loss": 2 / n, "loss/word": 1 / n, "lr": n * 1e-4, "x<y": 1.0}
             for n in range(1, 30)]  # fmt: skip
    for line in lines[9::10]:
        line["prototypes/nmi"] = line["step"] / 100
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    events = [
        {"kind": "start", "step": 0},
        {"kind": "resume", "step": 12},
        {"kind": "resume", "step": 20},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "environment.json").write_text(json.dumps({"packages": {"torch": "9.9"}, "host": "secret-host"}))
    manifest = Manifest.read(run / "checkpoints" / "step-00000003")
    numbers = {
        "auroc/macro": Estimate(auroc, auroc - 0.1, auroc + 0.1),
        "auroc/edema": Estimate(0.25, 0.2, 0.3),
        "auroc/mass": Estimate(0.125, 0.1, 0.2),
    }
    evaluation = results.Evaluation(
        model={"name": run.name, "run": str(run), "checkpoint": "step-00000003", "step": 3,
               "weights": manifest.files["weights.safetensors"]["xxh3_128"]},
        data={"root": str(data), "name": "phantom", "split": "test",
              "fingerprint": ShardReader(data).index.fingerprint},
        settings={"uncertain": "exclude"},
        results={"zero-shot": {"trained": numbers, "chance": {"auroc/macro": Estimate(0.5, None, None)}}},
        notes={"zero-shot": {"threshold_split": "valid"}},
    )  # fmt: skip
    folder = run / results.FOLDER / "zero-shot" / f"whole-{'0' * 16}"
    folder.mkdir(parents=True)
    kept = results.KeptFile("0" * 32, scores.write(made_scores(), folder))
    evaluation.scores = {"zero-shot": {"whole": kept}}
    results.write(evaluation, run / "evaluation.json")
    return run


def add_examples(run: Path, data: Path) -> None:
    """Put segmentation, detection and report into a run's evaluation, each with an example of its kind."""
    evaluation, reader = results.read(run / "evaluation.json"), ShardReader(data)
    masks = {i: reader.masks("test", i) for i in range(reader.sample_count("test"))}
    position, finding = next((i, name) for i, of in masks.items() for name in of if of[name].any())
    truth = masks[position][finding].astype(bool)
    mask = mask_example(position, finding, np.roll(truth, 4, 1), truth)
    absent = mask_example(0, "mass", np.zeros_like(truth), np.zeros_like(truth))
    boxes = BoxExample(position, [Box("mass", 1, 2, 12, 14, 0.75)], [Box(finding, 3, 3, 20, 20)])
    text = TextExample(0, "no effusion . possible edema .", "moderate effusion . no edema .")
    made = {
        "segmentation": Examples("The first ones.", 32, masks=[mask, absent]),
        "detection": Examples("The first ones.", 32, boxes=[boxes]),
        "report": Examples("Evenly spread.", texts=[text]),
    }
    for task, of in made.items():
        folder = run / results.FOLDER / task / f"{UNIT}-{'1' * 16}"
        folder.mkdir(parents=True)
        kept = results.KeptFile("1" * 32, examples.write(of, folder))
        evaluation.examples[task] = {UNIT: kept}
        evaluation.results[task] = {"trained": {"score@100%/macro": Estimate(0.5, 0.4, 0.6)}}
        evaluation.notes[task] = {}
    results.write(evaluation, run / "evaluation.json")


def add_clusters(run: Path) -> None:
    """`RUN/prototypes/` as `medvlp prototypes build` makes it, of the test split."""
    build(SnapshotOptions(run, split="test", clusters=2, workers=0), lambda line: None)
