"""Report generation end to end on phantoms at toy size; its vocabularies, its loss, published switches."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import medvlp
from medvlp.config import Config, ConfigError
from medvlp.data.batch import Batch
from medvlp.data.cache import open_reader
from medvlp.data.loader import EvaluationLoader, evaluation_dataset
from medvlp.data.questions import text_code
from medvlp.data.report import report_text, scored_words
from medvlp.evaluation import report_baselines
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.heads.report import (
    PieceVocabulary,
    ReportObjective,
    WordVocabulary,
    shared_words,
    texts_of,
)
from medvlp.evaluation.heads.report_decoder import ReportDecoder
from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.report import examples, results
from medvlp.evaluation.report.joining import complete
from medvlp.evaluation.report_baselines import Baselines, is_normal, unit_rows
from medvlp.evaluation.supervised import Supervised, finetuning_config, train_here
from medvlp.evaluation.task import EvaluationError, TaskResult
from medvlp.evaluation.tasks.report import Report, ReportConfig
from medvlp.runs import saved_run
from shards.errors import NotFiniteError, UsageError
from shards.reader import ShardReader
from tests.launcher.tiny_run import make_run, make_shards

WHERE = "evaluation.tasks.report"
FAST = [
    "evaluation.bootstrap=10", "monitor.wandb=disabled", "monitor.progress=false", "zero.stage=0",
    f"{WHERE}.width=16", f"{WHERE}.heads=2", f"{WHERE}.layers=1", f"{WHERE}.hidden=16", f"{WHERE}.beams=2",
    f"{WHERE}.max_words=12", f"{WHERE}.meteor=none",
    f"{WHERE}.training={{train: {{epochs: 1, min_steps: 0, global_batch: 16}}, optimizer: {{lr: 0.01}}}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = make_shards(tmp_path_factory.mktemp("data") / "phantom")
    return make_run(shards, tmp_path_factory.mktemp("run") / "tiny")


def ask(run: Path, *more: str, train: Callable[[Config], int] = train_here) -> TaskResult:
    options = EvaluationOptions(run, tasks=["report"], overrides=[*FAST, *more], train=train)
    found = evaluate(options, lambda line: None)
    return TaskResult(found.results["report"], found.notes["report"])


def batch_of(reports: list[list[str]], size: int = 8) -> Batch:
    """A batch of blank images with these reports as codes."""
    longest = max(map(len, reports))
    codes = torch.tensor([[*map(text_code, words)] + [0] * (longest - len(words)) for words in reports])
    image = torch.zeros((len(reports), 1, size, size), dtype=torch.uint8)
    return Batch(
        image,
        None,
        torch.arange(len(reports)),
        torch.zeros(len(reports), 0),
        [],
        fields={"report_words": codes},
    )  # type: ignore[arg-type]


def test_words_that_are_not_in_the_vocabulary_and_cut_reports() -> None:
    vocabulary = WordVocabulary(["effusion", "no", "."], "report_words")
    batch = batch_of([["no", "effusion", "."], ["no", "mass"], ["no"] * 6])
    targets = vocabulary.targets(batch, 5).tolist()
    assert [vocabulary.text(row) for row in targets] == ["no effusion .", "no <unk>", "no no no no no"]
    assert targets[0].index(vocabulary.eos) == 3
    assert vocabulary.eos not in targets[2]
    assert vocabulary.text([vocabulary.bos, vocabulary.pad, vocabulary.eos]) == ""


def test_only_words_that_patients_share_are_in_a_vocabulary() -> None:
    reports = [["no", "smith"], ["no", "effusion", "smith"], ["no", "effusion"]]
    assert shared_words(reports, ["a", "a", "b"], 2) == ["effusion", "no"]


class Blank(torch.nn.Module):
    """Encodes every image to the same patches."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = torch.nn.Identity()
        self.image_encoder.forward = lambda image: SimpleNamespace(local=torch.ones(len(image), 4, 3))  # type: ignore


