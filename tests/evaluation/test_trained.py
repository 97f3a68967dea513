"""Tasks that train: what is drawn, what is seen, what comes out, and that all of it is resumed."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from medvlp.config import Config, ConfigError
from medvlp.data.batch import Batch
from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_dataset
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.evaluation import task as contract
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate, quick_tasks
from medvlp.evaluation.heads.classification import class_entropy, masked_bce
from medvlp.evaluation.report import scores
from medvlp.evaluation.splits import stratified_fraction
from medvlp.evaluation.supervised import (
    Network,
    TrainingStoppedError,
    finetuning_config,
    recipe_of,
    task_of,
    train_here,
)
from medvlp.evaluation.task import EvaluationError
from medvlp.evaluation.tasks.fine_tuning import FineTuning, FineTuningConfig
from medvlp.evaluation.trained import TrainedTask
from medvlp.runs import saved_run
from shards.errors import MedvlpError
from shards.reader import ShardReader
from shards.sources.phantom import PhantomSource
from shards.study import Study
from tests.evaluation.leaky import Twice
from tests.evaluation.toy_trained import Brightness
from tests.launcher.tiny_run import build, make_run, make_shards

FAST = [
    "evaluation.bootstrap=20", "monitor.wandb=disabled", "monitor.progress=false", "zero.stage=0",
    "evaluation.tasks.fine-tuning.fractions=[0.5]",
    "evaluation.tasks.fine-tuning.training={train: {epochs: 2, min_steps: 0, global_batch: 16}}",
]  # fmt: skip


@pytest.fixture
def toy() -> Iterator[type[Brightness]]:
    contract.register(Brightness)
    yield Brightness
    del contract.REGISTRY["brightness"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "phantom")


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    return make_run(shards, tmp_path / "tiny")


def ask(run: Path, *more: str, task: str = "fine-tuning", train=train_here) -> contract.TaskResult:
    """Results, notes with what was said, and the kept scores of the last unit."""
    said: list[str] = []
    options = EvaluationOptions(run, tasks=[task], overrides=[*FAST, *more], train=train)
    found = evaluate(options, said.append)
    units = [scores.read(run, found, task, unit) for unit in found.scores.get(task, {})]
    notes = found.notes[task] | {"said": said}
    return contract.TaskResult(found.results[task], notes, units[-1] if units else None)


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=60),
    small=st.floats(0.01, 1),
    large=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_fractions_are_of_whole_patients_and_parts_of_each_other(
    counts: list[int], small: float, large: float, seed: int
) -> None:
    small, large = sorted((small, large))
    patients = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).choice([1.0, 0.0, -1.0, np.nan], (len(patients), 3))
    drawn = [stratified_fraction(patients, labels, fraction, seed) for fraction in (small, large)]
    assert set(drawn[0]) <= set(drawn[1])
    for rows, fraction in zip(drawn, (small, large), strict=True):
        of = set(patients[rows])
        assert len(of) == max(1, round(fraction * len(counts)))
        assert len(rows) == sum(counts[patient] for patient in of)


def test_a_fraction_has_the_mix_of_labels_of_all() -> None:
    rng = np.random.default_rng(5)
    patients = np.repeat(np.arange(1000), 2)
    labels = (rng.random((2000, 1)) < 0.1).astype(float)
    share = np.unique(patients[labels[:, 0] == 1]).size / 1000
    for seed in range(5):
        rows = stratified_fraction(patients, labels, 0.1, seed)
        positives = np.unique(patients[rows][labels[rows, 0] == 1]).size
        assert abs(positives - 100 * share) <= 1  # of a plain draw the deviation is 3.9
    assert not np.array_equal(*(stratified_fraction(patients, labels, 0.1, seed) for seed in (0, 1)))


def test_losses_do_not_depend_on_how_a_batch_is_divided() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 3)
    labels = torch.randint(0, 2, (12, 3)).float()
    labels[2:7, 0] = torch.nan
    one = torch.nn.functional.one_hot(torch.arange(12) % 3, 3).float()
    one[1] = 0
    for loss, truth in ((masked_bce, labels), (class_entropy, one)):
        parts = [loss(logits[i : i + 4], truth[i : i + 4]) for i in (0, 4, 8)]
        torch.testing.assert_close(sum(parts) / 3, loss(logits, truth))
    known = ~labels.isnan()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known])
    torch.testing.assert_close(masked_bce(logits, labels), expected * known.sum() / 36)


def test_a_task_from_outside_trains_below_the_run_and_goes_on_from_there(
    toy: type[Brightness], run: Path
) -> None:
    trainings: list[Config] = []

    def stopped(config: Config) -> int:
        trainings.append(config)
        return train_here(config) if len(trainings) == 1 else 75

    where = "evaluation.tasks.brightness"
    words = [f"{where}.fractions=[1.0]", f"{where}.seeds=[3,4]"]
    with pytest.raises(TrainingStoppedError) as ended:
        ask(run, *words, task="brightness", train=stopped)
    assert ended.value.exit_code == 75
    assert [config.finetune.start for config in trainings] == ["trained", "untrained"]
    result = ask(
        run, *words, task="brightness", train=lambda config: trainings.append(config) or train_here(config)
    )
    assert [(config.train.seed, config.finetune.start) for config in trainings[2:]] == [
        (3, "untrained"), (4, "trained"), (4, "untrained"),
    ]  # fmt: skip
    assert set(result.models) == {"trained", "untrained"}
    assert set(result.models["trained"]) == {"error@100%", "error-sd@100%"}
    notes = result.notes["training"]["fraction-1-seed-3"]["trained"]
    assert notes["valid/error"] > 0
    metrics = (Path(trainings[0].run.dir) / "metrics.jsonl").read_text().splitlines()
    validated = [json.loads(line) for line in metrics if "valid/error" in line]
    assert min(line["valid/error"] for line in validated) == notes["valid/error"]
    assert ask(run, *words, task="brightness", train=lambda config: pytest.fail("trained again")).models
    # A folder is of one lesson: what it has learned must not be taken for another fraction's.
    config = trainings[0]
    for section, name, value in (
        ("finetune", "fraction", 0.5),
        ("train", "seed", 9),
        ("finetune", "start", "untrained"),
    ):
        other = copy.deepcopy(config)
        setattr(getattr(other, section), name, value)
        with pytest.raises(
            MedvlpError, match=f"learns something else: {section}.{name} was .* and is {value}"
        ):
            train_here(other)
    assert train_here(config) == 0


def test_what_is_trained_and_chosen_has_not_seen_the_evaluated_split(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, set[str]] = {}
    step = "evaluable"  # which findings have both classes there: all that `fit` is told
    image = ShardReader.image

    def watched(reader: ShardReader, split: str, position: int) -> bytes:
        read.setdefault(step, set()).add(split)
        return image(reader, split, position)

    monkeypatch.setattr(ShardReader, "image", watched)
    fit, measure = FineTuning.fit, FineTuning.measure

    def fitting(*arguments):  # type: ignore[no-untyped-def]
        nonlocal step
        step = "fit"
        return fit(*arguments)

    def measuring(*arguments):  # type: ignore[no-untyped-def]
        nonlocal step
        step = "measure"
        return measure(*arguments)

    monkeypatch.setattr(FineTuning, "fit", fitting)
    monkeypatch.setattr(FineTuning, "measure", measuring)
    result = ask(run)
    assert read["fit"] == {"train", "valid"}
    assert read["measure"] == {"test"}
    assert 0 <= result.models["trained"]["auroc@50%/macro"].value <= 1
    assert result.models["chance"]["auroc@50%/macro"].value == 0.5
    kept = result.scores
    assert kept is not None
    assert kept.log_odds == {"trained", "untrained"}
    for model, of in kept.models.items():
        for column, name in enumerate(kept.findings):
            known = ~np.isnan(kept.truth[:, column])
            area = roc_auc_score(kept.truth[known, column], of[known, column])
            assert area == pytest.approx(result.models[model][f"auroc@50%/{name}"].value)


class Seen(torch.nn.Module):
    """Predicts what it sees: the mean of each image."""

    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"mean": batch.image.float().mean(dim=(1, 2, 3))}


def test_a_network_is_measured_in_the_views_of_its_own_training(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pre-training's, of which the session makes its splits, is the middle of an image."""
    run = make_run(shards, tmp_path / "tiny", "data.image_size=24")
    source = saved_run.locate(run)
    words = [f"run.dir={tmp_path / 'tuned'}", "data.transform.crop=none"]
    config = finetuning_config(run, "fine-tuning", 1.0, 0, False, [], words)
    tokenizer, reader = saved_run.load_tokenizer(source, config), open_reader(config.data)
    session = saved_run.load_config(source, [])
    of = {
        name: evaluation_dataset(chosen, reader, tokenizer, "test")
        for name, chosen in (("session", session), ("network", config))
    }
    view: Any = SimpleNamespace(dataset=lambda role: of["session"], device=torch.device("cpu"))
    monkeypatch.setattr(Network, "objective", lambda *arguments: Seen())
    network = Network(task_of(config), config, source)
    found = network.predict(view, "evaluated")
    expected = {
        name: np.array([dataset[[i]].image.float().mean().item() for i in found.sample])
        for name, dataset in of.items()
    }
    assert np.allclose(found.arrays["mean"], expected["network"])
    assert not np.allclose(found.arrays["mean"], expected["session"], atol=1)
    (batch,) = network.batches(view, "evaluated", found.sample[:4])
    assert np.allclose(batch.image.float().mean(dim=(1, 2, 3)), expected["network"][:4])


