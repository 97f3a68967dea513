"""The run folder: what it tells, when it is refused."""

import json

import pytest

from medvlp.training.run_folder import changed_keys
from tests.training.runs import read_metrics, train, train_expecting_error, train_from_file


def test_changed_keys_are_named():
    before, after = "{a: {b: 1, c: [1]}, d: x}", "{a: {b: 2, c: [1]}, e: null, d: x}"
    assert changed_keys(before, after) == ["a.b"]


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
