"""Counts steps skipped for a bad loss or gradient, names their samples, stops the run when it repeats."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medvlp import distributed
from medvlp.runs.errors import AgreedError
from medvlp.runs.events import EventLog
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.loss_scale import LossScale
from medvlp.training.step_guard import StepGuard, StepVerdict

logger = logging.getLogger(__name__)

#: Sample keys of each rank named in a message; `events.jsonl` has all.
_NAMED_KEYS = 8

_REASONS = {
    "loss_not_finite": "the loss is not finite",
    "loss_spike": "the loss is a spike (train.spike_sigma)",
    "gradient_not_finite": "the gradient is not finite",
    "gradient_overflow": "the gradient is not finite at the smallest loss scale of fp16",
}


class NotFiniteError(AgreedError):
    """Too many steps in a row had a bad loss or gradient; the message names step, ranks and samples."""

    exit_code = 5


class BadSteps(Callback):
    """What follows a skipped step: a line in `events.jsonl`, a count, and after too many in a row an error.

    Args:
        guard: what found them.
        limit: skipped steps in a row that are borne.
        run_dir: the run folder.
        log: takes the metric `train/bad_steps`, the skipped steps of the whole run.

    Attributes:
        alert: takes a title and a text for the people who watch the run; None on ranks that cannot tell them.
    """

    name = "bad_steps"

    def __init__(
        self,
        guard: StepGuard,
        limit: int,
        run_dir: Path | str,
        log: Callable[[dict[str, float]], None],
    ):
        self.guard, self.limit, self.log = guard, limit, log
        self.alert: Callable[[str, str], None] | None = None
        self.run_dir = Path(run_dir)
        self.events = EventLog(run_dir)
        self.count = 0
        self.in_a_row = 0
        self.overflows = 0

    def on_step(self, record: StepRecord) -> None:
        """Look into a step that was not applied; all ranks know of it alike.

        Raises:
            NotFiniteError: there were more than `limit` in a row.
        """
        if record.applied:
            self.in_a_row = 0
        else:
            self._examine(record)
        if record.logged or record.last:
            self.log({"train/bad_steps": float(self.count)})
            if record.engine.loss_scale is not None:
                scale = record.engine.loss_scale.value
                self.log({"train/overflows": float(self.overflows), "train/loss_scale": scale})

    def _examine(self, record: StepRecord) -> None:
        own = self.guard.verdict()
        told = distributed.gather_objects([own.loss, own.finite, own.spike, record.keys])
        verdicts = [(StepVerdict(loss, finite, spike), keys) for loss, finite, spike, keys in told]
        kind = _kind([verdict for verdict, _ in verdicts])
        if record.engine.loss_scale is not None:
            if kind != "gradient_not_finite":
                record.engine.loss_scale.restore()
            elif self._is_search(record.engine.loss_scale):
                return
            else:
                kind = "gradient_overflow"
        self.count += 1
        self.in_a_row += 1
        ranks = [
            {"rank": rank, "loss": verdict.loss, "keys": keys}
            for rank, (verdict, keys) in enumerate(verdicts)
            if kind != "loss_not_finite" or not verdict.finite
        ]
        text = f"step {record.step}: {_REASONS[kind]} on {'; '.join(_place(entry) for entry in ranks)}"
        if distributed.is_main():
            self.events.note(kind, record.step, ranks=ranks, in_a_row=self.in_a_row)
            logger.warning("skipped %s", text)
            if self.alert is not None:  # without the samples' keys, which stay where the run is
                self.alert("bad step", f"step {record.step} was skipped: {_REASONS[kind]}")
        if self.in_a_row > self.limit:
            raise NotFiniteError(
                f"{text}. That makes {self.in_a_row} skipped steps in a row "
                f"(train.max_bad_steps={self.limit}); none of them changed the weights. {self._remedy()}"
            )

    def _is_search(self, scale: LossScale) -> bool:
        """Count an overflow; whether it is one of those by which the scale finds its size."""
        self.overflows += 1
        if distributed.is_main() and scale.could_fall:
            logger.info(
                "fp16: the gradient overflowed at loss scale %g; it is now %g",
                scale.value_before,
                scale.value,
            )
        return scale.could_fall

    def _remedy(self) -> str:
        latest = self.run_dir / "checkpoints" / "latest"
        saved = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
        newest = (
            f"The newest checkpoint is {latest.parent / saved}. " if saved else "There is no checkpoint yet. "
        )
        return (
            f"{newest}Look at these samples ({self.events.path} lists all); lower optimizer.lr, set "
            "train.gradient_clip, or use precision=fp32"
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts, and the statistics of the loss."""
        counts = {"count": self.count, "in_a_row": self.in_a_row, "overflows": self.overflows}
        return counts | {"guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.count, self.in_a_row = state.get("count", 0), state.get("in_a_row", 0)
        self.overflows = state.get("overflows", 0)
        self.guard.load_state_dict(state.get("guard", {}))


def _kind(verdicts: list[StepVerdict]) -> str:
    if not all(verdict.finite for verdict in verdicts):
        return "loss_not_finite"
    return "loss_spike" if any(verdict.spike for verdict in verdicts) else "gradient_not_finite"


def _place(entry: dict[str, Any]) -> str:
    keys = entry["keys"]
    more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return f"rank {entry['rank']} (loss {entry['loss']:.4g}, samples {', '.join(keys[:_NAMED_KEYS])}{more})"
