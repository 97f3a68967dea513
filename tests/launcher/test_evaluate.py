"""`medvlp evaluate` on tiny shards and a tiny model, from the command line to evaluation.json and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import typer
import xxhash
import yaml
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from launcher.commands import evaluate
from medvlp import config_files
from medvlp.data.text import Tokenizer
from medvlp.evaluation.report import results, scores
from medvlp.methods.registry import schemas
from medvlp.runs.manifest import WEIGHTS, Manifest
from shards.errors import MedvlpError
from shards.sources.table import TableSource
from tests.launcher.tiny_run import TINY, build, make_run, make_shards, save
from tests.training.test_monitor import records

ALL_TASKS = ["--task", "zero-shot", "--task", "retrieval", "--task", "linear-probe"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "phantom")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(shards, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def medvlp() -> Callable[..., Result]:
    """Runs a command; an error meant for the user is left in `result.exception`."""
    app = typer.Typer()
    app.command("evaluate")(evaluate.evaluate)
    app.command("compare")(evaluate.compare)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_is_evaluated_beside_its_baselines(run: Path, shards: Path, medvlp) -> None:
    result = medvlp("evaluate", run, "--data", shards, *ALL_TASKS)
    assert result.exit_code == 0, result.exception
    found = results.read(run / "evaluation.json")
    weights = found.model.pop("weights")
    assert found.model == {"name": "tiny", "run": str(run), "checkpoint": "step-00000009", "step": 9}
    saved = Manifest.read(run / "checkpoints" / "step-00000009").files["weights.safetensors"]
    assert weights == saved["xxh3_128"]
    assert found.data["split"] == "test"
    assert set(found.data["splits"]) == {"train", "valid", "test"}
    assert set(found.results) == {"zero-shot", "retrieval", "linear-probe"}
    for task, models in found.results.items():
        assert set(models) == {"trained", "untrained", "pixels", "chance"}, task
        assert "32×32-pixel ridge" in result.output
        for model, metrics in models.items():
            for metric, estimate in metrics.items():
                top = found.data["splits"]["test"]["samples"] if "rank" in metric else 1
                assert 0 <= estimate.value <= top, (model, metric)
                if model != "chance":
                    assert 0 <= estimate.low <= estimate.high <= top, (model, metric)
    zero_shot = found.results["zero-shot"]
    assert zero_shot["trained"]["auroc/macro"] != zero_shot["untrained"]["auroc/macro"]
    assert found.notes["zero-shot"]["threshold_split"] == "valid"
    listed = {item["finding"] for item in found.notes["zero-shot"]["not_evaluable"]}
    scored = {metric.split("/")[1] for metric in zero_shot["trained"]} - {"macro"}
    assert len(listed | scored) == 12
    assert not listed & scored
    assert {metric.split("/")[0] for metric in found.results["linear-probe"]["trained"]} == {
        "auroc@1%",
        "auroc@10%",
        "auroc@100%",
    }
    assert found.config["method"]["name"] == "mgca"
    assert {task: list(of) for task, of in found.scores.items()} == {
        "zero-shot": ["whole"],
        "linear-probe": ["fraction-0.01", "fraction-0.1", "fraction-1"],
    }
    for task, at, unit in (("zero-shot", "auroc", "whole"), ("linear-probe", "auroc@100%", "fraction-1")):
        kept = scores.read(run, found, task, unit)
        for column, name in enumerate(kept.findings):
            known = ~np.isnan(kept.truth[:, column])
            area = roc_auc_score(kept.truth[known, column], kept.models["trained"][known, column])
            assert area == pytest.approx(found.results[task]["trained"][f"{at}/{name}"].value)


def test_an_evaluation_joins_the_wandb_run_of_its_training(
    run: Path, shards: Path, medvlp, tmp_path: Path
) -> None:
    folder = tmp_path / "tracked"
    shutil.copytree(run, folder)
    arguments = ["evaluate", folder, "--data", shards, "--task", "zero-shot", "--label", "edema"]
    assert medvlp(*arguments, "monitor.wandb=offline").exit_code == 0
    assert not (folder / "wandb").exists()  # its training logged to no W&B run
    (folder / "wandb-run-id").write_text("abcd1234\n")
    assert medvlp(*arguments, "monitor.wandb=offline").exit_code == 0
    found = records(folder / "wandb")
    assert [(record["run_id"], record["job_type"]) for record in found["run"]] == [("abcd1234", "evaluation")]
    summary = {name: value for record in found["summary"] for name, value in record["update"].items()}
    trained = results.read(folder / "evaluation.json").results["zero-shot"]["trained"]
    assert summary["evaluation/test/zero-shot/auroc/macro"] == trained["auroc/macro"].value
    assert summary["evaluation/step"] == 9
    tables = [json.loads(file.read_text()) for file in sorted((folder / "wandb").rglob("*.table.json"))]
    content, *curves = sorted(tables, key=lambda table: "metric" not in table["columns"])
    assert content["columns"] == ["metric", "model", "value", "low", "high"]
    shown = {(metric, model): value for metric, model, value, _, _ in content["data"]}
    assert shown["auroc/edema", "trained"] == trained["auroc/edema"].value
    assert len(curves) == 2, "ROC, precision and recall; zero-shot says no probabilities"
    assert {line for table in curves for _, line, _ in table["data"]} == {"trained", "untrained", "pixels"}
    # A second evaluation of another task: W&B has what evaluation.json has.
    shutil.rmtree(folder / "wandb")
    other = [*arguments[:4], "--task", "retrieval", *arguments[6:]]
    assert medvlp(*other, "monitor.wandb=offline").exit_code == 0
    stored = results.read(folder / "evaluation.json").results
    assert set(stored) == {"zero-shot", "retrieval"}
    found = records(folder / "wandb")
    summary = {name: value for record in found["summary"] for name, value in record["update"].items()}
    assert summary["evaluation/test/zero-shot/auroc/macro"] == trained["auroc/macro"].value
    assert summary["evaluation/test/retrieval/image_to_text/R@1"] == (
        stored["retrieval"]["trained"]["image_to_text/R@1"].value
    )
    # A folder from elsewhere does not choose the account.
    shutil.rmtree(folder / "wandb")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["monitor"] |= {"entity": "stranger", "wandb": "offline"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert medvlp(*arguments).exit_code == 0
    assert not (folder / "wandb").exists()


MEDSLIP = [
    "method.name=medslip", "method.width=16", "method.layers=1", "method.heads=2", "text.frozen=true",
]  # fmt: skip


def test_a_method_that_embeds_no_reports_has_no_retrieval(
    shards: Path, medvlp, tmp_path: Path, repository: Path
) -> None:
    folder = tmp_path / "medslip"
    tiny = [override for override in TINY if not override.startswith("method.")]
    settings = [f"data.root={shards}", f"run.dir={folder}", *tiny, *MEDSLIP]
    config = config_files.load([], settings, schemas())
    save(config, 4, seed=4)
    (folder / "config.yaml").write_text(config_files.to_yaml(config))
    prompts = repository / "configs" / "tasks" / "zero-shot-phantom-medslip.yaml"
    result = medvlp(
        "evaluate", folder, "--data", shards, *ALL_TASKS, f"evaluation.tasks.zero-shot.prompts={prompts}"
    )
    assert result.exit_code == 0, result.exception
    found = results.read(folder / "evaluation.json")
    assert "retrieval of medslip: not available: the method medslip does not embed reports" in result.output
    assert "does not embed reports" in found.notes["retrieval"]["not_available"]
    assert found.results["retrieval"] == {}
    for task in ("zero-shot", "linear-probe"):
        assert set(found.results[task]) == {"trained", "untrained", "pixels", "chance"}
    assert found.notes["zero-shot"]["prompts"]["mass"]["negative"] == []


def test_a_checkpoint_folder_is_that_checkpoint_and_numbers_repeat(
    run: Path, shards: Path, medvlp, tmp_path: Path
) -> None:
    arguments = ["--data", shards, "--task", "zero-shot", "--label", "edema", "--label", "cardiomegaly"]
    folders = {
        "new": run,
        "same": run / "checkpoints" / "step-00000009",
        "old": run / "checkpoints" / "step-00000004",
    }
    found = {}
    for name, folder in folders.items():
        result = medvlp("evaluate", folder, *arguments, "--out", tmp_path / f"{name}.json")
        assert result.exit_code == 0, result.exception
        found[name] = results.read(tmp_path / f"{name}.json")
    assert found["new"].results == found["same"].results
    assert found["old"].model["step"] == 4
    assert found["old"].results["zero-shot"]["trained"] != found["new"].results["zero-shot"]["trained"]
    assert found["old"].results["zero-shot"]["untrained"] == found["new"].results["zero-shot"]["untrained"]
    table = medvlp("compare", tmp_path / "new.json", tmp_path / "old.json", "--markdown").output
    assert table.count("| 32×32-pixel ridge |") == 1
    assert table.count("| tiny") == 4


def test_a_run_stands_against_its_ablation(run: Path, shards: Path, medvlp, tmp_path: Path) -> None:
    """A later checkpoint in the place of the method, an earlier one in the place of its ablation."""
    folders = [shutil.copytree(run, tmp_path / name) for name in ("with", "without")]
    values = []
    for folder, step in zip(folders, ("step-00000009", "step-00000004"), strict=True):
        arguments = ["--data", shards, "--task", "zero-shot", "--label", "edema"]
        result = medvlp("evaluate", folder / "checkpoints" / step, *arguments)
        assert result.exit_code == 0, result.exception
        found = results.read(folder / "evaluation.json")
        assert set(found.resamples["zero-shot"]) == {"whole"}
        values.append(found.results["zero-shot"]["trained"]["auroc/macro"].value)
    result = medvlp("compare", folders[0], "--against", folders[1], "--markdown")
    assert result.exit_code == 0, result.exception
    (row,) = [line for line in result.output.splitlines() if "AUROC macro" in line]
    assert row.startswith("| with − without | ")
    assert f"| {values[0]:.3f} | {values[1]:.3f} | {values[0] - values[1]:+.3f} (" in row
    assert "*" not in row, "one seed claims nothing"
    shown = medvlp("compare", folders[0], "--against", folders[1]).output
    assert "the configs differ in nothing" in shown
    assert "its interval is by patient alone" in shown
    assert "1 runs for 2" in str(medvlp("compare", *folders, "--against", run).exception)


def test_a_changed_prompt_file_is_evaluated_anew_and_recorded(
    run: Path, shards: Path, medvlp, tmp_path: Path
) -> None:
    """Its path says nothing of its content: results name the content, and no finished unit is of another."""
    prompts, out = tmp_path / "prompts.yaml", tmp_path / "out.json"
    arguments = ["--task", "zero-shot", "--label", "edema", f"evaluation.tasks.zero-shot.prompts={prompts}"]
    recorded, reused = [], []
    for positive in ("edema", "edema", "signs of edema"):
        prompts.write_text(f"findings: {{edema: {{positive: [{positive}], negative: [no edema]}}}}\n")
        result = medvlp("evaluate", run, "--data", shards, *arguments, "--out", out)
        assert result.exit_code == 0, result.exception
        found = results.read(out)
        assert found.notes["zero-shot"]["prompts"]["edema"]["positive"] == [positive]
        recorded.append(found.settings["files"]["zero-shot"]["prompts"])
        reused.append("is finished" in result.output)
    assert reused == [False, True, False]
    assert (
        recorded[0]
        == recorded[1]
        == xxhash.xxh3_128_hexdigest(prompts.read_bytes().replace(b"signs of ", b""))
    )
    assert recorded[2] == xxhash.xxh3_128_hexdigest(prompts.read_bytes())


def test_a_second_evaluation_keeps_the_tasks_of_the_first(
    run: Path, shards: Path, medvlp, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / "evaluation.json"
    file.unlink(missing_ok=True)
    label = ["--label", "edema"]
    assert medvlp("evaluate", folder, "--data", shards, *label, "--task", "zero-shot").exit_code == 0
    first = results.read(file)
    result = medvlp("evaluate", folder, *label, "--task", "linear-probe", "--fraction", "1")
    assert result.exit_code == 0, result.exception
    found = results.read(file)
    assert set(found.results) == {"zero-shot", "linear-probe"}
    assert found.results["zero-shot"] == first.results["zero-shot"]
    assert scores.read(folder, found, "zero-shot", "whole").findings == ["edema"]
    assert f"{file}: also holds zero-shot, evaluated before" in result.output
    # Joining the parts of an array is no other thing.
    parts = folder / "evaluation-parts"
    parts.mkdir()
    words = ["--task", "retrieval", "--out", parts / "retrieval.json"]
    assert medvlp("evaluate", folder, "--data", shards, *label, *words).exit_code == 0
    result = medvlp("compare", folder, "--join")
    assert result.exit_code == 0, result.exception
    assert set(results.read(file).results) == {"zero-shot", "linear-probe", "retrieval"}
    # Beside the same run that reads the impression alone: other texts are searched for.
    short = tmp_path / "short.json"
    words = ["--task", "retrieval", "--out", short, "data.sections=[impression]"]
    assert medvlp("evaluate", folder, "--data", shards, *label, *words).exit_code == 0
    table = medvlp("compare", folder, short, "--markdown").output
    assert "was measured with other data.sections, distinct reports than run" in table
    # Of the same checkpoint and split, or not at all.
    result = medvlp("evaluate", folder, *label, "--task", "zero-shot", "--split", "valid")
    assert result.exit_code == 0, result.exception
    assert set(results.read(file).results) == {"zero-shot"}
    assert f"{file}: retrieval, evaluated before with other data (split), is left out" in result.output


def test_a_damaged_checkpoint_is_not_evaluated(run: Path, shards: Path, medvlp, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "checkpoints" / "step-00000009" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    result = medvlp("evaluate", copy, "--data", shards, "--task", "retrieval", "evaluation.bootstrap=1")
    assert result.exit_code == 0, result.exception
    assert results.read(copy / "evaluation.json").model["step"] == 4
    result = medvlp("evaluate", weights.parent, "--data", shards)
    assert isinstance(result.exception, MedvlpError)
    assert "bytes, its manifest says" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "zeroshot"], "--task zeroshot: there are "),
        (["--label", "Edeema"], "--label 'Edeema': the dataset has pleural effusion"),
        (["--split", "tset"], "no split 'tset'"),
        (["--uncertain", "maybe"], "there are exclude, positive, negative"),
        (["evaluation.bootsrap=3"], "did you mean 'evaluation.bootstrap'"),
        (
            ["evaluation.tasks.zero-shot.prompts=/nowhere.yaml"],
            "zero-shot.prompts=/nowhere.yaml: cannot be read (No such",
        ),
        (["configs/nowhere.yaml"], "configs/nowhere.yaml: no YAML file and no section.key=value"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
        (["--split", "valid", "--task", "linear-probe"], "needs the splits train and valid"),
    ],
)
def test_a_wrong_argument_is_named(run: Path, medvlp, arguments: list[str], message: str) -> None:
    result = medvlp("evaluate", run, *arguments)
    assert isinstance(result.exception, MedvlpError)
    assert message in str(result.exception)


def test_files_lie_over_the_config_of_the_run_and_below_overrides(
    run: Path, shards: Path, medvlp, tmp_path: Path
) -> None:
    file, out = tmp_path / "settings.yaml", tmp_path / "out.json"
    file.write_text("evaluation: {seed: 5, bootstrap: 7, tasks: {retrieval: {sentences: true}}}")
    words = ["--data", shards, "--task", "retrieval", "--out", out, "evaluation.seed=6"]
    result = medvlp("evaluate", run, file, *words)
    assert result.exit_code == 0, result.exception
    found = results.read(out)
    assert (found.settings["seed"], found.settings["bootstrap"]) == (6, 7)
    assert found.settings["options"]["retrieval"]["sentences"] is True
    file.write_text("evaluation: {tasks: {retrieval: {precise: 1}}}")
    error = medvlp("evaluate", run, file, *words).exception
    assert f"{file}: unknown key 'evaluation.tasks.retrieval.precise'" in str(error)


def test_a_folder_that_is_no_run_is_named(medvlp, tmp_path: Path) -> None:
    for text in ("evaluate", "compare"):
        assert isinstance(medvlp(text, tmp_path).exception, MedvlpError)
    assert "neither a run folder" in str(medvlp("evaluate", tmp_path).exception)
    (tmp_path / "config.yaml").touch()
    assert "train a step first" in str(medvlp("evaluate", tmp_path).exception)
    (tmp_path / "heads.safetensors").touch()
    assert "name the run it was exported from" in str(medvlp("evaluate", tmp_path).exception)


def test_data_that_were_moved_are_asked_for(run: Path, shards: Path, medvlp, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["root"] = "/nowhere/pairs"
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shards / "tokenizer.json"), **special)
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # a run of these tests stores none
    error = str(medvlp("evaluate", moved, f"data.tokenizer={tmp_path / 'tokenizer'}").exception)
    assert error.startswith("data folder /nowhere/pairs does not exist")
    assert "say --data FOLDER" in error


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A labelled set without reports: bright images are of sex M."""
    rng, lines = np.random.default_rng(0), ["image,patient,sex,split"]
    (tmp_path / "images").mkdir()
    for number in range(120):
        sex = "MF"[number % 2]
        image = rng.integers(60, 120, (32, 32)) + (60 if sex == "M" else 0)
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), image.astype(np.uint8))
        lines.append(f"{number}.png,p{number // 2},{sex},{('train', 'valid', 'test')[number // 2 % 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "map.yaml").write_text(
        "image: image\npatient_id: patient\nsplit: split\nlabels:\n  sex=M: {column: sex, equals: M}\n"
    )
    source = TableSource(tmp_path / "labels.csv", tmp_path / "images", tmp_path / "map.yaml")
    return build(source, tmp_path / "labelled")


