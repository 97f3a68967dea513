"""The repository's own rules: sizes of files and functions, the config reference, one README a folder."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medvlp.config_reference import reference
from medvlp.evaluation import task
from medvlp.methods.registry import REGISTRY, fields_of, schemas

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("shards", "medvlp", "launcher", "tests")
LONGEST_FILE = 400
LONGEST_FUNCTION = 80
TOP_LEVEL = {
    "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile",
    "launcher", "medvlp", "shards", "configs", "tests", "slurm",
}  # fmt: skip


def python_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((REPOSITORY / package).rglob("*.py"))


@pytest.mark.parametrize("file", list(python_files()), ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


def test_modules_that_say_so_import_no_torch() -> None:
    """Those whose docstring says "no torch", and all of `shards`."""
    light = []
    for file in python_files():
        name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if not name.startswith("tests") and (
            name.startswith("shards") or re.search(r"\b[Nn]o torch\b", said)
        ):
            light.append(name)
    assert "medvlp.prototypes.supervisor" in light
    program = (
        "import importlib, sys\n"
        f"for name in {light}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_reading_a_config_imports_no_networks() -> None:
    """Importing them takes twice as long as all else that a command which reads a config imports."""
    program = (
        "import sys\n"
        "from medvlp.evaluation import task\n"
        "from medvlp.methods.registry import schemas\n"
        "schemas(), task.schemas()\n"
        "networks = {'timm', 'transformers', 'torchvision', 'deepspeed', 'wandb'}\n"
        "sys.exit(' '.join(networks & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stderr.strip() == "", "imports " + done.stderr


def test_a_method_is_registered_with_the_keys_of_its_folder() -> None:
    before = schemas()
    for name in before:
        fields_of(name)
        assert REGISTRY[name].config is before[name]


def test_the_config_reference_is_current() -> None:
    stored = (REPOSITORY / "configs" / "reference.yaml").read_text(encoding="utf-8")
    assert stored == reference(schemas(), task.schemas()), (
        "run: medvlp config --reference > configs/reference.yaml"
    )


def test_the_top_level_is_as_agreed() -> None:
    tracked = {path.name for path in REPOSITORY.iterdir() if not path.name.startswith(".")}
    generated = {"runs", "build", "dist", "medvlp.egg-info", "wandb"}
    assert tracked - generated == TOP_LEVEL


def test_configs_hold_only_yaml() -> None:
    strangers = [
        path for path in (REPOSITORY / "configs").rglob("*") if path.is_file() and path.suffix != ".yaml"
    ]
    assert not strangers


@pytest.mark.parametrize(
    "folder",
    [
        "launcher", "medvlp", "shards", "tests", "slurm",
        "shards/archives", "shards/entities", "shards/sources",
        "medvlp/data", "medvlp/encoders", "medvlp/losses", "medvlp/methods",
        "medvlp/prototypes", "medvlp/runs", "medvlp/training", "medvlp/evaluation", "medvlp/export",
        "medvlp/serving", "medvlp/published", "medvlp/library", "medvlp/run_page", "launcher/slurm",
    ],
)  # fmt: skip
def test_every_folder_says_what_lives_there(folder: str) -> None:
    text = (REPOSITORY / folder / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) >= 30