def test_the_loss_does_not_depend_on_how_a_batch_is_divided() -> None:
    torch.manual_seed(0)
    vocabulary = WordVocabulary(["effusion", "no", "."], "report_words")
    decoder = ReportDecoder(3, 4, vocabulary.size, 0, 1, 2, 8, 16, 1, 2, 16, 0.0)
    objective = ReportObjective(Blank(), decoder, vocabulary, 3.0)  # type: ignore[arg-type]
    reports = [["no"], ["no", "effusion", "."], ["no", "."], ["no", "effusion", "no", "effusion", "."]]
    whole = objective(batch_of(reports)).loss
    parts = [objective(batch_of(reports[i : i + 2])).loss for i in (0, 2)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)


def test_reports_are_not_cut_where_pre_training_cut_them(run: Path, tmp_path: Path) -> None:
    """A cut report teaches to end there, and the baselines' reports, which are whole, then win by length."""
    words = ["task=report", f"run.dir={tmp_path}", f"{WHERE}.max_words=60"]
    config = finetuning_config(run, "report", 1.0, 0, False, [], words)
    assert config.data.max_tokens == 61
    source = saved_run.load_config(saved_run.locate(run), [])
    assert source.data.max_tokens < 61
    recipe = Supervised(config)
    reader, tokenizer = open_reader(config.data), recipe.tokenizer()
    dataset = evaluation_dataset(config, reader, tokenizer, "train")
    samples = recipe.samples(reader, tokenizer)
    vocabulary = PieceVocabulary(tokenizer, scored_words)
    batch = next(iter(EvaluationLoader(dataset, [samples.tolist()], config.data)))
    texts = [report_text(reader.metadata("train", int(of)), config.data) for of in samples]
    whole = [" ".join(scored_words(text)) for text in texts]
    learned = [vocabulary.text(row) for row in vocabulary.targets(batch, 60).tolist()]
    pieces = np.diff(tokenizer.encode([[text] for text in texts]).offsets)
    long = (pieces > source.data.max_tokens) & (pieces < 60)
    assert long.any()
    assert [text for text, of in zip(learned, long, strict=True) if of] == [
        text for text, of in zip(whole, long, strict=True) if of
    ]


def test_both_networks_and_the_baselines_are_scored_on_whole_reports(run: Path) -> None:
    found = ask(run)
    stored = results.read(next(run.glob("evaluation-units/report/*/result.json")))
    complete(stored)
    told = examples.read(run, stored, "report", "fraction-1-seed-0").texts
    texts = {"most-frequent", "random", "nearest-image", "normal", "same-findings"}
    models = {"trained", "untrained", "reference"} | texts
    assert set(found.models) == models
    assert max(texts, key=lambda name: found.models[name]["ce-f1@100%/macro"].value) == "same-findings"
    assert found.models["same-findings"]["bleu-4@100%"].value < 0.7
    for name in models - {"reference"}:
        assert {f"bleu-{n}@100%" for n in (1, 2, 3, 4)} | {"cider@100%", "ce-f1@100%/macro"} <= set(
            found.models[name]
        )
    assert found.models["most-frequent"]["commonest@100%"].value == 1
    assert found.models["random"]["distinct@100%"].value > 0.5
    assert found.models["reference"]["ce-f1@100%/micro"].value > 0.9
    assert found.models["reference"].keys() == {
        name for name in found.models["trained"] if name.startswith("ce-")
    }
    reader = ShardReader(Path(str(next(iter(run.parent.parent.glob("data*/phantom"))))))
    rows = list(csv.DictReader(next(run.rglob("reports.csv")).open(newline="")))
    keys = [reader.key("test", i) for i in range(reader.sample_count("test"))]
    assert [row["key"] for row in rows] == keys
    assert len(told) == 6
    assert (told[0].sample, told[-1].sample) == (0, len(keys) - 1)
    for example in told:
        row = rows[example.sample]
        assert (example.generated, example.reference) == (row["generated"], row["reference"])
    settings = Config().data
    for i in (0, 5):
        report = report_text(reader.metadata("test", i), settings)
        assert rows[i]["reference"] == " ".join(scored_words(report))
    (folder,) = run.glob("evaluation-units/report/*/trained")
    reporter = medvlp.load(folder, "cpu")
    films = [medvlp.open_dataset(reader.root, "test")[i].image for i in range(4)]
    assert reporter.report(films) == [row["generated"] for row in rows[:4]]
    assert reporter.encode_image(films).shape[0] == 4
    with pytest.raises(UsageError, match=r"has learned task report, .*medvlp evaluate .* --task report"):
        reporter.zero_shot(films, ["edema"])
    assert reporter._objective is not None
    next(reporter._objective.head.parameters()).data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="are NaN or infinite"):
        reporter.report(films)
    lengths = [len(row["reference"].split()) for row in rows]
    assert found.models["trained"]["reference-length@100%"].value == pytest.approx(np.mean(lengths))