def test_a_labelled_set_without_reports_is_probed(run: Path, labelled: Path, medvlp, tmp_path: Path) -> None:
    result = medvlp("evaluate", run, "--data", labelled, "--out", tmp_path / "probe.json", "--label", "sex=M")
    assert result.exit_code == 0, result.exception
    found = results.read(tmp_path / "probe.json")
    assert {name for name, models in found.results.items() if models} == {"linear-probe"}
    assert "does not fill in words" in found.notes["masked-words"]["not_available"]
    assert "no prompts" in found.notes["zero-shot"]["left_out"]
    assert "0 samples of test have a report" in found.notes["retrieval"]["left_out"]
    assert found.results["linear-probe"]["pixels"]["auroc@100%/sex=M"].value > 0.95
    assert found.settings["tokenizer"] == Tokenizer.load(None, run).fingerprint
    result = medvlp("evaluate", run, "--data", labelled, "--task", "retrieval")
    assert "0 samples of test have a report" in str(result.exception)


@pytest.mark.shared
def test_pixels_tell_sex_and_view_of_real_films(
    run: Path, shared: Path, repository: Path, medvlp, tmp_path: Path
) -> None:
    folder = shared / "data" / "labelled" / "nih1000"
    source = TableSource(
        folder / "labels.csv", folder, repository / "configs" / "tasks" / "labels-nih1000.yaml"
    )
    data = build(source, tmp_path / "nih1000")
    labels = ["--label", "sex=M", "--label", "view=AP"]
    result = medvlp(
        "evaluate", run, "--data", data, "--task", "linear-probe", *labels, "--out", tmp_path / "out.json"
    )
    assert result.exit_code == 0, result.exception
    pixels = results.read(tmp_path / "out.json").results["linear-probe"]["pixels"]
    # The maintainers measured .850 and .938 with the same kind of baseline.
    assert pixels["auroc@100%/sex=M"].value == pytest.approx(0.85, abs=0.05)
    assert pixels["auroc@100%/view=AP"].value == pytest.approx(0.94, abs=0.04)
