"""An evaluation in the W&B run of its training: main numbers in the summary, all as tables, and curves."""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray

from medvlp import trust
from medvlp.config import Config
from medvlp.evaluation.examples import Examples
from medvlp.evaluation.report import examples, scores
from medvlp.evaluation.report.comparison import reading_of
from medvlp.evaluation.report.curves import lines_of
from medvlp.evaluation.report.pictures import SAID, TRUE, box_picture, drawn_boxes, mask_picture, seen_image
from medvlp.evaluation.report.results import Evaluation
from medvlp.evaluation.task import EvaluationError
from medvlp.runs.saved_run import SavedRun
from medvlp.training.wandb_run import WandbRun, known_id
from shards.errors import DataError
from shards.images import decode_image
from shards.reader import ShardReader

logger = logging.getLogger(__name__)

#: Side of a picture in pixels.
_SIDE = 320


def track(evaluation: Evaluation, source: SavedRun, config: Config, reader: ShardReader) -> None:
    """Add an evaluation to the W&B run that its training logged to; nothing where there is none.

    The summary gets "evaluation/<split>/<task>/<metric>" of the trained model; each task gets a table with
    every metric of every model, and its curves where its scores are kept. W&B's troubles are warnings, as in
    training. A run folder from elsewhere does not decide whose W&B account numbers go to, nor that images do.

    Args:
        evaluation: with the results of all units. source: the run.
        config: its config, with the user's changes; `monitor.share_samples` is the user's word.
        reader: of the dataset that was evaluated, for the images of examples.
    """
    run_id = known_id(source.run, source.manifest.wandb_run_id)
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
        if config.monitor.share_samples:
            _show(evaluation, task, run, source, reader)
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


def _show(evaluation: Evaluation, task: str, run: WandbRun, source: SavedRun, reader: ShardReader) -> None:
    """Masks, boxes and reports of the examples of every unit, as pictures and as a table."""
    split = evaluation.data["split"]
    for unit in evaluation.examples.get(task, {}):
        name = f"evaluation/{split}/{task}/{unit}/examples"
        try:
            kept = examples.read(source.run, evaluation, task, unit)
            run.images(name, _pictures(kept, reader, split))
        except (EvaluationError, DataError) as error:
            logger.warning("no examples in W&B: %s", error)
            continue
        if kept.texts:
            rows = [(of.generated, of.reference) for of in kept.texts]
            run.texts(name, ("generated", "true"), rows)


def _pictures(kept: Examples, reader: ShardReader, split: str) -> list[tuple[NDArray[np.uint8], str]]:
    """Pictures with captions."""
    found = []
    for of in kept.masks:
        image = seen_image(decode_image(reader.image(split, of.sample)), kept.side, kept.crop, _SIDE)
        for runs, colour, said in ((of.truth, TRUE, "true"), (of.predicted, SAID, "predicted")):
            picture = mask_picture(image, examples.mask_of(runs, kept.side), colour)
            found.append((picture, f"{of.finding}, {said} mask"))
    for boxes in kept.boxes:
        image = seen_image(decode_image(reader.image(split, boxes.sample)), kept.side, kept.crop, _SIDE)
        true = ", ".join(box.finding for box in boxes.truth)
        found_ones = ", ".join(f"{box.finding} {box.score or 0:.2f}" for box in drawn_boxes(boxes))
        found.append((box_picture(image, boxes, kept.side), f"true: {true}; found: {found_ones or 'none'}"))
    return found