def test_labels_of_another_labeller_are_scored_without_training_again(run: Path, tmp_path: Path) -> None:
    """Trained again, a GPU writes other reports, which are not those that were labelled."""
    before = ask(run).models["trained"]
    rows = list(csv.DictReader(next(run.rglob("reports.csv")).open(newline="")))
    values = {}
    for name, value in (("labels", "1"), ("others", "0")):
        file = tmp_path / f"{name}.csv"
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, [*rows[0], "edema", "mass"])
            writer.writeheader()
            writer.writerows({**row, "edema": value, "mass": value} for row in rows)
        found = ask(run, f"{WHERE}.ce_labels={file}", train=lambda config: pytest.fail("trained again"))
        assert found.models["trained"]["bleu-1@100%"] == before["bleu-1@100%"]
        values[name] = found.models["trained"]["ce-recall@100%/edema"].value
    assert values == {"labels": 1, "others": 0}
    own = next(run.rglob("reports.csv"))
    own.write_bytes(labelled := (tmp_path / "labels.csv").read_bytes())
    found = ask(run, f"{WHERE}.ce_labels={own}", train=lambda config: pytest.fail("trained again"))
    assert found.models["trained"]["ce-recall@100%/edema"].value == 1
    assert own.read_bytes() == labelled  # they took somebody's time
    file.write_bytes(labelled.replace(b"edema,mass", b"a,b", 1))
    with pytest.raises(EvaluationError, match=r"others\.csv: no column is one of the labels .*edema"):
        ask(run, f"{WHERE}.ce_labels={file}", train=lambda config: pytest.fail("trained again"))


def test_cut_references_with_unknown_words_raise_bleu(run: Path) -> None:
    words = [f"{WHERE}.tokenizer=words", f"{WHERE}.min_patients=30"]
    full = ask(run, *words).models["trained"]
    cut = ask(run, *words, f"{WHERE}.reference=truncated_unk").models["trained"]
    assert cut["length@100%"].value == full["length@100%"].value
    assert cut["reference-length@100%"].value <= 12 < full["reference-length@100%"].value
    assert cut["bleu-1@100%"].value > full["bleu-1@100%"].value


def test_an_epoch_is_never_chosen_on_the_test_split() -> None:
    with pytest.raises(ConfigError, match="select=best_test: an epoch is never chosen"):
        ReportConfig(select="best_test").check(Config())


