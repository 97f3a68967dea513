"""A task registered from outside is found everywhere without an edit elsewhere, and resumed by units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp import config_files
from medvlp.config import TaskConfig, key
from medvlp.evaluation import task as contract
from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report import results
from medvlp.evaluation.session import View
from medvlp.evaluation.task import Facts, Needs, Reading, Role, Task, TaskResult, Unit
from medvlp.methods.registry import schemas
from shards.errors import MedvlpError
from tests.launcher.tiny_run import make_run, make_shards


@dataclass
class NearestConfig(TaskConfig):
    seeds: list[int] = key([0, 1], "draws of the training images", 0, 999, (1, 9))
    neighbours: int = key(3, "images that vote", 1, 99)


class Nearest(Task):
    """How often the nearest training images say the finding; and how many entities the reports name."""

    name = "nearest"
    summary = "votes of the nearest training images"
    config = NearestConfig
    unit_keys = frozenset({"seeds"})
    fits_to_labels = True
    reading = Reading(
        names={"agreement": "agreement of votes"},
        summary=lambda metric: metric in ("agreement/macro", "spread"),
        by_finding="agreement",
        remarks=lambda notes: [f"{notes['mentions']} mentions"],
    )
    runs = 0

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        return {
            "train": Needs(image=True),
            "evaluated": Needs(image=True, fields=frozenset({"entities"})),
        }

    def units(self) -> Sequence[Unit]:
        return [Unit(seed=seed) for seed in self.settings.seeds]

    def unavailable_on(self, facts: Facts) -> str | None:
        return None if "train" in facts.roles else "nothing to vote"

    def fit(self, view: View, unit: Unit) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        type(self).runs += 1
        train = view.split("train")
        assert train is not None
        (view.folder / "state").write_text("of the unit's own")
        rows = np.random.default_rng(unit.seed).permutation(len(train.patients))[:40]
        truth = np.nan_to_num(view.truth(train))[rows]
        return {model: (arrays.image[rows], truth) for model, arrays in train.arrays.models.items()}

    def measure(self, view: View, unit: Unit, fitted: Any) -> TaskResult:
        split = view.split("evaluated")
        assert split is not None
        entities = [batch.fields["entities"] for batch in view.batches("evaluated")]
        result = TaskResult(notes={"mentions": sum(int((of >= 0).sum()) for of in entities)})
        truth = np.nan_to_num(view.truth(split))
        for model, (images, labels) in fitted.items():
            order = np.argsort(-split.arrays.models[model].image @ images.T, axis=1)
            votes = labels[order[:, : self.settings.neighbours]].mean(axis=1) > 0.5
            agreement = (votes == truth).mean(axis=0)
            named = dict(zip(view.facts.findings, agreement, strict=True))
            result.models[model] = {"agreement/macro": Estimate(float(agreement.mean()))} | {
                f"agreement/{name}": Estimate(float(value)) for name, value in named.items()
            }
        return result

    def join(self, parts: Mapping[Unit, TaskResult]) -> TaskResult:
        of = list(parts.values())
        joined = TaskResult(notes=of[0].notes)
        for model in of[0].models:
            values = {
                metric: [part.models[model][metric].value for part in of] for metric in of[0].models[model]
            }
            joined.models[model] = {metric: Estimate(mean(found)) for metric, found in values.items()}
            spread = stdev(values["agreement/macro"]) if len(of) > 1 else 0.0
            joined.models[model]["spread"] = Estimate(spread)
        return joined


@pytest.fixture
def toy() -> Iterator[type[Nearest]]:
    contract.register(Nearest)
    Nearest.runs = 0
    yield Nearest
    del contract.REGISTRY["nearest"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "phantom")


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    return make_run(shards, tmp_path / "tiny")


@pytest.fixture
def medvlp() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_and_config_reference_name_a_task_from_outside(
    toy: type[Nearest], medvlp: Callable[..., Result], tmp_path: Path
) -> None:
    assert "nearest: votes of the nearest training images" in medvlp("evaluate", "--help").output
    reference = medvlp("config", "--reference").output
    assert "    nearest:\n      seeds: [0, 1]  # draws of the training images\n" in reference
    given = ["data.root=/d", "run.dir=/r"]
    result = medvlp("config", *given, "evaluation.tasks.nearest.neighbors=5")
    assert "did you mean 'evaluation.tasks.nearest.neighbours'?" in str(result.exception)
    result = medvlp("config", *given, "evaluation.tasks.nearest.neighbours=0")
    assert "evaluation.tasks.nearest.neighbours=0 is out of range" in str(result.exception)
    assert "seeds:\n      - 5" in medvlp("config", *given, "evaluation.tasks.nearest.seeds=[5]").output


def test_a_task_from_outside_is_evaluated_resumed_and_shown(
    toy: type[Nearest], run: Path, medvlp: Callable[..., Result]
) -> None:
    words = ["evaluate", run, "--task", "nearest", "--task", "retrieval", "evaluation.bootstrap=20"]
    result = medvlp(*words)
    assert result.exit_code == 0, result.exception
    found = results.read(run / "evaluation.json")
    assert set(found.results) == {"nearest", "retrieval"}
    assert set(found.results["nearest"]) == {"trained", "untrained"}
    assert found.settings["options"]["nearest"] == {"seeds": [0, 1], "neighbours": 3}
    assert found.config["evaluation"]["tasks"]["nearest"]["neighbours"] == 3
    assert found.notes["nearest"]["mentions"] > 0
    for text in ("agreement of votes macro", "agreement of votes by finding", "mentions", "spread"):
        assert text in result.output
    assert "| model | agreement of votes macro | spread |" in medvlp("compare", run, "--markdown").output
    assert toy.runs == 2
    again = medvlp(*words)
    assert toy.runs == 2, "both units are finished"
    assert "embedding" not in again.output
    assert results.read(run / "evaluation.json") == found
    medvlp(*words, "evaluation.tasks.nearest.seeds=[0,1,2]")
    assert toy.runs == 3, "one unit is new"
    medvlp(*words, "--fresh")
    assert toy.runs == 5
    for change in ("evaluation.tasks.nearest.neighbours=5", "evaluation.seed=1", "data.max_tokens=40"):
        before = toy.runs
        medvlp(*words, change)
        assert toy.runs == before + 2, change
    before = toy.runs
    medvlp("evaluate", run / "checkpoints" / "step-00000004", *words[2:], "--out", run / "old.json")
    assert toy.runs == before + 2, "another checkpoint"
    assert results.read(run / "evaluation.json") != results.read(run / "old.json")
    folders = list((run / "evaluation-units" / "nearest").glob("seed-0-*"))
    assert all((folder / "state").is_file() and (folder / "result.json").is_file() for folder in folders)


def test_a_moved_run_and_dataset_keep_their_units(
    toy: type[Nearest], run: Path, shards: Path, tmp_path: Path, medvlp: Callable[..., Result]
) -> None:
    words = ["--task", "nearest", "evaluation.bootstrap=20", "--data"]
    assert medvlp("evaluate", run, *words, shards).exit_code == 0
    moved, data = run.rename(tmp_path / "moved"), tmp_path / "data"
    data.symlink_to(shards)
    assert medvlp("evaluate", moved, *words, data).exit_code == 0
    assert toy.runs == 2
    found = results.read(moved / "evaluation.json")
    assert (found.model["run"], found.data["root"]) == (str(moved), str(data))


def test_units_apart_are_joined_to_what_they_are_together(
    toy: type[Nearest], run: Path, medvlp: Callable[..., Result]
) -> None:
    words = ["evaluate", run, "--task", "nearest", "evaluation.bootstrap=20"]
    assert medvlp(*words, "--out", run / "together.json").exit_code == 0
    parts = run / "evaluation-parts"
    parts.mkdir()
    for unit in ("seed-0", "seed-1"):
        result = medvlp(*words, "--fresh", "--unit", unit, "--out", parts / f"nearest.{unit}.json")
        assert result.exit_code == 0, result.exception
        if unit == "seed-0":
            missing = medvlp("compare", run, "--join").exception
            assert "nearest: without unit seed-1" in str(missing)
    assert medvlp("compare", run, "--join").exit_code == 0
    joined, together = results.read(run / "evaluation.json"), results.read(run / "together.json")
    assert (joined.results, joined.notes, joined.data) == (together.results, together.notes, together.data)
    assert "there is" not in medvlp("evaluate", run, "--task", "nearest", "--unit", "seed-0").output
    for given, message in (
        (["--task", "nearest", "--unit", "seed-7"], "--unit seed-7: nearest has seed-0, seed-1"),
        (["--unit", "seed-0"], "--unit is of one task"),
    ):
        error = medvlp("evaluate", run, *given).exception
        assert isinstance(error, MedvlpError)
        assert message in str(error)


def test_an_array_has_an_element_for_each_unit(
    toy: type[Nearest], run: Path, medvlp: Callable[..., Result]
) -> None:
    words = ["submit", "evaluate", run, "--task", "nearest", "--task", "retrieval", "--dry-run"]
    script = medvlp(*words, "evaluation.tasks.nearest.seeds=[4,5,6]").output
    assert "#SBATCH --array=0-3\n" in script
    assert "--task nearest --unit seed-5 --out" in script
    assert f"{run}/evaluation-parts/nearest.seed-5.json" in script
    assert f"--task retrieval --out {run}/evaluation-parts/retrieval.json" in script
    error = medvlp(*words, "evaluation.tasks.nearest.sedes=[1]").exception
    assert "did you mean 'evaluation.tasks.nearest.seeds'?" in str(error)
    assert "--task typo: there are" in str(medvlp("submit", "evaluate", run, "--task", "typo").exception)


def test_the_config_of_a_run_with_a_task_that_is_not_here_can_be_read(run: Path) -> None:
    text = (run / "config.yaml").read_text().replace("tasks: {}", "tasks: {gone: {a: 1}}")
    assert "gone" in text
    (run / "config.yaml").write_text(text)
    config = config_files.load([run / "config.yaml"], [], schemas(), tasks=contract.schemas())
    assert "gone" not in config.evaluation.tasks
    assert config_files.load([run / "config.yaml"], [], schemas()).evaluation.tasks == {"gone": {"a": 1}}


@pytest.mark.parametrize(
    "file",
    [
        "medvlp/config.py", "medvlp/evaluation/task.py", "medvlp/evaluation/session.py",
        "medvlp/evaluation/evaluate.py", "medvlp/evaluation/units.py", "medvlp/evaluation/splits.py",
        "medvlp/evaluation/features.py", "medvlp/evaluation/metrics", "medvlp/evaluation/report",
        "launcher/commands/evaluate.py", "launcher/commands/submit_evaluate.py",
    ],
)  # fmt: skip
def test_nothing_but_the_tasks_names_a_task(repository: Path, file: str) -> None:
    place = repository / file
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        text = path.read_text(encoding="utf-8")
        for name in contract.tasks():
            # "report" is a word of its own: such names stand in quotes where a task is meant.
            named = (name, name.replace("-", "_")) if "-" in name else (f'"{name}"', f"'{name}'")
            assert not [words for words in named if words in text], path
