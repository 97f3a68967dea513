"""Which rows of a table the user's files of ids leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.sources.table import TableSource
from tests.shards.toy_data import Rows, write_csv


def test_an_id_of_a_patient_that_is_also_a_visit_of_another_is_refused(
    tmp_path: Path, image_folder: Path, rows: Rows, map_file: Callable[[str], Path]
) -> None:
    """Numbers of visits are ids of studies: with patient 2 every second visit of all was left out."""
    for number, row in enumerate(rows):
        row["patient"], row["visit"] = f"{number // 3 + 1}", f"{number % 3 + 1}"
    leave = tmp_path / "leave.txt"
    leave.write_text("2\n")
    words = (write_csv(tmp_path / "t.csv", rows), image_folder, map_file("study_id: visit\n"), [leave])
    with pytest.raises(DataError, match="1 ids of --exclude are those of patients, and in rows of other"):
        TableSource(*words)
    leave.write_text("".join(f"{row['image']}\n" for row in rows if row["patient"] == "2"))
    assert len(TableSource(*words)) == len(rows) - 3
    for row in rows:
        row["patient"] = f"P{row['patient']}"
    leave.write_text("P2\n")
    assert len(TableSource(write_csv(words[0], rows), *words[1:])) == len(rows) - 3
