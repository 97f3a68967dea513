"""The tutorial notebook runs from its first cell to its last, as it stands.

Its cells run one after the other in one namespace: a kernel would start a process and prove no more.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")


def test_every_cell_runs(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("SHARDS", str(data))
    names: dict[str, object] = {}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not stored: they would hold samples"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "first" in capsys.readouterr().out
    assert names["overlay"].shape == (32, 32, 3)
