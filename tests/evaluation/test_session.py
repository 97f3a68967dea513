"""What a session hands out: each step of a unit only its splits, each split once, with all that is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from medvlp.config import TaskConfig
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.session import View
from medvlp.evaluation.task import Facts, Needs, Role, Task, TaskResult, Unit, register, tasks
from medvlp.runs.errors import RunFolderError
from shards.errors import UsageError
from tests.evaluation.prepared import Prepared, make_splits


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("train.epochs", "training.train.epochs"),
        ("optimizer.lr", "training.optimizer.lr"),
        ("validation.every_epochs", "training.validation.every_epochs"),
        ("checkpoint.keep_last", "training.checkpoint.keep_last"),
        ("finetune.fraction", "fractions"),
    ],
)
def test_keys_of_the_run_that_nothing_reads_are_refused(key: str, own: str, tmp_path: Path) -> None:
    """Tasks trained with their own, and evaluation.json said the others."""
    file = tmp_path / "settings.yaml"
    section, _, name = key.partition(".")
    file.write_text(f"{section}: {{{name}: 1}}\nevaluation: {{seed: 3}}\n")
    for given in ({"overrides": [f"{key}=1"]}, {"files": [file]}):
        with pytest.raises(UsageError, match=f"{key} of the run changes nothing") as caught:
            evaluate(EvaluationOptions(tmp_path, tasks=["zero-shot", "fine-tuning"], **given), print)
        assert str(caught.value).endswith(f"evaluation.tasks.fine-tuning.{own}")
    own_keys = [f"evaluation.tasks.fine-tuning.training.{key}=1", "train.seed=3", "data.max_tokens=9"]
    with pytest.raises(RunFolderError):  # the folder is empty
        evaluate(EvaluationOptions(tmp_path, overrides=own_keys), print)


ROLES: tuple[Role, ...] = ("train", "selection", "evaluated")


class Curious(Task):
    """Asks in one step for one split."""

    name = "curious"
    summary = "for tests"
    needed: ClassVar[tuple[Role, ...]] = ROLES
    asks: ClassVar[tuple[str, Role]] = ("fit", "evaluated")

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        return {role: Needs() for role in self.needed}

    def fit(self, view: View, unit: Unit) -> None:
        self.look("fit", view)

    def measure(self, view: View, unit: Unit, fitted: None) -> TaskResult:
        self.look("measure", view)
        return TaskResult()

    def look(self, step: str, view: View) -> None:
        if self.asks[0] == step:
            split = view.split(self.asks[1])
            assert split is not None
            self.seen = split.name


@pytest.mark.parametrize("role", ROLES)
def test_a_step_sees_only_its_splits(role: Role) -> None:
    """What trains and chooses cannot reach the evaluated split, neither embedded nor as a stream."""
    for step in ("fit", "measure"):
        task = Curious(TaskConfig())
        task.asks = (step, role)
        if (step == "measure") == (role == "evaluated"):
            Prepared(make_splits()).run(task)
            assert task.seen == {"train": "train", "selection": "valid", "evaluated": "test"}[role]
        else:
            with pytest.raises(ValueError, match=f"not {role}: what is trained or chosen must not have seen"):
                Prepared(make_splits()).run(task)
    session = Prepared(make_splits())
    with pytest.raises(ValueError, match="not evaluated"):
        next(session.view(Curious(TaskConfig()), ("train", "selection"), None).batches("evaluated"))


def test_all_that_fit_is_told_of_the_evaluated_split_is_which_findings_have_both_classes() -> None:
    splits = make_splits()
    splits["test"].labels[:, 1] = 0
    session = Prepared(splits)
    view = session.view(Curious(TaskConfig()), ("train", "selection"), None)
    assert view.evaluable == {"edema"}
    assert view.facts.findings == ["edema", "mass"]


def test_a_split_that_was_not_said_to_be_needed_is_not_given() -> None:
    task = Curious(TaskConfig())
    task.needed, task.asks = ("evaluated",), ("fit", "train")
    with pytest.raises(ValueError, match="reads the split train without having said"):
        Prepared(make_splits()).run(task)


def test_train_does_not_choose_for_what_is_fitted_to_its_labels() -> None:
    splits = make_splits()
    del splits["valid"]
    task = Curious(TaskConfig())
    assert Prepared(splits).facts(task).roles == {"evaluated": "test", "selection": "train", "train": "train"}
    task.fits_to_labels = True
    assert Prepared(splits).facts(task).roles == {"evaluated": "test", "train": "train"}


def test_needs_of_several_tasks_are_united() -> None:
    class Greedy(Curious):
        def needs(self, facts: Facts) -> Mapping[Role, Needs]:
            return {"evaluated": Needs(image=True, prompts=("a",)), "train": Needs(text=True)}

    session = Prepared({})
    session.reader.index.splits.update(Prepared(make_splits()).reader.index.splits)
    session.expect(Curious(TaskConfig()))
    session.expect(Greedy(TaskConfig()))
    assert session._needs["test"] == [Needs(), Needs(image=True, prompts=("a",))]
    assert session._needs["train"] == [Needs(), Needs(text=True)]
    session._splits.update(make_splits())
    with pytest.raises(ValueError, match="before the first split is embedded"):
        session.expect(Curious(TaskConfig()))


def test_a_batch_field_that_is_never_loaded_is_named() -> None:
    class Dreamer(Curious):
        def needs(self, facts: Facts) -> Mapping[Role, Needs]:
            return {"evaluated": Needs(fields=frozenset({"entities", "odours"}))}

    session = Prepared({})
    with pytest.raises(ValueError, match="task curious needs the batch field odours"):
        session.expect(Dreamer(TaskConfig()))


def test_two_tasks_of_one_name_are_refused() -> None:
    known = dict(tasks())
    other = type("Other", (Curious,), {"name": next(iter(known))})
    with pytest.raises(ValueError, match="is registered twice"):
        register(other)
    assert tasks() == known


def test_units_have_names_for_files_and_options() -> None:
    assert Unit().name == "whole"
    assert Unit(0.01).name == "fraction-0.01"
    assert Unit(1.0, 3).name == "fraction-1-seed-3"
    assert Unit(seed=0).name == "seed-0"
    # A seed of a date: no other one may be taken for it.
    assert Unit(1.0, 20260101).name == "fraction-1-seed-20260101"
    assert [Unit(seed=seed).name for seed in (10**6, 2**32 - 1)] == ["seed-1000000", "seed-4294967295"]
