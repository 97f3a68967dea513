"""Which checkpoint is the best, where what was measured has changed."""

import dataclasses

import pytest

from medvlp.config import CheckpointConfig
from medvlp.runs import checkpoint_files
from tests.runs.test_checkpoint import manifest, state


def save(tmp_path, step, metrics, identity, config):
    """Save a checkpoint with these metrics of data and validations."""
    folder = checkpoint_files.partial_folder(tmp_path / "checkpoints", step)
    whole = dataclasses.replace(manifest(step, **metrics), identity=dict(identity))
    whole.files = checkpoint_files.write(folder, state(tmp_path / "checkpoints", step))
    checkpoint_files.commit(folder, whole, config)


def kept(tmp_path):
    """Steps of the checkpoints that are there."""
    return {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*")}


@pytest.mark.parametrize(
    ("told", "best"),
    [
        ([{"data": "a"}, {"data": "a"}, {"data": "b"}, {"data": "b"}], 3),
        ([{"data": "a", "validated": "x"}] * 2 + [{"data": "a", "validated": "y"}] * 2, 3),
        # Of earlier versions.
        ([{}, {"data": "a"}, {"data": "a", "validated": "x"}, {"data": "a", "validated": "x"}], 1),
    ],
)
def test_a_best_of_other_data_or_of_another_validation_is_none(tmp_path, told, best):
    config = CheckpointConfig(keep_last=1, keep_best="valid/auroc", best_mode="max")
    for step, (value, identity) in enumerate(zip([0.9, 0.2, 0.6, 0.5], told, strict=True), start=1):
        save(tmp_path, step, {"valid/auroc": value}, identity, config)
    assert kept(tmp_path) == {4, best}


def test_the_best_of_before_stays_until_something_is_measured_on_the_new_data(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best="valid/auroc", best_mode="max")
    save(tmp_path, 1, {"valid/auroc": 0.9}, {"data": "a"}, config)
    save(tmp_path, 2, {}, {"data": "b"}, config)
    assert kept(tmp_path) == {1, 2}
    save(tmp_path, 3, {"valid/auroc": 0.1}, {"data": "b"}, config)
    assert kept(tmp_path) == {3}


def test_what_is_validated_says_nothing_about_a_loss_of_the_training(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best="loss")
    for step, validated in enumerate("xxy", start=1):
        save(tmp_path, step, {"loss": float(step)}, {"data": "a", "validated": validated}, config)
    assert kept(tmp_path) == {1, 3}
