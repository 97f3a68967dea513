"""What the sections of a config are made of: keys, the error they are refused with, and the
sections of a method and of an evaluation task.

Import it all from `medvlp.config`, whose tree it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from shards.errors import MedvlpError

if TYPE_CHECKING:
    from medvlp.config import Config


class ConfigError(MedvlpError):
    """A config file or override is wrong; the message names the key, the source and the remedy."""

    exit_code = 2


def key(
    default: Any,
    meaning: str,
    low: float | None = None,
    high: float | None = None,
    items: tuple[int, int] | None = None,
    file: bool = False,
) -> Any:
    """A config key: its default and what `configs/reference.yaml` says beside it.

    A number, or every number of a list, lies in the closed range from `low` to `high`; both are needed. A
    list has from `items[0]` to `items[1]` values. A key that names a `file` or folder is looked for
    beside the config file first.
    """
    metadata = {"help": meaning, "low": low, "high": high, "items": items, "file": file}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class MethodConfig:
    name: str = key("mgca", "registered method; its own keys stand beside this one")
    batch_norm: Literal["global", "local"] = key(
        "global", "statistics of batch norms over all ranks, or over each rank alone"
    )
    negatives: Literal["global", "local"] = key(
        "global", "negatives and Sinkhorn over all ranks, or over each rank alone"
    )

    same_study: Literal["excluded", "negatives"] = key(
        "excluded", "images of one study, which share a report: no negatives of each other, or some"
    )

    loss_memory: float = key(
        256.0,
        "MiB of a matrix of similarities or of words that a loss makes at once (some six are held); a larger "
        "one is made in parts, and again for the backward pass",
        0.001,
        1 << 20,
    )

    #: Whether the method embeds reports.
    embeds_reports: ClassVar[bool] = True
    #: Whether it has a loss; without one it can be evaluated, not pre-trained.
    trains: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        """Refuse values that cannot stand together: the method's own, and those of the other sections.

        Called by `config_files.load`, before anything starts or is queued, and again when the method is
        built. A subclass refuses what is its own and calls this one for what concerns prototypes.

        Args:
            config: the whole config; `self` is its `method`.

        Raises:
            ConfigError: the message names the keys and what to set.
        """
        prototypes, need = config.prototypes, self.embedding_need(config)
        if prototypes.false_negatives == "mask" and need is not None:
            raise ConfigError(
                "prototypes.false_negatives=mask needs embeddings of whole samples that a loss shapes, and "
                f"method.name={self.name} has none without {need}: change that, or set "
                "prototypes.false_negatives=keep"
            )
        if prototypes.anchors:
            self._check_anchors(config)

    def _check_anchors(self, config: Config) -> None:
        count, clusters = len(config.prototypes.anchors), self.service_clusters(config)
        named = f"prototypes.anchors ({count} texts)"
        if clusters is None:
            raise ConfigError(
                f"{named} hold clusters of the prototype service, which nothing uses: set "
                "prototypes.false_negatives=mask with prototypes.false_negatives_by=clusters (or "
                "method.prototype_source=clusters with method.name=mgca), or prototypes.anchors=[]"
            )
        if not self.embeds_reports:
            raise ConfigError(
                f"{named} are embedded as reports are, and method.name={self.name} embeds no reports: "
                "set prototypes.anchors=[]"
            )
        if count > clusters:
            raise ConfigError(f"{named} need as many clusters; there are {clusters}")

    def embedding_need(self, config: Config) -> str | None:
        """What is missing for embeddings of whole samples that a loss shapes; None: there are some.

        Only embeddings that are trained can be clustered: clusters of untrained projections say nothing.
        """
        return "a method that has them"

    def loss_changes(self, config: Config) -> str | None:
        """Why the loss is not the same sum of terms throughout a training; None: it is.

        Then its values early and late say nothing of which checkpoint is better.
        """
        return None

    def training_loss_changes(self, config: Config) -> str | None:
        """`loss_changes` of the loss of steps, which may change where that of validations does not."""
        return self.loss_changes(config)

    def sample_contrasts(self, config: Config) -> list[str]:
        """Keys of losses that contrast samples with each other, of those that are above 0."""
        return []

    def service_clusters(self, config: Config) -> int | None:
        """Number of clusters of the prototype service that the method uses; None: it uses none."""
        return config.prototypes.clusters if config.prototypes.masks_by_clusters else None


@dataclass
class TaskConfig:
    """Keys of one evaluation task; a task with keys has a subclass beside it."""

    def check(self, config: Config) -> None:
        """Refuse values that cannot stand together; called by `config_files.load`.

        Args:
            config: the whole config; `self` is one of its `evaluation.tasks`.

        Raises:
            ConfigError: the message names the keys and what to set.
        """
