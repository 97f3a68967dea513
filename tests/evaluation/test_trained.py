"""Tasks that train: what is drawn, what is seen, what comes out, and that all of it is resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvlp.config import Config, ConfigError
from medvlp.evaluation import task as contract
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate, quick_tasks
from medvlp.evaluation.heads.classification import class_entropy, masked_bce
from medvlp.evaluation.splits import stratified_fraction
from medvlp.evaluation.supervised import TrainingStoppedError, train_here
from medvlp.evaluation.tasks.fine_tuning import FineTuning, FineTuningConfig
from medvlp.evaluation.trained import TrainedTask
from shards.errors import MedvlpError
from shards.reader import ShardReader
from tests.evaluation.toy_trained import Brightness
from tests.launcher.tiny_run import make_run, make_shards

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
    said: list[str] = []
    options = EvaluationOptions(run, tasks=[task], overrides=[*FAST, *more], train=train)
    found = evaluate(options, said.append)
    return contract.TaskResult(found.results[task], found.notes[task] | {"said": said})


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
    assert (
        set(result.models["trained"]) == {"error@100%", "error-sd@100%/"}
        or "error@100%" in result.models["trained"]
    )
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
