"""Starts learned prototypes by k-means where a phase of the run is the first to use them."""

import logging
from collections.abc import Callable, Iterable, Iterator

import torch

from medvlp.config import PrototypesConfig
from medvlp.data.batch import Batch
from medvlp.methods.base import Method
from medvlp.prototypes.initialise import find_prototypes, starting_users
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.engine import Engine
from medvlp.training.schedule import Schedule

logger = logging.getLogger(__name__)


def late_start(method: Method, config: PrototypesConfig, schedule: Schedule) -> bool:
    """Whether prototypes of the method start at a phase of the run other than its first."""
    last = int(schedule.phases[-1])
    return any(starting_users(method, config, phase) for phase in range(1, last + 1))


class PrototypeStart(Callback):
    """Starts prototypes after the last step before the phase that first uses them, under any engine.

    Trained encoders then give the features, those of the batches that come next. The checkpoint of that step
    holds the started prototypes, so that a run resumed there goes on as if it had not stopped.

    Args:
        engine: holds the weights.
        config: the `prototypes` section.
        seed: of k-means.
        schedule: of the run.
        batches: this rank's micro-batches from a step on.
        log: takes "prototypes/start_similarity", the mean cosine of the features to their centroid.

    Attributes:
        alive: called with a place and the finished steps before each batch, so that nobody takes this rank
            for dead.
    """

    name = "prototype_start"

    def __init__(
        self,
        engine: Engine,
        config: PrototypesConfig,
        seed: int,
        schedule: Schedule,
        batches: Callable[[int], Iterable[Batch]],
        log: Callable[[dict[str, float]], None],
    ) -> None:
        self.engine, self.config, self.seed, self.log = engine, config, seed, log
        self.schedule, self.batches = schedule, batches
        self.alive: Callable[[str, int], None] = lambda place, step: None

    def on_step(self, record: StepRecord) -> None:
        """Start the prototypes of the phase that the next step begins, if there are any; a collective."""
        step = record.step
        if step == self.schedule.steps or not self.schedule.restarts_at(step):
            return
        method = self.engine.objective
        assert isinstance(method, Method)
        for user in starting_users(method, self.config, int(self.schedule.phases[step])):
            prototypes = user.learned_prototypes
            assert prototypes is not None, "of those that start"
            name = next(name for name, part in method.named_modules() if part is prototypes)
            joined = self.engine.sizes.accumulation if self.engine.exact else 1
            batches = self._marked(step)
            clusters, length = find_prototypes(method, user, batches, self.config, self.seed, joined)
            values = prototypes.started(clusters.centroids, length).float()
            self.engine.rewrite_rows(f"{name}.weight", torch.arange(len(values)), values)
            self.log({"prototypes/start_similarity": clusters.similarity})
            logger.info(
                "prototypes start from k-means after step %d; mean cosine to the own centroid %.3f",
                step,
                clusters.similarity,
            )

    def _marked(self, step: int) -> Iterator[Batch]:
        for batch in self.batches(step):
            self.alive("starting prototypes", step)
            yield batch
