"""One encoder as a run: features as the library gives them, what it cannot do, and what it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp import config_files
from medvlp.config_files import ConfigError
from medvlp.evaluation.supervised import Supervised, finetuning_config
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.published.reading import PublishedFileError
from medvlp.runs import saved_run
from medvlp.runs.errors import CheckpointError
from medvlp.runs.identity import IdentityError
from medvlp.runs.start import Start, begin_again
from medvlp.training.recipe import TrainingSet
from shards.errors import UsageError
from shards.reader import ShardReader
from tests.export.saved import TINY, save_run
from tests.training.runs import TINY as TRAINED
from tests.training.runs import train


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def exported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Method, Path]:
    """A small method, and its encoders in the forms of timm and transformers."""
    folder = tmp_path_factory.mktemp("exported")
    method = save_run(data, folder / "run", "image.mean=[0.4,0.5,0.6]")
    assert invoke("export", folder / "run", "--out", folder / "out").exit_code == 0
    return method, folder / "out"


@pytest.fixture(scope="module")
def runs(exported: tuple[Method, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both encoders as runs."""
    folder = tmp_path_factory.mktemp("backbones")
    for kind, part in (("timm", "image"), ("huggingface", "text")):
        result = invoke("import", kind, exported[1] / part, "--out", folder / part)
        assert result.exit_code == 0, result.exception
    return {part: folder / part for part in ("image", "text")}


def loaded(run: Path) -> Method:
    source = saved_run.locate(run)
    config = saved_run.load_config(source, [], reads_data=False)
    return saved_run.load_method(source, config, saved_run.load_tokenizer(source, config))


@torch.no_grad()
def test_features_are_those_of_the_encoder(exported: tuple[Method, Path], runs: dict[str, Path]) -> None:
    image = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(
        loaded(runs["image"]).image_features(image), exported[0].image_features(image), rtol=1e-5, atol=1e-6
    )
    source = saved_run.locate(runs["text"])
    assert source.stored is not None
    texts = source.stored[1].tokenize([["no pleural effusion"]], 12)
    hidden = loaded(runs["text"]).text_encoder(texts).hidden
    torch.testing.assert_close(hidden, exported[0].text_encoder(texts).hidden)


def test_what_a_backbone_cannot_do_is_said(runs: dict[str, Path], data: Path) -> None:
    result = invoke("evaluate", runs["image"], "--data", data, "--split", "valid")
    assert result.exit_code == 0, result.exception
    found = json.loads((runs["image"] / "evaluation.json").read_text())
    for task, reason in (
        ("zero-shot", "shares no space"),
        ("retrieval", "does not embed"),
        ("grounding", "map"),
    ):
        assert reason in found["notes"][task]["not_available"], task
    # Phantoms this few have no finding with both classes in every split, which a probe needs.
    assert "not_available" not in found["notes"].get("linear-probe", {})
    result = invoke("pretrain", runs["image"] / "config.yaml", f"data.root={data}", "run.dir=x")
    assert isinstance(result.exception, ConfigError)
    assert "has no loss" in str(result.exception)
    result = invoke("embed", runs["image"], "--data", data, "--out", data / "x.parquet", "--nproc", 1)
    assert isinstance(result.exception, UsageError)
    assert "--features" in str(result.exception)
    with pytest.raises(NotImplementedError, match="embeds no images"):
        loaded(runs["image"]).encode_image(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_an_image_model_of_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 224}))
    result = invoke("import", "huggingface", tmp_path, "--out", tmp_path / "run")
    assert isinstance(result.exception, PublishedFileError)
    assert "medvlp import timm" in str(result.exception)
    result = invoke("import", "timm", "resnet5O", "--out", tmp_path / "run")
    assert isinstance(result.exception, PublishedFileError)


def small(data: Path, *more: str) -> config_files.Config:
    return config_files.load([], [*TINY, f"data.root={data}", "run.dir=x", *more], schemas())


