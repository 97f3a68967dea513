"""Worker processes: results, errors and deaths; and that nothing of `shards` needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import MedvlpError
from shards.workers import run_tasks
from tests.shards.toy_data import add

IMPORT_ALL = """
import importlib, pkgutil, sys
import shards, launcher.commands.shards
for module in pkgutil.walk_packages(shards.__path__, "shards."):
    importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("shards.")]), "torch" in sys.modules)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_errors_come_back(workers: int) -> None:
    assert sorted(run_tasks(add, 10, [1, 2, 3], workers)) == [11, 12, 13]
    assert list(run_tasks(add, 10, [], workers)) == []
    with pytest.raises(KeyError):
        list(run_tasks(add, 10, [1, 13, 2], workers))


def test_dead_worker_is_one_clear_error() -> None:
    with pytest.raises(MedvlpError, match="a worker process died"):
        list(run_tasks(add, 10, [1, 99, 2], 2))


def test_no_module_needs_torch(repository: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=repository, capture_output=True, text=True, check=True
    )
    modules, torch = result.stdout.split()
    assert int(modules) > 25
    assert torch == "False"
