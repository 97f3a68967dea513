"""An evaluation in the W&B run of its training: main numbers in the summary, all of them as tables."""

from __future__ import annotations

import math

from medvlp import trust
from medvlp.config import Config
from medvlp.evaluation.report.comparison import reading_of
from medvlp.evaluation.report.results import Evaluation
from medvlp.runs.saved_run import SavedRun
from medvlp.training.wandb_run import WandbRun, known_id


def track(evaluation: Evaluation, source: SavedRun, config: Config) -> None:
    """Add an evaluation to the W&B run that its training logged to; nothing where there is none.

    The summary gets "evaluation/<split>/<task>/<metric>" of the trained model; each task gets a table with
    every metric of every model. W&B's troubles are warnings, as in training. A run folder from elsewhere does
    not decide whose W&B account numbers go to.
    """
    run_id = source.manifest.wandb_run_id or known_id(source.run)
    entity = config.monitor.entity
    if run_id is None or (entity is not None and not trust.is_said("monitor.entity", entity)):
        return
    run = WandbRun(config.monitor, source.run, source.name(config), {}, run_id, "evaluation")
    split = evaluation.data["split"]
    for task, models in evaluation.results.items():
        reading = reading_of(task)
        trained = {
            f"evaluation/{split}/{task}/{metric}": estimate.value
            for metric, estimate in models.get("trained", {}).items()
            if reading.summary(metric) and not math.isnan(estimate.value)
        }
        run.summarise(trained | {"evaluation/step": source.step})
        rows = [
            (
                metric,
                model,
                None if math.isnan(estimate.value) else estimate.value,
                estimate.low,
                estimate.high,
            )
            for model, metrics in models.items()
            for metric, estimate in metrics.items()
        ]
        run.table(f"evaluation/{split}/{task}", ("metric", "model", "value", "low", "high"), rows)
    run.finish()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