def test_encoders_start_a_method_and_others_are_named(
    exported: tuple[Method, Path], runs: dict[str, Path], data: Path
) -> None:
    config = small(data, f"train.start={runs['image']}")
    start = Start.of(config)
    assert start is not None
    method = build_method(config, 300)
    start.weights_into(method, config)
    for name, value in exported[0].image_encoder.backbone.state_dict().items():
        assert torch.equal(method.image_encoder.backbone.state_dict()[name], value), name
    other = small(data, f"train.start={runs['image']}", "image.name=test_resnet")
    with pytest.raises(CheckpointError, match="its image encoder is another one"):
        start.weights_into(build_method(other, 300), other)


@pytest.mark.parametrize("image", ["test_resnet", "test_vit3"])
def test_a_whole_backbone_starts_one_that_ends_where_losses_end_to_read_it(
    image: str, data: Path, tmp_path: Path
) -> None:
    """A later stage, or an attention pool, stays behind; anything else that is missing is another encoder."""
    words = [f"image.name={image}", *(["image.local_stage=1"] if image == "test_resnet" else [])]
    whole = save_run(data, tmp_path / "run", *words)
    shared = [word for word in TINY if not word.startswith("method.")]
    reads_patches = ["method.name=place", "method.instance_weight=0", "method.decoder_width=12"]
    other = [f"data.root={data}", "run.dir=x", f"train.start={tmp_path / 'run'}"]
    config = config_files.load([], [*shared, *other, *words, *reads_patches], schemas())
    words_known = whole.text_encoder.model.get_input_embeddings().num_embeddings
    start, method = Start.of(config), build_method(config, words_known)
    assert start is not None
    start.weights_into(method, config)
    given, taken = (of.image_encoder.backbone.state_dict() for of in (whole, method))
    assert taken.keys() < given.keys()
    for name, value in taken.items():
        assert torch.equal(given[name], value), name


def untrained_head(run: Path, data: Path, folder: Path) -> torch.nn.Module:
    """The network of a fine-tuning's baseline before its first step."""
    words = [f"run.dir={folder / 'head'}"]
    config = finetuning_config(run, "fine-tuning", 1.0, 0, untrained=True, files=[], overrides=words)
    recipe = Supervised(config)
    objective = recipe.build(TrainingSet(config, ShardReader(data), None, recipe.tokenizer()))
    recipe.start(objective, lambda: pytest.fail("nothing is read"))
    return objective.method


@pytest.mark.dist
def test_a_run_starts_from_another_and_remembers_it(data: Path, tmp_path: Path, gloo_pool) -> None:
    def overrides(name: str, *more: str) -> list[str]:
        return [*TRAINED, f"data.root={data}", f"run.dir={tmp_path / name}", "train.steps=1",
                "train.global_batch=8", "optimizer.warmup=0", *more]  # fmt: skip

    pool = gloo_pool(1)
    assert pool.run(train, overrides("first")) == [0]
    # A rate of nothing: what is saved is what training began with.
    still = ["optimizer.lr=0", "optimizer.min_lr=0", f"train.start={tmp_path / 'first'}"]
    assert pool.run(train, overrides("second", "train.seed=5", *still)) == [0]
    first, second = saved_run.locate(tmp_path / "first"), saved_run.locate(tmp_path / "second")
    weights = [dict(loaded(of.run).named_parameters()) for of in (first, second)]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    identity = second.stored[0]
    assert identity.start["run"] == first.weights
    config = saved_run.load_config(second, [])
    untrained = build_method(config, second.stored[1].vocab_size)
    begin_again(untrained, config, identity)
    for name, value in untrained.named_parameters():
        assert torch.equal(weights[0][name], value), name
    for name, value in untrained_head(second.run, data, tmp_path).named_parameters():
        assert torch.equal(weights[0][name], value), name
    identity.start["run"] = "0"
    with pytest.raises(IdentityError, match="first does not hold the weights that the run was started from"):
        begin_again(untrained, config, identity)
    config.train.start = None
    with pytest.raises(IdentityError, match=r"train\.start=null does not hold the weights"):
        begin_again(untrained, config, identity)
