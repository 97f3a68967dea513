"""Fixtures every test may use: golden values, shared folder, pool of gloo processes, data of tiny runs."""

from __future__ import annotations

import functools
import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.testing
from hypothesis import HealthCheck, settings

from tests.drawn_once import phantoms

if TYPE_CHECKING:
    from tests.distributed_pool import Pools

REPOSITORY = Path(__file__).resolve().parent.parent

# Imports and collected tests are objects that stay: to look through them took a quarter of the collection.
gc.disable()
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What users have said (medvlp.trust) is remembered in their home directory; tests have one of their own.
_state = tempfile.TemporaryDirectory(prefix="medvlp-state-")
os.environ["XDG_STATE_HOME"] = _state.name

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("medvlp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("medvlp")

# Else every `CliRunner.invoke` makes all commands anew, for 35 ms.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: they take longest, and the last of them runs alone."""
    starting = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in starting)


def pytest_collection_finish() -> None:
    """From here on there is something to collect."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """A run in this process logs to the standard error of its test, which is closed with it."""
    loggers = [logging.getLogger(name) for name in ("medvlp", "shards")]
    before = [(log, log.level, log.handlers, log.propagate) for log in loggers]
    yield
    for log, level, handlers, propagate in before:
        log.setLevel(level)
        log.handlers, log.propagate = handlers, propagate


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of golden values; `MEDVLP_GOLDEN` drops in other seeds."""
    return Path(os.environ.get("MEDVLP_GOLDEN", REPOSITORY / "tests" / "golden"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The maintainers' folder of real data (`MEDVLP_SHARED`, default `../shared`); skips where it is not."""
    folder = Path(os.environ.get("MEDVLP_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs real data: no folder {folder}/data (set MEDVLP_SHARED)")
    return folder


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[Pools]:
    """`gloo_pool(world_size).run(function, *args)` -> one result per rank; processes are reused."""
    from tests.distributed_pool import GlooPool

    pools: dict[int, GlooPool] = {}

    def pool(world_size: int) -> GlooPool:
        if world_size not in pools:
            pools[world_size] = GlooPool(world_size)
        return pools[world_size]

    yield pool
    for running in pools.values():
        running.close()


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64-pixel phantoms of 80 studies, as shards."""
    return phantoms(tmp_path_factory.mktemp("phantoms") / "data", studies=80, image_size=64)


@pytest.fixture
def overrides(phantom_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`overrides("zero.stage=1", run="name")` -> the `key=value` list of a tiny run below tmp_path."""

    from tests.training.runs import TINY

    def build(*more: str, run: str = "run") -> list[str]:
        return [*TINY, f"data.root={phantom_data}", f"run.dir={tmp_path / run}", *more]

    return build