def test_a_network_has_the_parts_of_all_phases_it_was_trained_in(shards: Path, tmp_path: Path) -> None:
    """PRIOR's stage 1 alone has no bank and no decoders; the three phases together have them."""
    phases = "optimizer.phases=[{epochs: 1, lr: 1e-4}, {epochs: 1, lr: 1e-4}, {epochs: 1, lr: 1e-4}]"
    words = [
        "method.name=prior", "prototypes.init=random", "method.prototypes=8",
        "method.decoder_heads=2", "method.decoder_layers=1", "method.decoder_hidden=16",
        "method.image_decoder_width=16", phases,
    ]  # fmt: skip
    run = make_run(shards, tmp_path / "staged", *words, without=frozenset({"method.head_hidden"}))
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("stage: 3", "stage: 1"))
    config = finetuning_config(
        run, "fine-tuning", 1.0, 0, False, [], [f"run.dir={tmp_path / 'tuned'}", "train.steps=1", *FAST[1:4]]
    )
    assert train_here(config) == 0
    best = Network.of(config)
    reader = open_reader(config.data)
    assert best.objective(reader, saved_run.load_tokenizer(best.saved, config)).method is not None


class Bare(PhantomSource):
    """Images with labels that nobody gave, and nothing else."""

    def __init__(self) -> None:
        super().__init__(studies=30, image_size=32, seed=3)

    def load(self, i: int) -> list[Study]:
        nothing: dict[str, Any] = {
            "sections": {},
            "sentences": [],
            "boxes": [],
            "masks": {},
            "questions": [],
            "phrases": [],
        }
        return [
            replace(study, labels=dict.fromkeys(study.labels), entities=[], **nothing)
            for study in super().load(i)
        ]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Bare(), tmp_path_factory.mktemp("bare") / "data", vocab_size=300)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaky")
    return make_run(build(Twice(), folder / "data", vocab_size=300), folder / "run")


