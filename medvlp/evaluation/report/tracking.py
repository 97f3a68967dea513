"""An evaluation in the W&B run of its training: main numbers in the summary, all as tables, and curves."""

from __future__ import annotations

import logging
import math

from medvlp import trust
from medvlp.config import Config
from medvlp.evaluation.report import scores
from medvlp.evaluation.report.comparison import reading_of
from medvlp.evaluation.report.curves import lines_of
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError
from medvlp.runs.saved_run import SavedRun
from medvlp.training.wandb_run import WandbRun, known_id

logger = logging.getLogger(__name__)


def track(evaluation: Evaluation, source: SavedRun, config: Config) -> None:
    """Add an evaluation to the W&B run that its training logged to; nothing where there is none.

    The summary gets "evaluation/<split>/<task>/<metric>" of the trained model; each task gets a table with
    every metric of every model, and its curves where its scores are kept. W&B's troubles are warnings, as in
    training. A run folder from elsewhere does not decide whose W&B account numbers go to.
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
        _plot(evaluation, task, run, source)
    run.finish()


def _plot(evaluation: Evaluation, task: str, run: WandbRun, source: SavedRun) -> None:
    """Curves over all findings of every unit whose scores are kept; their points and no sample."""
    for unit in evaluation.scores.get(task, {}):
        try:
            kept = scores.read(source.run, evaluation, task, unit)
        except EvaluationError as error:
            logger.warning("no curves in W&B: %s", error)
            continue
        for lines in lines_of(kept):
            name = f"evaluation/{evaluation.data['split']}/{task}/{unit}/{lines.heading}"
            points = {model: (line.x.tolist(), line.y.tolist()) for model, line in lines.whole.items()}
            run.plot(name, points, lines.axes)
