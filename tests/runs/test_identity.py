"""A run knows its tokenizer, its data and its encoders by content: moved is fine, another is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp.data.text import Tokenizer
from medvlp.runs.identity import DataRecord, IdentityError, RunIdentity
from medvlp.runs.manifest import Manifest
from shards.errors import MedvlpError
from shards.format import Index, hash_bytes
from tests.training.runs import train, train_expecting_error
from tests.training.test_same_order import damage_an_excluded_sample


@pytest.fixture
def data(phantom_data: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may change."""
    return Path(shutil.copytree(phantom_data, tmp_path / "data", ignore=shutil.ignore_patterns("tokens")))


@pytest.fixture
def trained(
    gloo_pool: Callable[[int], Any], overrides: Callable[..., list[str]], data: Path
) -> Callable[..., Any]:
    """`trained(*more)` -> result of a start of the run in tmp_path/run; the first one ends after 2 steps."""

    def start(*more: str, expect_error: bool = False) -> Any:
        given = overrides(f"data.root={data}", "train.steps=2", *more)
        (result,) = gloo_pool(1).run(train_expecting_error if expect_error else train, given)
        return result

    return start


def command(*words: object) -> Result:
    """Run `medvlp WORDS`; an error for the user becomes its message and code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, MedvlpError):
        result.exit_code = result.exception.exit_code
    return result


def swap_words(data: Path) -> None:
    """Give a dataset another vocabulary of the same size, as a rebuild with other reports does."""
    path = data / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    index = Index.load(data)
    changed = dataclasses.replace(index, tokenizer=hash_bytes(path.read_bytes()))
    (data / "index.json").write_bytes(changed.to_json())


def rebuild(data: Path, seed: int) -> None:
    """Other studies at the same place, as many as before."""
    shutil.rmtree(data)
    words = ["--out", data, "--studies", 80, "--image-size", 64, "--seed", seed, "--workers", 1]
    assert command("shards", "build", "phantom", *words).exit_code == 0


def test_a_start_stores_tokenizer_and_identity_and_manifests_repeat_them(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    manifest = Manifest.read(tmp_path / "run" / "checkpoints" / "step-00000002")
    found = RunIdentity.read(tmp_path / "run", manifest.identity)
    assert found is not None
    identity, tokenizer = found
    assert tokenizer.fingerprint == Tokenizer.load(None, data).fingerprint
    drawn = manifest.identity.pop("drawn")
    assert len(drawn) == 16
    assert manifest.identity == identity.summary()
    assert identity.data[0].content == DataRecord.of(Index.load(data), "train").content
    assert identity.data[0].asked > 0


def test_a_moved_dataset_is_fine(trained: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    assert trained() == 0
    data.rename(tmp_path / "moved")
    assert trained(f"data.root={tmp_path / 'moved'}", "train.steps=3") == 0


def test_another_dataset_at_the_same_place_is_refused_until_the_user_allows_it(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    rebuild(data, seed=5)
    _, message, code = trained("train.steps=3", expect_error=True)
    assert code == 4
    assert "split train" in message
    assert "data.allow_changed=true" in message
    assert trained("train.steps=3", "data.allow_changed=true") == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    changed = [event for event in events if event["kind"] == "data_changed"]
    assert len(changed) == 1
    assert any("split train" in change for change in changed[0]["changes"])
    # The new data are the run's from the next checkpoint on, without a further word.
    assert trained("train.steps=4") == 0
    stored = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert [record["from_step"] for record in stored["data"]] == [0, 2]


def test_a_trace_that_an_earlier_version_left_goes_too(data: Path) -> None:
    """It wrote checkpoints of the old data beside the record of a start on other data."""
    first = DataRecord.of(Index.load(data), "train")
    other = dataclasses.replace(first, from_step=2, content="other")
    stored = RunIdentity("t", ("[CLS]", "[SEP]", "[PAD]"), None, (first, other))
    for step, content, left in (
        (5, first.content, (first,)),
        (5, "other", (first, other)),
        (2, "other", None),
    ):
        found = stored.at(step, {"data": content}).data
        assert found == ((first, other) if left is None else left)


def test_a_start_on_other_data_that_saved_nothing_leaves_no_trace(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    other = Path(shutil.copytree(data, tmp_path / "other"))
    rebuild(other, seed=5)
    for _ in range(2):
        assert trained(f"data.root={other}", "data.allow_changed=true") == 0, "without a step"
        stored = json.loads((tmp_path / "run" / "identity.json").read_text())
        assert [record["from_step"] for record in stored["data"]] == [0, 2]
    assert trained("train.steps=3") == 0
    manifest = Manifest.read(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert manifest.identity["data"] == DataRecord.of(Index.load(data), "train").content
    assert trained("train.steps=4") == 0


@pytest.mark.parametrize(
    ("change", "then"),
    [
        ("train.seed=7", "0"),
        ("data.split=test", "train"),
        ("data.shuffle_block=8", "4096"),
        ("data.tail=wrap", "drop"),
        ("data.min_tokens=3", "1"),
    ],
)
def test_a_run_does_not_go_on_in_another_order_of_samples(
    trained: Callable[..., Any], tmp_path: Path, change: str, then: str
) -> None:
    assert trained() == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    _, message, code = trained("train.steps=3", "data.allow_changed=true", change, expect_error=True)
    key, value = change.split("=")
    assert code == 4
    assert f"{key} was {then} and is {value}. Use the old values" in message
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert trained("train.steps=3") == 0


def test_a_run_does_not_go_on_with_other_samples_of_the_same_dataset(
    trained: Callable[..., Any], overrides: Callable[..., list[str]], data: Path, tmp_path: Path
) -> None:
    rules = ("data.min_tokens=25", "data.max_bad_fraction=0.1")
    whole = {path: path.read_bytes() for path in data.glob("train-*.tar")}
    damage_an_excluded_sample(data, overrides(*rules), "train")
    assert trained(*rules) == 0
    for path, content in whole.items():
        path.write_bytes(content)
    _, message, code = trained(*rules, "train.steps=3", expect_error=True)
    assert code == 4
    assert message.startswith("other samples of split train are drawn")
    assert "until step 2" in message
    assert "data.allow_changed=true" in message
    assert trained(*rules, "train.steps=3", "data.allow_changed=true") == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (changed,) = [event for event in events if event["kind"] == "data_changed"]
    assert (changed["step"], len(changed["changes"])) == (2, 1)
    assert len(json.loads((tmp_path / "run" / "identity.json").read_text())["data"]) == 1
    assert trained(*rules, "train.steps=4") == 0, "these are the run's from now on"


def test_the_samples_of_checkpoints_of_before_are_not_compared(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    assert trained() == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    manifest = Manifest.read(folder)
    del manifest.identity["drawn"]
    (folder / "manifest.json").write_text(manifest.to_json())
    assert trained("train.steps=3") == 0


def test_another_vocabulary_of_the_same_size_is_refused(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    before = Tokenizer.load(None, data)
    swap_words(data)
    assert Tokenizer.load(None, data).vocab_size == before.vocab_size
    _, message, code = trained("train.steps=3", expect_error=True)
    assert code == 4
    assert "tokenizer" in message
    # A tokenizer named beside the same data.
    shutil.copytree(data, tmp_path / "other")
    swap_words(data)
    _, message, code = trained(
        "train.steps=3", f"data.tokenizer={_folder(tmp_path / 'other')}", expect_error=True
    )
    assert code == 4
    assert "data.tokenizer" in message


def _folder(data: Path) -> Path:
    """A tokenizer folder as transformers writes it, from a dataset's tokenizer.json."""
    folder = data / "named"
    Tokenizer.load(None, data).save(folder)
    return folder