@pytest.mark.parametrize("task", [name for name, task in contract.tasks().items() if task.fits_to_labels])
def test_nothing_is_learned_where_a_patient_is_in_two_splits(leaky: Path, task: str) -> None:
    train = lambda config: pytest.fail("trained")  # noqa: E731
    with pytest.raises(EvaluationError, match=r"10 patients in both test, train: .* has been seen"):
        ask(leaky, task=task, train=train)


def test_patients_that_a_threshold_or_a_baseline_has_seen_are_told(leaky: Path) -> None:
    """Beside them the numbers of the networks are as good as before, so that nothing is refused."""
    said: list[str] = []
    words = ["evaluation.bootstrap=10", "monitor.wandb=disabled"]
    evaluate(EvaluationOptions(leaky, tasks=["retrieval", "zero-shot"], overrides=words), said.append)
    lines = [line for line in said if "10 patients in both test, train" in line]
    assert len(lines) == 2, "of train and test, then of all three"
    with pytest.raises(EvaluationError, match="10 patients in both test, train"):
        ask(leaky, task="linear-probe")


TRAINED = {name: task for name, task in contract.tasks().items() if issubclass(task, TrainedTask)}


@pytest.mark.parametrize("task", [name for name, task in TRAINED.items() if task.packages])
def test_a_package_that_is_missing_is_named_before_anything_is_trained(
    leaky: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name in TRAINED[task].packages else find(name, *more),
    )
    for begin in (
        lambda: ask(leaky, task=task, train=lambda config: pytest.fail("trained")),
        lambda: recipe_of(finetuning_config(leaky, task, 1.0, 0, False, [], [f"run.dir={leaky}-tuned"])),
    ):
        with pytest.raises(EvaluationError, match=rf"{task} needs \w+: pip install medvlp\[evaluate\]"):
            begin()


