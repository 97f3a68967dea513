"""Validation while training: it changes nothing, is the same on any number of ranks, and decides the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from medvlp.config import ConfigError
from medvlp.data.cache import open_reader
from medvlp.data.loader import evaluation_dataset
from medvlp.data.text import Tokenizer
from medvlp.methods.base import StepOutput
from medvlp.methods.registry import build_method
from medvlp.runs.errors import AgreedError
from medvlp.runs.manifest import Manifest, step_folders
from medvlp.runs.randomness import seed_weights
from medvlp.training.predictions import _Collected, predict
from medvlp.training.pretrain import Pretraining
from shards.errors import DataError, NotFiniteError
from tests.data.test_corruption import destroy_image
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, load_config, read_metrics, train

EVERY_TWO = ["validation.every_steps=2", "validation.batch=4"]


def weights(run: Path) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return load_file(folder / "weights.safetensors")


def validations(run: Path) -> list[dict[str, Any]]:
    """Lines with a validation, without what depends on time."""
    lines = [line for line in read_metrics(run) if "valid/loss" in line]
    return [
        {"step": line["step"]}
        | {
            name: value
            for name, value in line.items()
            if name.startswith("valid/") and name != "valid/seconds"
        }
        for line in lines
    ]


def steps(run: Path) -> list[int]:
    return [step for step, _ in step_folders(run / "checkpoints")]


def test_a_run_with_validations_has_the_weights_of_one_without(overrides: Overrides, tmp_path: Path) -> None:
    assert train(overrides("text.dropout=0.1", run="without")) == 0
    assert train(overrides("text.dropout=0.1", *EVERY_TWO, "monitor.log_every=3", run="with")) == 0
    first, second = weights(tmp_path / "without"), weights(tmp_path / "with")
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    found = validations(tmp_path / "with")
    assert [line["step"] for line in found] == [2, 4]
    assert "valid/loss/instance" in found[0]
    assert read_metrics(tmp_path / "with")[-1]["valid/seconds"] > 0


def test_patience_with_a_metric_that_no_validation_measures_is_refused(overrides: Overrides) -> None:
    words = [
        "train.steps=8",
        "validation.every_steps=1",
        "checkpoint.keep_best=valid/los",
        "train.patience=2",
    ]
    with pytest.raises(AgreedError, match=r"keep_best=valid/los .* name one of valid/loss, ") as raised:
        train(overrides(*words))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("best", ["valid/loss", "valid/image_to_text/R@5"])
def test_a_validation_of_which_nothing_can_be_measured_ends_no_training(
    overrides: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    best: str,
) -> None:
    def refuse(self: Pretraining, *given: Any) -> dict[str, float]:
        raise NotFiniteError("embeddings")

    monkeypatch.setattr(Pretraining, "measure", refuse)
    words = [*EVERY_TWO, f"checkpoint.keep_best={best}", "train.patience=2", "train.steps=6"]
    assert train(overrides(*words)) == 0
    said = capsys.readouterr().err
    assert "the validation after step 2 has losses alone: embeddings are NaN or infinite" in said
    found = validations(tmp_path / "run")
    assert [line["step"] for line in found] == ([2, 4, 6] if best == "valid/loss" else [2, 4])
    assert not any("R@5" in name for line in found for name in line)


def test_clusters_are_balanced_by_what_is_trained_alone(overrides: Overrides, tmp_path: Path) -> None:
    """`prototypes.balance: bias` follows the usage of clusters; that of validations is none of it."""
    words = ["method.prototype_source=clusters", "prototypes.refresh_steps=1", "prototypes.balance=bias"]
    assert train(overrides(*words, run="without")) == 0
    assert train(overrides(*words, *EVERY_TWO, run="with")) == 0
    first, second = weights(tmp_path / "without"), weights(tmp_path / "with")
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert "valid/loss/prototype" in validations(tmp_path / "with")[0], "or no cluster was asked for"


def test_training_ends_without_a_better_validation_and_stays_ended(
    overrides: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = iter([0.5, 0.7, 0.7, 0.6, 0.9])
    monkeypatch.setattr(Pretraining, "measure", lambda *given: {"score": next(scores)})
    words = ["train.steps=8", "validation.every_steps=1", "checkpoint.keep_best=valid/score",
             "checkpoint.best_mode=max", "train.patience=2", "checkpoint.keep_last=1"]  # fmt: skip
    assert train(overrides(*words)) == 0
    run = tmp_path / "run"
    assert [line["valid/score"] for line in validations(run)] == [0.5, 0.7, 0.7, 0.6]
    assert steps(run) == [2, 4], "the best one and the last"
    assert Manifest.read(run / "checkpoints" / "step-00000002").metrics["valid/score"] == 0.7
    reason = (
        "training ends after step 4: the last 2 validations brought no better valid/score (train.patience)"
    )
    assert capsys.readouterr().err.count(reason) == 1
    assert train(overrides(*words)) == 0, "started again it is still ended"
    assert capsys.readouterr().err.count(reason) == 1
    assert steps(run) == [2, 4]
    last = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert last[-1] == "finish"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("checkpoint.keep_best=valid/b", [2, 4]),  # which has been measured on the same samples all along
        ("validation.batch=8", [4]),
        ("validation.split=test", [4]),
    ],
)
def test_the_best_value_of_another_metric_or_split_is_not_waited_for(
    overrides: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, kept: list[int]
) -> None:
    values = iter([5.0, 5.0, 0.1, 0.2])
    monkeypatch.setattr(Pretraining, "measure", lambda *given: dict.fromkeys("ab", next(values)))
    words = ["validation.every_steps=1", "checkpoint.keep_best=valid/a", "checkpoint.best_mode=max",
             "checkpoint.keep_last=1"]  # fmt: skip
    assert train(overrides(*words, "train.steps=2")) == 0
    assert train(overrides(*words, "train.steps=4", "train.patience=1", change)) == 0
    assert [line["step"] for line in validations(tmp_path / "run")] == [1, 2, 3, 4]
    assert steps(tmp_path / "run") == kept


def test_a_checkpoint_between_two_validations_does_not_bear_the_metrics_of_one(
    overrides: Overrides, tmp_path: Path
) -> None:
    words = [
        "validation.every_steps=2",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=0",
        "monitor.log_every=9",
    ]
    assert train(overrides(*words)) == 0
    folders = dict(step_folders(tmp_path / "run" / "checkpoints"))
    known = {step: "valid/loss" in Manifest.read(folder).metrics for step, folder in folders.items()}
    assert known == {1: False, 2: True, 3: False, 4: True}


def predicted(
    words: list[str], samples: int = 20, batch: int = 3
) -> tuple[dict[str, float], list[int], list[float]]:
    """Losses, samples and sums of the embeddings of the first samples, by a method of seed 0."""
    config = load_config(words)
    reader = open_reader(config.data)
    tokenizer = Tokenizer.load(None, config.data.root)
    seed_weights(0)
    method = build_method(config, tokenizer.vocab_size)
    dataset = evaluation_dataset(config, reader, tokenizer, "train")
    found = predict(
        method,
        lambda batch: (method(batch), {"image": method.encode_image(batch.image)}),
        dataset,
        np.arange(samples),
        batch,
        torch.device("cpu"),
    )
    return found.losses, found.sample.tolist(), found.arrays["image"].sum(axis=1).tolist()


@pytest.mark.dist
@pytest.mark.parametrize("method", [["method.name=mgca"], ["method.name=mpma", "method.fusion_heads=2"]])
def test_predictions_are_the_same_on_one_two_and_three_ranks(
    gloo_pool: Pools, overrides: Overrides, method: list[str]
) -> None:
    """MPMA's masks and MGCA's contrasts over all ranks would differ, were a chunk not a rank's alone.

    Not to the bit: processes that have trained before (at ZeRO-3, perhaps) multiplied in another order.
    """
    words = [word for word in overrides() if not word.startswith("method.")]
    words += [*method, "method.embedding=16"]
    every = [rank for ranks in (1, 2, 3) for rank in gloo_pool(ranks).run(predicted, words)]
    losses, samples, embeddings = every[0]
    assert samples == list(range(20))
    for rank in every[1:]:
        assert rank[0] == pytest.approx(losses, rel=1e-5)
        assert rank[1] == samples
        assert rank[2] == pytest.approx(embeddings, abs=1e-5)


@pytest.mark.dist
def test_a_last_chunk_of_one_sample_lacks_what_only_several_have(
    gloo_pool: Pools, overrides: Overrides
) -> None:
    """PLACE has no other report to read there: not at all on the last of three ranks."""
    words = [word for word in overrides() if not word.startswith("method.")]
    words += ["method.name=place", "method.embedding=16", "method.decoder_width=32", "method.decoder_heads=2"]
    found = [rank[0] for ranks in (1, 2, 3) for rank in gloo_pool(ranks).run(predicted, words, 5, 2)]
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-5)
    (four, *_) = gloo_pool(1).run(predicted, words, 4, 2)[0]
    assert found[0].keys() == four.keys()
    assert found[0]["correlation/shuffled"] == pytest.approx(four["correlation/shuffled"], rel=1e-5)
    assert found[0]["loss/correlation"] != pytest.approx(four["loss/correlation"], rel=1e-5)


def predicted_or_refused(words: list[str]) -> tuple[dict[str, float], list[int]] | str:
    """Losses and samples of sixty samples in chunks of four, or why there are none."""
    try:
        return predicted(words, 60, 4)[:2]
    except DataError as error:
        return str(error)


@pytest.mark.dist
def test_corrupt_samples_are_counted_over_all_ranks(
    gloo_pool: Pools, overrides: Overrides, phantom_data: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(phantom_data, tmp_path / "data", ignore=shutil.ignore_patterns("tokens"))

    def found(allowed: float) -> list[Any]:
        words = overrides(f"data.root={root}", f"data.max_bad_fraction={allowed}")
        return [rank for ranks in (1, 3) for rank in gloo_pool(ranks).run(predicted_or_refused, words)]

    destroy_image(Path(root), 0)  # more than 3 % of what one of three ranks reads
    losses, samples = found(0.03)[0]
    assert samples == list(range(1, 60))
    for other in found(0.03)[1:]:
        assert other[0] == pytest.approx(losses, rel=1e-5)
        assert other[1] == samples
    for position in (1, 2, 3):  # the first rank's first chunk has no sample any more
        destroy_image(Path(root), position)
    assert [rank[1] for rank in found(0.1)] == [list(range(4, 60))] * 4
    destroy_image(Path(root), 4)
    alone, *three = found(0.07)  # no rank has met too many, all together have
    assert "are corrupt, more than data.max_bad_fraction=0.07 allows" in alone
    assert three == [three[0]] * 3
    assert three[0].startswith("5 of 60 samples of split 'train' are corrupt")


@pytest.mark.dist
def test_runs_validate_at_every_stage_on_any_number_of_ranks(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    """Only rounding is left of how the steps were divided."""
    words = ["train.steps=2", "train.global_batch=6", *EVERY_TWO]
    found = []
    for ranks, stage in ((1, 0), (2, 3), (3, 2)):
        name = f"ranks{ranks}"
        codes = gloo_pool(ranks).run(train, overrides(*words, f"zero.stage={stage}", run=name))
        assert codes == [0] * ranks
        (line,) = validations(tmp_path / name)
        found.append(line)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)


def test_a_choice_by_a_validation_that_is_never_made_is_refused(overrides: Overrides) -> None:
    for words, message in (
        (["checkpoint.keep_best=valid/loss"], "set validation.every_epochs"),
        (["train.patience=3", "validation.every_steps=1"], "name a metric of the validation"),
        (["validation.every_steps=1", "validation.split=train"], "is trained on"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(overrides(*words))


def test_a_mean_weighs_chunks_by_their_samples() -> None:
    """And counts, of a term that the chunk of one sample lacks, the others alone."""
    collected = _Collected()
    for number, (rows, loss) in enumerate([(3, 1.0), (2, 2.0), (1, 5.0)]):
        batch: Any = SimpleNamespace(keys=[""] * rows, sample=torch.arange(rows) + 3 * number)
        terms = {"loss/pairs": torch.tensor(loss)} if rows > 1 else {}
        collected.add(number, batch, StepOutput(torch.tensor(loss), terms), {})
    assert collected.gathered().losses == {"loss": pytest.approx(2), "loss/pairs": pytest.approx(7 / 5)}
