"""Faults for jobs of the tests, put where rank 0 logs a step; Python imports this at its start.

MEDVLP_TEST_SLOW: a file; while it exists, every step takes half a second longer. MEDVLP_TEST_ABORT: the step
at which the rank crashes. Neither changes what is computed.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if os.environ.get("RANK") == "0" and {"MEDVLP_TEST_SLOW", "MEDVLP_TEST_ABORT"} & os.environ.keys():
    from medvlp.runs.metrics_file import MetricsFile

    _write = MetricsFile.write

    def _faulty(self: MetricsFile, metrics: Mapping[str, Any]) -> None:
        if metrics.get("step") == int(os.environ.get("MEDVLP_TEST_ABORT", "-1")):
            os.abort()
        if "MEDVLP_TEST_SLOW" in os.environ and Path(os.environ["MEDVLP_TEST_SLOW"]).exists():
            time.sleep(0.5)
        _write(self, metrics)

    MetricsFile.write = _faulty  # type: ignore[method-assign]