def test_a_named_tokenizer_may_be_gone_or_moved_later_but_not_replaced(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    named = _folder(data).rename(tmp_path / "named")
    assert trained(f"data.tokenizer={named}") == 0
    moved = named.rename(tmp_path / "elsewhere")
    assert trained(f"data.tokenizer={named}", "train.steps=3") == 0
    assert trained(f"data.tokenizer={moved}", "train.steps=4") == 0
    swap_words(data)
    _folder(data).rename(named)
    _, message, code = trained(f"data.tokenizer={named}", "train.steps=5", expect_error=True)
    assert (code, "data.tokenizer" in message) == (4, True)


def test_a_replaced_stored_tokenizer_is_refused(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    swap_words(data)
    shutil.copy(data / "tokenizer.json", tmp_path / "run" / "tokenizer.json")
    _, message, code = trained("train.steps=3", "data.allow_changed=true", expect_error=True)
    assert (code, "tokenizer.json" in message) == (4, True)
    (tmp_path / "run" / "tokenizer.json").unlink()
    _, message, code = trained("train.steps=3", "data.allow_changed=true", expect_error=True)
    assert (code, "bring it back" in message) == (4, True)


def test_a_run_without_identity_goes_on_with_one_warning(
    trained: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert trained() == 0
    forget_identity(tmp_path / "run")
    assert (
        command("evaluate", tmp_path / "run", "--task", "retrieval", "evaluation.bootstrap=2").exit_code == 0
    )
    warnings = [record.message for record in caplog.records if "cannot be checked" in record.message]
    assert len(warnings) == 1
    assert trained("train.steps=3") == 0
    assert Manifest.read(tmp_path / "run" / "checkpoints" / "step-00000003").identity


def forget_identity(run: Path) -> None:
    """Make a run folder what versions without identity left."""
    for name in ("identity.json", "tokenizer.json"):
        (run / name).unlink()
    for folder in (run / "checkpoints").glob("step-*"):
        manifest = dataclasses.replace(Manifest.read(folder), identity={})
        (folder / "manifest.json").write_text(manifest.to_json())


def test_everything_afterwards_works_with_the_data_moved(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    run, moved = tmp_path / "run", data.rename(tmp_path / "moved")
    few = ("--task", "retrieval", "evaluation.bootstrap=2")
    assert command("export", run, "--out", tmp_path / "out").exit_code == 0
    assert command("evaluate", run, "--data", moved, *few).exit_code == 0
    assert command("prototypes", "build", run, "--data", moved).exit_code == 0
    assert command("prototypes", "gallery", run, "--data", moved).exit_code == 0
    result = command("evaluate", run, *few)
    assert (result.exit_code, "data.tokenizer" in str(result.exception)) == (3, False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert Index.load(moved).fingerprint in card
    assert "phantom" in card.lower()
    assert f"trained on the reports of {Index.load(moved).splits['train'].patients} patients" in card


def test_another_dataset_is_refused_afterwards_unless_it_is_meant(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    assert trained() == 0
    run, words = tmp_path / "run", Tokenizer.load(None, data).fingerprint
    fingerprint = Index.load(data).fingerprint
    rebuild(data, seed=6)
    few = ("--task", "retrieval", "evaluation.bootstrap=2")
    for refused in (["evaluate", run, *few], ["prototypes", "build", run]):
        result = command(*refused)
        assert result.exit_code == 4
        assert f"--data {data}" in str(result.exception)
    assert command("evaluate", run, "--data", data, *few).exit_code == 0
    evaluated = json.loads((run / "evaluation.json").read_text())
    assert evaluated["settings"]["tokenizer"] == words
    result = command("evaluate", run, "--data", data, f"data.tokenizer={_folder(data)}", *few)
    assert (result.exit_code, "another tokenizer" in str(result.exception)) == (4, True)
    # The export says what the run was trained on, and ships the tokenizer it was trained with.
    assert command("export", run, "--out", tmp_path / "out").exit_code == 0
    assert fingerprint in (tmp_path / "out" / "README.md").read_text()
    assert command("export", run, "--out", tmp_path / "other", "--data", data).exit_code == 4
    stored = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    shipped = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "text" / "tokenizer.json"))
    assert shipped.get_vocab() == stored.get_vocab()


def test_a_named_text_model_is_built_from_the_run_when_its_folder_changes(
    trained: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Another layer norm has the same shapes, so that only the weights' sizes were looked at."""
    import transformers

    folder = tmp_path / "bert"
    settings = transformers.BertConfig(
        vocab_size=Tokenizer.load(None, data).vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, layer_norm_eps=1e-12,
    )  # fmt: skip
    transformers.BertModel(settings).save_pretrained(folder)
    named = ("text.options={}", f"text.name={folder}")
    assert trained(*named) == 0
    run = tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5, "hidden_act": "relu"}))
    assert trained(*named, "train.steps=3") == 0
    assert command("export", run, "--out", tmp_path / "out").exit_code == 0
    exported = json.loads((tmp_path / "out" / "text" / "config.json").read_text())
    assert (exported["layer_norm_eps"], exported["hidden_act"]) == (1e-12, "gelu")
    # The network before training needs the weights it began with.
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: value + 1 for name, value in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = command("evaluate", run, "--task", "retrieval", "evaluation.bootstrap=2")
    assert (result.exit_code, "text.name" in str(result.exception)) == (4, True)
    shutil.rmtree(folder)
    assert trained(*named, "train.steps=4") == 0
    assert command("export", run, "--out", tmp_path / "again").exit_code == 0


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "data": 3, "special": [], "tokenizer": 1}']
)
def test_a_stored_identity_that_is_none_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "identity.json").write_text(content)
    with pytest.raises(IdentityError, match=r"identity\.json"):
        RunIdentity.read(tmp_path, {"data": "a", "tokenizer": "b", "encoders": "c"})


def test_manifests_of_older_versions_keep_their_checksum(tmp_path: Path) -> None:
    files = {"weights.safetensors": {"bytes": 1, "xxh3_128": "0" * 32}}
    manifest = Manifest(3, 0, 1, 0, "fp32", 8, "hash", files=files, format=2)
    assert "identity" not in manifest.to_json()
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path).identity == {}
