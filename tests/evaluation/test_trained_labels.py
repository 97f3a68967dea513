"""Tasks that train: which labels they learn and measure, and which have no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medvlp.config import Config
from medvlp.evaluation import task as contract
from medvlp.evaluation.evaluate import EvaluationOptions, _task, evaluate
from medvlp.evaluation.supervised import TrainingStoppedError
from medvlp.evaluation.tasks.fine_tuning import FineTuning, FineTuningConfig
from medvlp.evaluation.trained import TrainedTask
from shards.errors import UsageError
from tests.launcher.tiny_run import make_run, make_shards

FAST = ["evaluation.bootstrap=20", "monitor.wandb=disabled", "evaluation.tasks.fine-tuning.fractions=[0.5]"]


def test_what_the_evaluation_says_of_labels_is_what_the_networks_learn(tmp_path: Path) -> None:
    run = make_run(make_shards(tmp_path / "phantom"), tmp_path / "tiny")
    trainings: list[Config] = []

    def stopped(config: Config) -> int:
        trainings.append(config)
        return 75

    def asked(*words: str, **options: Any) -> FineTuningConfig:
        everything = EvaluationOptions(
            run, tasks=["fine-tuning"], overrides=[*FAST, *words], train=stopped, **options
        )
        with pytest.raises(TrainingStoppedError):
            evaluate(everything, lambda line: None)
        settings: FineTuningConfig = trainings[-1].evaluation.tasks["fine-tuning"]
        return settings

    learned = asked("evaluation.blank=negative", labels=["edema", "mass"], uncertain="positive")
    assert (learned.labels, learned.uncertain, learned.blank) == (["edema", "mass"], "positive", "negative")
    own = asked("evaluation.tasks.fine-tuning.uncertain=negative")
    assert (own.labels, own.uncertain, own.blank) == ([], "negative", "auto")
    # Other labels are another training, in a folder of its own.
    assert trainings[0].run.dir != trainings[1].run.dir
    # So is what DeepSpeed is told, which may be another optimiser: finished numbers came back for it.
    asked()
    asked("deepspeed={gradient_clipping: 0.5}")
    assert trainings[-1].run.dir != trainings[-2].run.dir
    with pytest.raises(UsageError, match=r"uncertain=negative and --uncertain \(positive\) do not agree"):
        asked("evaluation.tasks.fine-tuning.uncertain=negative", uncertain="positive")


@pytest.mark.parametrize("name", [name for name, task in contract.tasks().items() if task.hedged])
def test_what_would_change_nothing_is_refused_or_said(name: str) -> None:
    task, said = contract.tasks()[name], list[str]()
    config = Config()
    config.evaluation.tasks[name] = task.config()
    for options in (EvaluationOptions(Path()), EvaluationOptions(Path(), uncertain="positive")):
        config.evaluation.tasks[name] = task.config()
        if options.uncertain == "exclude" or not issubclass(task, TrainedTask):
            assert isinstance(_task(name, options, config, said.append), task)
        else:
            with pytest.raises(
                UsageError, match=f"{name}: --uncertain .* would change nothing: {task.hedged}"
            ):
                _task(name, options, config, said.append)
    expected = [] if issubclass(task, TrainedTask) else [f"{name}: {task.hedged}, whatever --uncertain says"]
    assert said == expected


def test_a_finding_without_a_number_in_some_units_is_listed_with_them() -> None:
    def part(*listed: tuple[str, str]) -> contract.TaskResult:
        items = [{"finding": finding, "reason": reason} for finding, reason in listed]
        return contract.TaskResult(notes={"not_evaluable": items, "training": {}})

    everywhere, few = ("mass", "1 positives in test"), ("edema", "0 positives in the drawn part of train")
    parts = {
        contract.Unit(1.0, 0): part(everywhere),
        contract.Unit(0.01, 0): part(everywhere, few),
        contract.Unit(0.01, 1): part(everywhere, few),
    }
    listed = FineTuning(FineTuningConfig()).join(parts).notes["not_evaluable"]
    assert listed == [
        {"finding": "mass", "reason": everywhere[1]},
        {"finding": "edema", "reason": f"{few[1]} (fraction-0.01-seed-0, fraction-0.01-seed-1)"},
    ]
