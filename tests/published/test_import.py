"""`medvlp import` through the command: what a run folder becomes, and what is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp.config_files import ConfigError
from medvlp.methods.medslip.method import MeDSLIP
from medvlp.published import medslip
from medvlp.published.reading import PublishedFileError, read_published
from medvlp.published.renaming import Rule, rename
from medvlp.runs import saved_run
from medvlp.runs.errors import CheckpointError
from shards.entities.vocabulary import OBSERVATIONS
from tests.golden_files import FOLDER
from tests.published.rule import clinical_tokenizer, facts_of, state_dict


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Result, kind: type[Exception] = PublishedFileError) -> str:
    """The one line of an error meant for the user."""
    assert isinstance(result.exception, kind), result.exception
    message = str(result.exception)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """MeDSLIP's tensors by the rule (the smallest published file)."""
    return state_dict(facts_of(FOLDER / "import_medslip.npz"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A BERT of the right width, its tokenizer, and a file of 75 descriptions, as options."""
    import transformers

    folder = tmp_path_factory.mktemp("sources")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 28996}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(hidden_size=768, **sizes)).save_pretrained(folder / "bert")
    clinical_tokenizer(folder / "bert")
    book = {key.replace("pneumonia", "eumonia"): f"the {key} of and in" for key in OBSERVATIONS}
    (folder / "book.json").write_text(json.dumps(book))
    bert = str(folder / "bert")
    return ["--text", bert, "--tokenizer", bert, "--book", str(folder / "book.json")]


@pytest.fixture(scope="module")
def run(weights: dict[str, Tensor], sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MeDSLIP's file with the wrapper and prefix of several GPUs, imported."""
    folder = tmp_path_factory.mktemp("imported")
    saved = {"model": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3}
    saved["model"]["module.stranger.weight"] = torch.ones(1)
    torch.save(saved, folder / "MeDSLIP_resnet50.pth")
    words = ("import", "medslip", folder / "MeDSLIP_resnet50.pth", "--out", folder / "run", *sources)
    result = invoke(*words, "--allow-unknown")
    assert result.exit_code == 0, result.exception
    assert "stranger.weight" in result.output
    return folder / "run"


def test_an_imported_run_is_read_like_any_other(run: Path, weights: dict[str, Tensor]) -> None:
    source = saved_run.locate(run)
    config = saved_run.load_config(source, [], reads_data=False)
    tokenizer = saved_run.load_tokenizer(source, config)
    method = saved_run.load_method(source, config, tokenizer)
    assert isinstance(method, MeDSLIP)
    packed = weights["decoder_anatomy.layers.2.multihead_attn.in_proj_weight"]
    assert torch.equal(method.anatomy_decoder.layers[2].cross_attention.value.weight, packed[512:])
    texts = tokenizer.tokenize([["the effusion of and in"]], 128)
    row = OBSERVATIONS.index("effusion")
    torch.testing.assert_close(method.book.look_up(method.text_encoder, texts)[0], method.book.pathology[row])
    stored = (run / "config.yaml").read_text()
    assert "root: ???" in stored
    assert "bert" not in stored.replace("model_type: bert", "")
    card = (run / "README.md").read_text()
    for told in (
        "MeDSLIP_resnet50.pth, sha256",
        "data use agreement",
        "and not read: epoch",
        "book.json",
        "- `stranger.weight`",
    ):
        assert told in card, told
    for words in (("checkpoints", run, "--verify"), ("runs", run.parent)):
        assert invoke(*words).exit_code == 0


def test_data_and_resume_are_asked_for_by_name(run: Path, data: Path) -> None:
    assert "data.root" in refused(invoke("evaluate", run), ConfigError)
    words = ("pretrain", run / "config.yaml", f"data.root={data}", "data.image_size=32")
    message = refused(invoke(*words, "train.global_batch=2"), CheckpointError)
    assert f"train.start={run}" in message


def save(content: Any, folder: Path) -> Path:
    """A torch file in the folder."""
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


TOY = [Rule(r"layer\.(.+)", [r"fc.\1"]), Rule(r"(one|other)\.bias", [r"\1.bias"])]
SHARED = torch.zeros(3)
EXPECTED = {"layer.weight": torch.zeros(2, 3), "one.bias": SHARED, "other.bias": SHARED}
PUBLISHED = {"fc.weight": torch.ones(2, 3), "one.bias": torch.ones(3), "other.bias": torch.ones(3)}
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": ({"fc.weight": torch.ones(2, 3), "one.bias": torch.ones(3)}, "lacks 1 keys: other.bias"),
    "unknown": (PUBLISHED | {"stranger.weight": torch.ones(1)}, "1 keys that no thing has: stranger.weight"),
    "shape": (PUBLISHED | {"fc.weight": torch.ones(3, 2)}, "fc.weight is [3, 2] and makes no [2, 3]"),
    "kind": (PUBLISHED | {"fc.weight": torch.ones(2, 3).long()}, "fc.weight"),
    "not finite": (PUBLISHED | {"fc.weight": torch.full((2, 3), torch.nan)}, "not finite"),
    "two values": (PUBLISHED | {"other.bias": torch.zeros(3)}, "two values"),
    "another model": ({"img_encoder_q.model.cls_token": torch.ones(1, 1, 768)}, "none of its keys is one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_differs_from_the_published_keys_is_named(case: str, tmp_path: Path) -> None:
    content, told = WRONG[case]
    file = read_published(save({"model": content}, tmp_path), ["model"])
    with pytest.raises(PublishedFileError) as error:
        rename(file, "thing", EXPECTED, TOY, {})
    assert told in str(error.value)
    assert str(file.path) in str(error.value)


def test_every_key_is_used_or_accounted_for(tmp_path: Path) -> None:
    extra = {"pooler.a": torch.ones(1), "pooler.b": torch.ones(1), "stranger": torch.ones(1)}
    file = read_published(save(PUBLISHED | extra, tmp_path), ["model"])
    found = rename(file, "thing", EXPECTED, TOY, {r"pooler\..+": "never read"}, allow_unknown=True)
    assert found.unused == {"pooler.a": "never read", "pooler.b": "never read"}
    assert found.unknown == ["stranger"]
    assert found.state.keys() == EXPECTED.keys()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"a": 1}}, "no named tensors"),
        ([torch.ones(1)], "no named tensors"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "claims more"),
    ],
)
def test_files_without_weights_or_with_too_many_values(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(PublishedFileError, match=told):
        read_published(save(content, tmp_path), ["model"])


def test_a_file_that_lacks_a_key_makes_no_run(
    weights: dict[str, Tensor], sources: list[str], tmp_path: Path
) -> None:
    del (some := dict(weights))["classifier_anatomy.bias"]
    words = ("import", "medslip", save({"model": some}, tmp_path), "--out", tmp_path / "run", *sources)
    assert "classifier_anatomy.bias" in refused(invoke(*words))
    assert not (tmp_path / "run").exists()


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def program_of(file: Path) -> str:
    return (
        f"import torch; x = torch.load({str(file)!r}, map_location='cpu', weights_only=False); "
        "torch.save(dict(x.get('model', x)), 'weights.pth')"
    )


@pytest.mark.parametrize("form", ["zip", "old torch format", "bare pickle"])
def test_code_in_a_file_is_never_run(form: str, sources: list[str], tmp_path: Path) -> None:
    file = tmp_path / 'it\'s "$(touch ran)".pth'  # the message has a line for a shell
    content = {"model": {"a": torch.ones(1)}, "x": Evil(tmp_path / "ran")}
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    message = refused(invoke("import", "medslip", file, "--out", tmp_path / "run", *sources))
    assert "more than tensors and plain values" in message
    if form != "bare pickle":  # the way to convert it
        program, words = message[message.index("python -c") :], ("python", "-c")
        assert (*words, program_of(file)) == tuple(shlex.split(program))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(share: float, sources: list[str], tmp_path: Path) -> None:
    file = save({"model": {"a": torch.ones(10000)}}, tmp_path)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert str(file) in refused(invoke("import", "mgca", file, "--out", tmp_path / "run"))


def test_the_book_must_be_given_and_be_the_published_one(tmp_path: Path, sources: list[str]) -> None:
    file = save({"model": {"a": torch.ones(1)}}, tmp_path)
    words = ("import", "medslip", file, "--out", tmp_path / "run")
    assert "observation explanation.json" in refused(invoke(*words))
    other = tmp_path / "other.json"
    for content in ([], {"normal": "x"}, dict.fromkeys(sorted(OBSERVATIONS), "x")):
        other.write_text(json.dumps(content))
        assert str(other) in refused(invoke(*words, "--book", other))


def test_another_tokenizer_of_the_same_size_is_refused(
    sources: list[str], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from tests.published import rule

    known = dict(rule.KNOWN)
    rule.KNOWN["the"], rule.KNOWN["of"] = known["of"], known["the"]
    try:
        other = clinical_tokenizer(tmp_path / "other")
    finally:
        rule.KNOWN.update(known)
    file = save({"model": weights}, tmp_path)
    words = ("import", "medslip", file, "--out", tmp_path / "run", *sources, "--tokenizer", other)
    assert "'the' is 1104, not 1103" in refused(invoke(*words))


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    assert "is not an empty folder" in refused(invoke("import", "mgca", "x.ckpt", "--out", tmp_path / "run"))


def test_prefixes_are_taken_off_only_where_all_keys_have_them(tmp_path: Path) -> None:
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    file = read_published(save(mixed, tmp_path), medslip.WRAPPERS)
    assert set(file.tensors) == {"module.a", "b"}
    with pytest.raises(PublishedFileError, match=r"lacks 1 keys: c"):
        rename(
            file, "thing", {"x": torch.ones(1), "y": torch.ones(1)}, [Rule("x", ["b"]), Rule("y", ["c"])], {}
        )
