"""Every key of the schema against values no run can use, and files that strangers wrote."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launcher.main import app
from launcher.slurm.cluster_config import ClusterConfig, load_cluster
from medvlp import config_files
from medvlp.config import Config, PhaseConfig, TransformConfig
from medvlp.config_files import ConfigError
from medvlp.evaluation import task
from medvlp.methods.registry import schemas
from shards.strict_json import MAX_DEPTH

SCHEMAS, TASKS = schemas(), task.schemas()
NEEDED = ["data.root=x", "run.dir=y"]


SECTIONS: list[Any] = [
    *(type(value) for value in vars(Config()).values() if dataclasses.is_dataclass(value)),
    TransformConfig, PhaseConfig, *SCHEMAS.values(), *TASKS.values(),
    *(type(value) for value in vars(ClusterConfig()).values() if dataclasses.is_dataclass(value)),
]  # fmt: skip
#: For every key, and more of them for keys that are numbers.
HOSTILE = ["[]", "[[]]", "{a: 1}", ".inf", '"\\0"', "!!set {a}"]
HOSTILE_NUMBERS = [*HOSTILE, "nan", "-1.0e+30", "1.0e+30", "9" * 30, "[nan]", "text"]


def keys_of(section: Any) -> list[tuple[dataclasses.Field[Any], str]]:
    """Fields that are no sections, with their annotations."""
    hints = get_type_hints(section)
    return [(item, str(hints[item.name])) for item in dataclasses.fields(section)
            if not dataclasses.is_dataclass(hints[item.name])]  # fmt: skip


def is_number(annotation: str) -> bool:
    return "int" in annotation or "float" in annotation


def attempt(*overrides: str) -> Config | str:
    """The config, or the one line that refuses it."""
    try:
        return config_files.load([], [*NEEDED, *overrides], SCHEMAS, tasks=TASKS)
    except ConfigError as error:
        return one_line(error)


def one_line(error: ConfigError) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_has_a_range(section: Any) -> None:
    for item, annotation in keys_of(section):
        if is_number(annotation):
            assert item.metadata["low"] is not None, item.name
            assert item.metadata["high"] is not None, item.name
            assert not annotation.startswith("list") or item.metadata["items"] is not None, item.name


@pytest.mark.parametrize("section", SECTIONS)
def test_a_hostile_value_of_any_key_is_one_line_or_a_value_in_range(section: Any, tmp_path: Path) -> None:
    file = tmp_path / "section.yaml"
    needed = "".join(f"{item.name}: 1\n" for item, _ in keys_of(section) if item.default == "???")
    for item, annotation in keys_of(section):
        for value in HOSTILE_NUMBERS if is_number(annotation) else HOSTILE:
            others = re.sub(rf"^{item.name}: .*\n", "", needed, flags=re.MULTILINE)
            file.write_text(f"{others}{item.name}: {value}\n")
            try:
                accepted = getattr(config_files.load_schema(file, section), item.name)
            except ConfigError as error:
                one_line(error)
                continue
            for number in accepted if isinstance(accepted, list) else [accepted]:
                if is_number(annotation) and number is not None:
                    assert item.metadata["low"] <= number <= item.metadata["high"], item.name


@settings(max_examples=40)
@given(st.sampled_from(["run.name", "optimizer.lr", "data.sections", "deepspeed", "method"]), st.text())
def test_any_text_as_a_value_is_one_line_or_accepted(key: str, value: str) -> None:
    attempt(f"{key}={value}")


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_as_an_override_is_one_line_or_accepted(text: str) -> None:
    attempt(text)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("method.name=[]", "method.name"),
        ("method.name={}", "method.name"),
        ("run.name=${run.name}", "run.name"),
        ("run.name=${", "run.name"),
        ("run.name=!!set {a}", "tag"),
        ("optimizer.lr=.inf", "optimizer.lr=inf"),
        ("optimizer.betas=[]", "optimizer.betas has 0 values; it takes 2"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas[1]=1.5"),
        ("optimizer.eps=0", "optimizer.eps=0"),
        ("train.seed=-1", "train.seed=-1"),
        ("train.steps=1e20", "train.steps"),
        ("train.steps=100000000000000000000", "train.steps=100000000000000000000"),
        ("method.instance_weight=nan", "method.instance_weight=nan"),
        ("data.sections=[]", "data.sections has 0 values"),
        (
            "evaluation.tasks.linear-probe.fractions=[]",
            "linear-probe.fractions has 0 values",
        ),
        ("evaluation.tasks.linear-probe.fractions=[0]", "evaluation.tasks.linear-probe.fractions[0]=0"),
        ("deepspeed={a: {b: [.inf]}}", "deepspeed.a.b[0]=inf"),
        ("data.root=''", "data.root is empty"),
        ('data.root="a\\nb"', "data.root has more than one line"),
        ('run.dir="a\\0b"', "run.dir"),
    ],
)
def test_values_no_run_can_use_are_refused_by_name(override: str, part: str) -> None:
    found = attempt(override)
    assert isinstance(found, str)
    assert part in found


@pytest.mark.parametrize(
    ("said", "part", "key"),
    [
        ("{zero_optimization: {stage: 3}}", "zero_optimization.stage", "zero.stage"),
        ("{zero_optimization: true}", "zero_optimization", "zero.stage"),
        ("{bf16: {enabled: true}}", "bf16.enabled", "precision"),
        ("{bfloat16: {enabled: true}}", "bfloat16.enabled", "precision"),
        ("{fp16: {enabled: false}}", "fp16.enabled", "precision"),
        ("{optimizer: {type: Lion}}", "optimizer", "optimizer"),
        ("{scheduler: {type: OneCycle}}", "scheduler", "optimizer.schedule"),
        ("{train_batch_size: 8}", "train_batch_size", "train.global_batch"),
        ("{gradient_accumulation_steps: 2}", "gradient_accumulation_steps", "train.micro_batch"),
        (
            "{zero_optimization: {offload_param: {device: cpu}}}",
            "zero_optimization.offload_param.device",
            "zero.offload_parameters",
        ),
    ],
)
def test_what_a_key_says_is_not_said_to_deepspeed(said: str, part: str, key: str) -> None:
    found = attempt(f"deepspeed={said}")
    assert isinstance(found, str)
    assert found.startswith(f"deepspeed.{part} would stand above {key},")
    words = [*NEEDED, f"deepspeed={said}"]
    shown = CliRunner().invoke(app, ["config", *words])
    assert str(shown.exception) == found, "of medvlp config, which makes no use of it"
    config_files.load([], words, SCHEMAS, unused={"deepspeed"})


def test_what_no_key_says_is_said_to_deepspeed() -> None:
    for said in (
        "{zero_optimization: {reduce_bucket_size: 1000, offload_optimizer: {pin_memory: false}}}",
        "{gradient_clipping: 0.25, fp16: {initial_scale_power: 8}, bf16: {}}",
    ):
        assert isinstance(attempt(f"deepspeed={said}"), Config)


def bomb(levels: int = 30) -> str:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels))]
    return "\n".join(lines)


FILES = {
    "alias bomb": bomb(),
    "merge bomb": "a0: &a0 {k: 1}\n"
    + "\n".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)),
    "recursion": "data: &a {root: *a}",
    "depth": "data: " + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2),
    "great depth": "[" * 200_000,
    "python": "data: !!python/object/apply:os.system [true]",
    "set": "data: !!set {a, b}",
    "names": "data: {root: a, root: b}",
    "numbers": "train: {steps: " + "9" * 5000 + "}",
    "tag": "train: {steps: !!int x}",
    "reference": "run: {name: '${'}",
    "list name": "? [a, b]\n: 1",
    "number name": "1: 2",
    "null name": "null: 2",
    "size": "# " + "x" * (1 << 20),
    "unicode": "data: \ud800",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cluster", [False, True])
def test_a_hostile_file_is_one_line_at_once(tmp_path: Path, name: str, cluster: bool) -> None:
    file = tmp_path / "hostile.yaml"
    file.write_bytes(FILES[name].encode(errors="surrogatepass"))
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_cluster(file) if cluster else config_files.load([file], NEEDED, SCHEMAS)
    assert time.process_time() - started < 5
    assert "hostile.yaml" in str(caught.value) or name == "reference"
    assert "\n" not in str(caught.value)


def test_paths_that_no_file_has_are_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in ("a\0b.yaml", "x" * 5000, str(tmp_path), str(tmp_path / "pipe.yaml")):
        with pytest.raises(ConfigError, match="cannot be read"):
            config_files.load([path], NEEDED, SCHEMAS)


def test_names_in_braces_reach_a_cluster_file_as_written(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "environment: {A: '${HOME}/x', B: '$HOME', C: 'a\\${b}', D: '${'}\n"
        "setup: ['echo ${SLURM_JOB_ID}']\nfolders: {tmp: '/scratch/${SLURM_JOB_ID}'}\n"
    )
    site = load_cluster(file)
    assert site.environment == {"A": "${HOME}/x", "B": "$HOME", "C": "a\\${b}", "D": "${"}
    assert site.setup == ["echo ${SLURM_JOB_ID}"]
    assert site.folders.tmp == "/scratch/${SLURM_JOB_ID}"
