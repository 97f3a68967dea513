"""A run that resumes equals one that never stopped: weights bit for bit, and the metrics."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from medvlp import distributed
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.errors import CheckpointError
from tests.distributed_pool import Pools
from tests.training.runs import Overrides, Precision, read_metrics, train, train_expecting_error

pytestmark = pytest.mark.dist

MEASURED = ("samples_per_second", "step_seconds", "data_wait", "memory_gib")


def weights(run_dir: Path, step: int = 4) -> bytes:
    return (run_dir / "checkpoints" / f"step-{step:08d}" / "weights.safetensors").read_bytes()


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in MEASURED and not k.startswith("checkpoint/")}
        for line in read_metrics(run_dir)
    ]


def killed_after(run_dir: Path, copy: Path, step: int) -> None:
    """Copy a run as if it had been killed before its next checkpoint, while it wrote a line of metrics."""
    shutil.copytree(run_dir, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')


DROPOUT = ["text.dropout=0.2", "checkpoint.every_steps=2", "image.options={drop_path_rate: 0.2}"]


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        (0, "fp32", ["data.workers=0"]),
        (1, "fp32", ["data.workers=2"]),
        (2, "fp32", ["data.workers=1", "train.micro_batch=4"]),
        (3, "fp32", ["data.workers=0"]),
        (0, "bf16", ["data.workers=0"]),
        (1, "bf16", ["data.workers=0"]),
        (2, "bf16", ["data.workers=0"]),
        (3, "bf16", ["data.workers=0"]),
    ],
)
def test_resuming_is_bit_identical(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path, stage: int, precision: Precision, more: list[str]
) -> None:
    options = [*DROPOUT, f"zero.stage={stage}", f"precision={precision}", *more]
    pool = gloo_pool(2)
    assert pool.run(train, overrides(*options, run="whole")) == [0, 0]
    killed_after(tmp_path / "whole", tmp_path / "resumed", step=2)
    assert pool.run(train, overrides(*options, run="resumed")) == [0, 0]
    assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")
    assert weights(tmp_path / "resumed", 2) != weights(tmp_path / "resumed", 4)
    assert comparable(tmp_path / "resumed") == comparable(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "resumed")] == [1, 2, 3, 4]


def test_dropout_really_draws(gloo_pool: Pools, overrides: Overrides, tmp_path: Path) -> None:
    """Without restored random states the test above would have to fail: another seed gives other metrics."""
    pool = gloo_pool(2)
    pool.run(train, overrides(*DROPOUT, "train.steps=2", run="drop"))
    pool.run(train, overrides("train.steps=2", run="none"))
    assert comparable(tmp_path / "drop")[0]["loss"] != comparable(tmp_path / "none")[0]["loss"]


def test_clusters_of_the_service_resume_too(gloo_pool: Pools, overrides: Overrides, tmp_path: Path) -> None:
    options = [
        *DROPOUT, "method.prototype_source=clusters", "prototypes.refresh_steps=2", "prototypes.balance=bias",
        "train.steps=5", "checkpoint.every_steps=3",
    ]  # fmt: skip
    pool = gloo_pool(2)
    pool.run(train, overrides(*options, run="whole"))
    killed_after(tmp_path / "whole", tmp_path / "resumed", step=3)
    pool.run(train, overrides(*options, run="resumed"))
    assert weights(tmp_path / "resumed", 5) == weights(tmp_path / "whole", 5)
    resumed, whole = (
        [{k: v for k, v in line.items() if "seconds" not in k} for line in comparable(tmp_path / run)]
        for run in ("resumed", "whole")
    )
    assert resumed == whole
    assert "prototypes/version" in comparable(tmp_path / "whole")[1]


def test_kmeans_start_and_a_finished_run_started_again(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    options = ["prototypes.init=kmeans", "prototypes.init_samples=32", "train.steps=2"]
    pool = gloo_pool(2)
    pool.run(train, overrides(*options))
    random_start = overrides("train.steps=2", run="random")
    pool.run(train, random_start)
    assert weights(tmp_path / "run", 2) != weights(tmp_path / "random", 2)
    before = weights(tmp_path / "run", 2)
    assert pool.run(train, overrides(*options)) == [0, 0]
    assert weights(tmp_path / "run", 2) == before
    assert len(read_metrics(tmp_path / "run")) == 2


def test_damaged_checkpoints_are_passed_over_and_another_run_is_refused(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    pool = gloo_pool(2)
    options = ["checkpoint.every_steps=2", "checkpoint.keep_last=0"]
    pool.run(train, overrides(*options))
    expected = weights(tmp_path / "run")
    with (tmp_path / "run/checkpoints/step-00000004/weights.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    assert pool.run(train, overrides(*options)) == [0, 0]
    assert weights(tmp_path / "run") == expected
    for change, message in [
        ("train.global_batch=8", "train.global_batch was 16 and is 8"),
        ("precision=bf16", "precision was fp32"),
        ("optimizer.name=sgd", "optimizer.name was adamw"),
        ("text.frozen=true", "was trained there and is frozen here"),
    ]:
        kind, text, code = pool.run(train_expecting_error, overrides(*options, change))[0]
        assert (kind, code) == ("CheckpointError", 4)
        assert message in text
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        (folder / "manifest.json").write_text("{")
    kind, text, _ = pool.run(train_expecting_error, overrides(*options))[1]
    assert kind == "CheckpointError"
    assert "2 checkpoints and none is good" in text


def start_with_a_fault(overrides: list[str], place: str) -> tuple[str, str, Any]:
    """The error of a start where the last rank cannot do `place` of a checkpoint."""

    def refused(*given: Any) -> Any:
        raise CheckpointError(f"{place} is refused")

    with pytest.MonkeyPatch.context() as patch:
        if not distributed.is_main():
            patch.setattr(Checkpoint, place, refused)
        return train_expecting_error(overrides)


def test_what_one_rank_cannot_load_is_said_by_all(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path
) -> None:
    pool = gloo_pool(2)
    pool.run(train, overrides("train.steps=1"))
    again = overrides("train.steps=2")
    beginning = overrides(f"train.start={tmp_path / 'run'}", run="other")
    for place, words in (
        ("weights_into", again),
        ("state_for", again),
        ("optimizer", again),
        ("randomness", again),
        ("weights_into", beginning),
    ):
        told = pool.run(start_with_a_fault, words, place)
        assert [(text, code) for _, text, code in told] == [(f"{place} is refused", 4)] * 2
    assert pool.run(train, again) == [0, 0]


#: A loss of single samples, which plain accumulation does not change.
PATCHES = [
    "method.name=mpma", "method.decoder_width=16", "method.decoder_heads=2", "method.decoder_layers=1",
    "method.global_weight=0", "method.local_weight=0", "method.report_weight=0", "train.accumulate=plain",
]  # fmt: skip


@pytest.mark.parametrize(("stage", "more"), [(0, PATCHES), (2, PATCHES), (1, []), (3, [])])
def test_another_number_of_micro_batches_after_an_odd_step_changes_nothing(
    gloo_pool: Pools, overrides: Overrides, tmp_path: Path, stage: int, more: list[str]
) -> None:
    options = [*more, f"zero.stage={stage}", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    of_mgca = ("method.prototypes", "method.head_hidden") if more else ()

    def words(micro: int, run: str) -> list[str]:
        given = overrides(*options, f"train.micro_batch={micro}", run=run)
        return [word for word in given if not word.startswith(of_mgca)]

    pool = gloo_pool(2)
    assert pool.run(train, words(4, "whole")) == [0, 0]
    killed_after(tmp_path / "whole", tmp_path / "resumed", step=1)
    assert pool.run(train, words(2, "resumed")) == [0, 0]
    lines = [read_metrics(tmp_path / run) for run in ("whole", "resumed")]
    whole, resumed = ([line["loss"] for line in of] for of in lines)
    assert len(whole) == 4
    assert resumed == pytest.approx(whole, rel=1e-5)
    before, expected, found = (
        load_file(tmp_path / run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")
        for run, step in (("whole", 3), ("whole", 4), ("resumed", 4))
    )
    moved = sum(float((expected[name] - before[name]).double().square().sum()) for name in expected)
    apart = sum(float((expected[name] - found[name]).double().square().sum()) for name in expected)
    assert apart < 1e-4 * moved
