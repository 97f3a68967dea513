"""What is trained and chosen is handed nothing of the evaluated split, whatever the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.evaluation import evaluate, supervised
from medvlp.evaluation.evaluate import EvaluationOptions
from medvlp.evaluation.session import View
from medvlp.evaluation.supervised import Network, Supervised
from medvlp.evaluation.task import tasks
from medvlp.evaluation.trained import TrainedTask
from medvlp.training.recipe import TrainingSet
from shards.reader import ShardReader
from shards.sources.phantom import PhantomSource
from tests.launcher.tiny_run import build, make_run

TRAINED = [name for name, task in tasks().items() if issubclass(task, TrainedTask)]
SMALL = {"report": ["width=16", "heads=2", "layers=1", "hidden=16", "beams=1", "max_words=4"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shards = build(PhantomSource(studies=100, image_size=32, seed=3), folder / "data", vocab_size=300)
    return make_run(shards, folder / "run")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The splits of which anything has been read; whoever looks clears it."""
    found: set[str] = set()
    members, opened = ShardReader._members, SampleStore.open_or_build.__func__  # type: ignore[attr-defined]

    def watched(reader: ShardReader, split: str, i: int) -> Any:
        found.add(split)
        return members(reader, split, i)

    def watched_store(kind: Any, reader: ShardReader, split: str, *more: Any) -> Any:
        found.add(split)
        return opened(kind, reader, split, *more)

    monkeypatch.setattr(ShardReader, "_members", watched)
    monkeypatch.setattr(SampleStore, "open_or_build", classmethod(watched_store))
    return found


def untrained(network: Network, reader: ShardReader, tokenizer: Tokenizer) -> Any:
    """The objective of a network, as drawn."""
    recipe = Supervised(network.config)
    return recipe.build(TrainingSet(network.config, reader, recipe.samples(reader, tokenizer), tokenizer))


#: Beside the epoch, which the trainer chooses.
CHOOSES_NOTHING = {"retrieval", "detection", "report", "masked-words"}


@pytest.mark.parametrize("name", tasks())
def test_nothing_of_the_evaluated_split_is_read_to_choose(
    run: Path, read: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Epoch, thresholds, vocabulary, prompts, baselines. Nothing is trained: networks are as drawn."""
    words = [f"evaluation.tasks.{name}.{word}" for word in SMALL.get(name, [])]
    session = evaluate._open(EvaluationOptions(run, overrides=words), lambda line: None)
    task = tasks()[name](session.config.evaluation.tasks[name])
    made = (
        {
            start: Network(*of, session.source)
            for start in ("trained", "untrained")
            for of in [_config(session, task, start)]
        }
        if name in TRAINED
        else {}
    )
    monkeypatch.setattr(View, "network", lambda view, unit, start: made[start])
    monkeypatch.setattr(Network, "objective", untrained)
    session.expect(task)
    view = session.view(task, ("train", "selection"), tmp_path)
    if name not in TRAINED:
        assert view.evaluable, "of labels, fit is told which findings can be evaluated"
    read.clear()
    task.fit(view, task.units()[-1])
    assert "test" not in read
    assert ("valid" in read) == (name not in CHOOSES_NOTHING)
    assert "train" in read or name not in TRAINED


def _config(session: Any, task: TrainedTask, start: Any) -> tuple[TrainedTask, Any]:
    config = supervised.unit_config(session, task, task.units()[-1], start, Path("nowhere"))
    return supervised.task_of(config), config


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_collected_for_a_head_comes_from_the_training_split(
    run: Path, read: set[str], name: str
) -> None:
    """Vocabularies of words and answers: of the drawn samples, by default."""
    words = [f"evaluation.tasks.{name}.{word}" for word in SMALL.get(name, [])]
    words += ["evaluation.tasks.report.tokenizer=words"] if name == "report" else []
    config = supervised.finetuning_config(run, name, 0.5, 0, False, [], [f"run.dir={run}-tuned", *words])
    recipe = Supervised(config)
    reader = ShardReader(Path(config.data.root))
    tokenizer = recipe.tokenizer()
    samples = recipe.samples(reader, tokenizer)
    positions: set[int] = set()
    metadata = ShardReader.metadata
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ShardReader, "metadata", lambda of, split, i: positions.add(i) or metadata(of, split, i)
        )
        read.clear()
        recipe.build(TrainingSet(config, reader, samples, tokenizer))
    assert read <= {"train"}
    assert positions <= set(samples.tolist())
