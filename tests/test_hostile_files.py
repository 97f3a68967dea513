"""Some hundreds of the drill's damaged files, in a process of bounded memory."""

from __future__ import annotations

import subprocess
import sys


def test_damaged_files_are_refused_in_one_line_or_read() -> None:
    command = [sys.executable, "-m", "tests.drills.hostile", "--count", "400", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("400 files in ")
