"""What the tests of the page share: data and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.export.conftest import data as data
from tests.run_page.made import make_run


@pytest.fixture(scope="module")
def make(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(name, auroc, *overrides)`: see `make_run`."""
    return lambda name, auroc, *overrides: make_run(
        data, tmp_path_factory.mktemp("runs") / name, auroc, *overrides
    )
