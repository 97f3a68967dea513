"""A method of another package, declared by an entry point: configured, checked and trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.runs import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]

TOY = '''
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from medvlp.config import Config, ConfigError, MethodConfig, key
from medvlp.methods.base import Method, StepOutput
from medvlp.methods.registry import register


@dataclass
class ToyConfig(MethodConfig):
    name: str = key("toy", "registered method; its own keys stand beside this one")
    width: int = key(4, "width of the toy's embeddings", 1)

    def check(self, config: Config) -> None:
        if self.width == 13:
            raise ConfigError("method.width=13 brings bad luck")
        super().check(config)


class Toy(Method):
    """Means of images against bags of words."""

    def __init__(self, width, vocabulary):
        super().__init__()
        self.image, self.words = nn.Linear(1, width), nn.Embedding(vocabulary, width)

    def image_features(self, image):
        return image.to(self.image.weight.dtype).flatten(1).mean(1, keepdim=True) / 255

    def encode_image(self, image):
        return F.normalize(self.image(self.image_features(image)).float(), dim=1)

    def encode_text(self, text):
        return F.normalize(self.words(text.input_ids).mean(1).float(), dim=1)

    def forward(self, batch, clusters=None):
        loss = (self.encode_image(batch.image) - self.encode_text(batch.text)).square().sum(1).mean()
        return StepOutput(loss, {"loss/distance": loss.detach()})


@register("toy", ToyConfig)
def build(config, vocab_size):
    return Toy(config.method.width, vocab_size)
'''


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with an installed package that has a method."""
    site = tmp_path / "site"
    info = site / "toy_method-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[medvlp.methods]\ntoy = toy_method\n")
    (site / "toy_method.py").write_text(TOY)
    return site


def medvlp(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(site, "-m", "launcher.main", *arguments)


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = {"PYTHONPATH": f"{site}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=kept | paths, cwd=site.parent
    )


#: Several commands in one process: each would start with seconds of imports.
COMMANDS = """
import json, sys
from typer.testing import CliRunner
from launcher.main import app
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, words)
    code = getattr(result.exception, "exit_code", result.exit_code)
    print(json.dumps([code, str(result.exception), result.output]))
"""


def test_the_reference_has_its_keys_and_its_check_is_asked(outside: Path) -> None:
    given = ["config", "method.name=toy", "data.root=/data", "run.dir=/run"]
    commands = [
        ["config", "--reference"],
        [*given, "method.width=13"],
        [*given, "prototypes.false_negatives=mask"],
    ]
    done = python(outside, "-c", COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    reference, refused, masks = (json.loads(line) for line in done.stdout.splitlines())
    assert reference[0] == 0
    assert "# method.name=toy" in reference[2]
    assert "width: 4  # width of the toy's embeddings" in reference[2]
    assert refused[:2] == [2, "method.width=13 brings bad luck"]
    assert masks[0] == 2
    assert "method.name=toy has none" in masks[1]


def test_a_package_that_cannot_be_imported_is_named(outside: Path) -> None:
    (outside / "toy_method.py").write_text("raise RuntimeError('out of toys')\n")
    failed = medvlp(outside, "config", "--reference")
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1
    for named in ("'toy'", "toy_method", "out of toys"):
        assert named in failed.stderr


@pytest.mark.dist
def test_it_is_trained(outside: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    built = medvlp(
        outside, "shards", "build", "phantom", "--out", str(data), "--studies", "40", "--image-size", "32",
        "--split", "train=1", "--workers", "1",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    trained = medvlp(
        outside, "pretrain", "method.name=toy", "method.width=6", f"data.root={data}", f"run.dir={run}",
        "data.image_size=32", "data.max_tokens=24", "data.workers=0", "train.global_batch=8", "train.steps=6",
        "train.threads=1", "optimizer.lr=1e-2", "precision=fp32", "monitor.wandb=disabled",
        "monitor.progress=false",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    lines = read_metrics(run)
    assert len(lines) == 6
    assert lines[-1]["loss/distance"] < lines[0]["loss/distance"]
    weights = load_file(run / "checkpoints" / "step-00000006" / "weights.safetensors")
    assert weights["words.weight"].shape[1] == 6
