"""Pre-training: the recipe of a run that trains a method."""

import logging
from collections.abc import Callable

from medvlp.config import Config
from medvlp.data.loader import TrainingLoader
from medvlp.methods.base import Method, Objective
from medvlp.methods.registry import build_method, fields_of
from medvlp.prototypes.initialise import initialise_prototypes
from medvlp.training.recipe import Recipe, TrainingSet

logger = logging.getLogger(__name__)


class Pretraining(Recipe):
    """The method `method.name`, on all samples of the split that have a text."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, fields_of(config.method.name))

    def build(self, data: TrainingSet) -> Objective:
        """See `Recipe.build`."""
        return build_method(data.config, data.tokenizer.vocab_size)

    def start(self, objective: Objective, batches: Callable[[], TrainingLoader]) -> None:
        """Start learned prototypes of the first phase, where the config has them start from k-means."""
        assert isinstance(objective, Method)
        objective.train()
        for clusters in initialise_prototypes(
            objective, batches, self.config.prototypes, self.config.train.seed
        ):
            logger.info(
                "prototypes start from k-means; mean cosine to the own centroid %.3f", clusters.similarity
            )
