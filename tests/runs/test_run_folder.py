"""The run folder: what it tells, when it is refused."""

import json
from pathlib import Path

import pytest
import yaml

from medvlp.config import Config
from medvlp.published.run import no_words
from medvlp.runs.identity import RunIdentity
from medvlp.runs.run_folder import changed_keys, describe_run
from tests.training.runs import read_metrics, train, train_expecting_error, train_from_file


def test_changed_keys_are_named():
    before, after = "{a: {b: 1, c: [1]}, d: x}", "{a: {b: 2, c: [1]}, e: null, d: x}"
    assert changed_keys(before, after) == ["a.b"]
    for unreadable in ("a: [", "- no config", ""):
        assert "cannot be read" in changed_keys(unreadable, after)[0]


def test_what_training_began_with_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokenizer = Config(), no_words()
    config.run.dir, config.data.root = str(tmp_path / "run"), "data"
    config.train.start, config.image.weights = "runs/base", "w.pth"
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    describe_run(config, 1, RunIdentity(tokenizer.content, tokenizer.special, None, ()), tokenizer)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["train"]["start"] == str(tmp_path / "runs" / "base")
    assert stored["image"]["weights"] == str(tmp_path / "w.pth")


@pytest.mark.dist
def test_a_fresh_run_needs_an_empty_folder_and_the_stored_config_repeats_it(gloo_pool, overrides, tmp_path):
    pool = gloo_pool(1)
    options = overrides("train.steps=2", run="first")
    assert pool.run(train, options, True) == [0]
    told = json.loads((tmp_path / "first/environment.json").read_text())
    assert told["world_size"] == 1
    assert {"torch", "deepspeed"} <= told["packages"].keys()
    kind, text, code = pool.run(train_expecting_error, options, True)[0]
    assert (kind, code) == ("RunFolderError", 4)
    assert "is not empty and --fresh asks for a new run" in text
    file = str(tmp_path / "first/config.yaml")
    assert pool.run(train_from_file, file, [f"run.dir={tmp_path / 'second'}"]) == [0]
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == losses[1]


@pytest.mark.dist
def test_a_start_that_fails_leaves_no_config_and_a_fresh_start_may_follow(gloo_pool, overrides, tmp_path):
    pool = gloo_pool(1)
    for change, message in [
        ("image.name=test_vti.r160_in1k", "similar names: test_vit"),
        ("data.max_tokens=600", "data.max_tokens=600 exceeds the text model's 512 positions"),
        ("data.sections=[nothing]", "have no text in the sections nothing"),
        ("data.tokenizer=/nowhere/tokenizer", "data.tokenizer: folder /nowhere/tokenizer does not exist"),
        ("data.split=trian", "has no split 'trian'"),
    ]:
        _, text, code = pool.run(train_expecting_error, overrides(change), True)[0]
        assert message in text
        assert code in (2, 3)
    assert pool.run(train, overrides("train.steps=1"), True) == [0]


@pytest.mark.dist
def test_a_checkpoint_of_another_config_is_refused_and_the_stored_config_stays(
    gloo_pool, overrides, tmp_path
):
    pool = gloo_pool(1)
    assert pool.run(train, overrides("train.steps=1")) == [0]
    config = (tmp_path / "run/config.yaml").read_text()
    for change, message in [
        (
            "method.prototypes=16",
            "alignment.objective.prototypes.weight is of shape [8, 16] there and of shape [16, 16]",
        ),
        ("optimizer.name=sgd", "optimizer.name was adamw and is sgd"),
        ("text.frozen=true", "and is frozen here"),
    ]:
        kind, text, code = pool.run(train_expecting_error, overrides("train.steps=2", change))[0]
        assert (kind, code) == ("CheckpointError", 4)
        assert message in text
        assert (tmp_path / "run/config.yaml").read_text() == config
    assert pool.run(train, overrides("train.steps=2")) == [0]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("run.dir=/dev/null/run", "RunFolderError", "run.dir=/dev/null/run cannot be used"),
        ("data.root=/nowhere", "AgreedError", "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_used_is_the_same_error_on_all_ranks(gloo_pool, overrides, change, kind, message):
    first, second = gloo_pool(2).run(train_expecting_error, overrides(change))
    assert first == second
    assert first[0] == kind
    assert message in first[1]
