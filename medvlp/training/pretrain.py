"""Pre-training: the recipe of a run that trains a method."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.data.loader import TrainingLoader
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method, Objective
from medvlp.methods.registry import build_method, fields_of
from medvlp.prototypes.initialise import initialise_prototypes
from medvlp.runs.agreement import together
from medvlp.runs.start import Start
from medvlp.training.accumulation import accumulates_exactly
from medvlp.training.recipe import Recipe, TrainingSet

logger = logging.getLogger(__name__)


class Pretraining(Recipe):
    """The method `method.name`, on all samples of the split that have a text."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, fields_of(config.method.name))

    def build(self, data: TrainingSet) -> Objective:
        """See `Recipe.build`."""
        return build_method(data.config, data.tokenizer.vocab_size)

    @cached_property
    def _start(self) -> Start | None:
        """What `train.start` names; found when it is first asked for, by all ranks together."""
        return Start.of(self.config)

    def tokenizer(self) -> Tokenizer | None:
        """That of the run it starts from, if it does."""
        return None if self._start is None else self._start.tokenizer(self.config)

    def started_from(self) -> Mapping[str, str]:
        """See `Recipe.started_from`."""
        return {} if self._start is None else {"run": self._start.weights}

    def start_origin(self) -> Mapping[str, str]:
        """See `Recipe.start_origin`."""
        return {} if self._start is None else self._start.origin

    def start(self, objective: Objective, batches: Callable[[], TrainingLoader]) -> None:
        """Take over the weights of `train.start`, then start learned prototypes of the first phase, where the
        config has them start from k-means."""
        assert isinstance(objective, Method)
        if self._start is not None:
            together(partial(self._start.weights_into, objective, self.config))
        objective.train()
        sizes = divide_batch(self.config, distributed.world_size())
        joined = sizes.accumulation if accumulates_exactly(objective, self.config, sizes) else 1
        for clusters in initialise_prototypes(
            objective, batches, self.config.prototypes, self.config.train.seed, joined=joined
        ):
            logger.info(
                "prototypes start from k-means; mean cosine to the own centroid %.3f", clusters.similarity
            )