def test_baselines_write_reports_of_the_training_samples() -> None:
    labels = np.array([[1, 0], [0, np.nan], [1, 0]])
    baselines = Baselines(["a", "b", "a"], np.eye(3), "normal", labels)
    features = np.array([[0.1, 0.9, 0.0], [5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    written = baselines.written(features, np.array([[0, np.nan], [1, 0], [-1, np.nan]]), 0)
    assert written["same-findings"] == ["b", "a", "b"]
    assert "same-findings" not in replace(baselines, labels=labels[:, :0]).written(features, labels[:, :0], 0)
    assert written["nearest-image"] == ["b", "a", "a"]
    assert written["most-frequent"] == ["a"] * 3
    assert written["normal"] == ["normal"] * 3
    assert set(written["random"]) <= {"a", "b"}


def test_baselines_do_not_depend_on_how_much_is_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([1.0, 0.0, -1.0, np.nan], (40, 3))
    baselines = Baselines([str(i) for i in range(40)], unit_rows(rng.normal(size=(40, 5))), "", labels)
    features, truth = rng.normal(size=(9, 5)), rng.choice([1.0, 0.0, np.nan], (9, 3))
    whole = baselines.written(features, truth, 3)
    monkeypatch.setattr(report_baselines, "_CELLS", 80)
    assert baselines.written(features, truth, 3) == whole
    for row, text in enumerate(whole["same-findings"]):
        agree = [
            np.array_equal(a, b, equal_nan=True) for a, b in zip(labels[int(text)], truth[row], strict=True)
        ]
        most = max(
            sum(np.array_equal(a, b, equal_nan=True) for a, b in zip(of, truth[row], strict=True))
            for of in labels
        )
        assert sum(agree) == most


def test_every_fraction_says_where_its_normal_report_is_from() -> None:
    task = Report(ReportConfig(fractions=[0.1, 1.0]))
    parts = {
        unit: TaskResult({}, {"reports": 9, "meteor": "none", "normal": normal, "training": {unit.name: {}}})
        for unit, normal in zip(task.units(), (0, 7), strict=True)
    }
    small, large = (unit.name for unit in parts)
    assert Report.reading.remarks(task.join(parts).notes)[1:] == [
        f"{small}: normal: a sentence of this program: no image is known to be",
        f"{large}: normal: the most frequent of 7 normal training images",
    ]
    parts[task.units()[0]].notes["meteor"] = "not available: java"
    assert Report.reading.remarks(task.join(parts).notes)[0] == "9 reports; METEOR: not available: java; none"


@pytest.mark.parametrize(
    ("names", "labels", "normal"),
    [
        (["No Finding", "Edema"], [1, np.nan], True),
        (["No Finding", "Edema"], [1, -1], False),
        (["No Finding", "Edema"], [np.nan, 0], False),
        (["normal", "Edema"], [0, 0], False),
        (["normal", "Edema"], [1, 0], True),
        (["Mass", "Edema"], [0, 0], True),
        (["Mass", "Edema"], [0, np.nan], False),
        (["Mass", "sex=M"], [0, 1], True),
        (["sex=M"], [0], False),
        ([], [], False),
    ],
)
def test_what_is_a_normal_image(names: list[str], labels: list[float], normal: bool) -> None:
    assert is_normal(np.array(labels, dtype=float), names) == normal


def test_findings_without_a_number_are_those_that_have_none() -> None:
    """Stated where the truth is not known is no number; true where an uncertain one counts is one."""
    names = ["edema", "mass", "fracture"]
    labels = np.array([[np.nan, -1.0, 0.0], [np.nan, 0.0, 0.0]])
    index = SimpleNamespace(label_names=names)
    dataset = SimpleNamespace(reader=SimpleNamespace(index=index), store=SimpleNamespace(labels=labels))
    texts = ["there is edema .", "no fracture ."]
    for uncertain, without in (("exclude", set(names)), ("positive", {"edema", "fracture"})):
        result = TaskResult({"trained": {}})
        task = Report(ReportConfig(ce_uncertain=uncertain))  # type: ignore[arg-type]
        bootstrap = PatientBootstrap(np.arange(2), 0, 0)
        task._clinical(result, dataset, np.arange(2), {"trained": texts}, texts, bootstrap)  # type: ignore[arg-type]
        assert {of["finding"] for of in result.notes["not_evaluable"]} == without
        numbers = {name.rpartition("/")[2] for name in result.models["trained"]}
        assert set(names) - numbers == without


def test_texts_come_back_from_their_bytes() -> None:
    rows = np.zeros((2, 9), dtype=np.uint8)
    rows[0, :3] = list("é.".encode())
    assert texts_of(rows) == ["é.", ""]