@pytest.mark.parametrize("task", TRAINED)
def test_a_dataset_without_what_is_learned_is_refused_before_anything_is_trained(
    leaky: Path, bare: Path, task: str
) -> None:
    options = EvaluationOptions(
        leaky, str(bare), [task], overrides=FAST, train=lambda config: pytest.fail("trained")
    )
    with pytest.raises(EvaluationError, match=rf"{task}: no sample of split \w+ has an? "):
        evaluate(options, lambda line: None)


def test_what_is_chosen_while_training_shares_no_patient_unless_the_user_says_so(leaky: Path) -> None:
    words = [f"run.dir={leaky}-tuned", "validation.split=test"]
    for more in ([], ["evaluation.shared_patients=true"]):
        config = finetuning_config(leaky, "fine-tuning", 1.0, 0, False, [], [*words, *more])
        recipe, reader = recipe_of(config), open_reader(config.data)
        store = SampleStore.open_or_build(reader, "test", config.data, Tokenizer.load(None, config.data.root))
        if more:
            assert len(recipe.validated(reader, store)) == 10
        else:
            with pytest.raises(EvaluationError, match="10 patients in both train, test"):
                recipe.validated(reader, store)


def test_an_unknown_protocol_or_key_of_the_training_is_named(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"protocol=mine: there are ours"):
        FineTuning(FineTuningConfig(protocol="mine"))
    with pytest.raises(ConfigError, match=r"fine-tuning.training: unknown key 'train.epoch'"):
        ask(run, "evaluation.tasks.fine-tuning.training={train: {epoch: 2}}")
    with pytest.raises(ConfigError, match="stands twice"):
        ask(run, "evaluation.tasks.fine-tuning.seeds=[1,1]")


def test_what_trains_is_done_only_where_it_is_asked_for() -> None:
    quick = quick_tasks()
    assert {"zero-shot", "retrieval", "linear-probe", "grounding"} <= set(quick)
    assert {name for name, task in contract.tasks().items() if issubclass(task, TrainedTask)}.isdisjoint(
        quick
    )


@pytest.mark.parametrize(
    ("task", "protocol"),
    [
        (task, name)
        for task in contract.tasks().values()
        if issubclass(task, TrainedTask) and task.fields & {"boxes", "masks", "phrases"}
        for name in task.protocols
    ],
)
def test_what_has_places_is_not_rotated_as_in_pre_training(task: type[TrainedTask], protocol: str) -> None:
    """PRIOR's and MeDSLIP's configs rotate images, which boxes and masks cannot follow."""
    transform = task.protocols[protocol]["data"]["transform"]
    assert (transform["rotate"], transform["rand_augment"]) == (0, 0)
