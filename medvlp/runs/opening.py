"""Opening what a run reads: the same dataset on all ranks, and what the run was started with."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.cache import open_reader
from medvlp.data.text import Tokenizer
from medvlp.runs.agreement import together
from medvlp.runs.checkpoint import Checkpoint
from medvlp.runs.encoder_records import describe_encoders, starting_weights
from medvlp.runs.errors import AgreedError
from medvlp.runs.identity import (
    DataRecord,
    IdentityError,
    RunIdentity,
    check_tokenizer,
    record_data,
    unchecked,
)
from medvlp.runs.manifest import DRAWN
from shards.errors import DataError
from shards.reader import ShardReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakenUp:
    """What a start of a run goes on with.

    Attributes:
        tokenizer: the run's.
        stored: what an earlier start stored; None at the first one, and after versions that stored nothing.
        changes: how the dataset differs from the checkpoint's, where `data.allow_changed` lets it.
    """

    tokenizer: Tokenizer
    stored: RunIdentity | None = None
    changes: tuple[str, ...] = ()

    def identity(
        self,
        reader: ShardReader,
        config: Config,
        objective: nn.Module,
        step: int,
        started_from: Callable[[], Mapping[str, str]] = dict,
        lesson: Callable[[], Mapping[str, str]] = dict,
        start_origin: Callable[[], Mapping[str, str]] = dict,
    ) -> RunIdentity:
        """What the run is made from now on.

        Args:
            reader: the dataset. config: of this start.
            objective: as it was built, before its first step or a load.
            step: finished steps.
            started_from: checksums of weights it starts from beside published ones, asked for at step 0.
            lesson, start_origin: see `RunIdentity`.
        """
        if self.stored is not None and not self.changes:
            return self.stored
        # Licences are for the file, which rank 0 writes.
        record = (
            record_data(reader, config, step)
            if distributed.is_main()
            else DataRecord.of(reader.index, config.data.split, step)
        )
        if self.stored is not None:
            return dataclasses.replace(self.stored, data=(*self.stored.data, record))
        return RunIdentity(
            self.tokenizer.content,
            self.tokenizer.special,
            config.data.tokenizer or config.train.start,
            (record,),
            describe_encoders(objective, config),
            {**starting_weights(objective, config), **started_from()} if step == 0 else {},
            lesson=dict(lesson()),
            start_origin=dict(start_origin()) if step == 0 else {},
        )


def open_data(config: Config) -> ShardReader:
    """The dataset; what is wrong with it on any rank is raised on all.

    Raises:
        AgreedError: it cannot be opened, or ranks see different ones (copies on the disks of nodes).
    """
    reader = together(lambda: open_reader(config.data))
    contents = distributed.gather_objects(DataRecord.of(reader.index, config.data.split).content)
    other = next((rank for rank, content in enumerate(contents) if content != contents[0]), None)
    if other is not None:
        raise AgreedError(
            f"rank {other} finds another dataset at data.root={config.data.root} than rank 0: bring the "
            "copies on the nodes up to date",
            exit_code=DataError.exit_code,
        )
    return reader


def take_up(
    config: Config,
    reader: ShardReader,
    checkpoint: Checkpoint | None,
    first: Callable[[], Tokenizer | None] = lambda: None,
    lesson: Callable[[], Mapping[str, str]] = dict,
) -> TakenUp:
    """The tokenizer a run goes on with, after a check that data and tokenizer are those of its checkpoint.

    Args:
        config: of this start.
        reader: the dataset it reads.
        checkpoint: what the run goes on from; None: it begins.
        first: the tokenizer it begins with; None: that of `data.tokenizer`.
        lesson: see `RunIdentity.lesson`.

    Raises:
        AgreedError: on all ranks: another dataset without `data.allow_changed`, tokenizer or lesson, or
            stored files that are not the checkpoint's (`IdentityError`); or no tokenizer to begin with.
    """
    run = Path(config.run.dir)
    saved = {} if checkpoint is None else checkpoint.manifest.identity
    found = None if checkpoint is None else together(lambda: RunIdentity.read(run, saved))
    if checkpoint is None or found is None:
        if checkpoint is not None and distributed.is_main():
            logger.warning("%s", unchecked(run))
        return TakenUp(together(lambda: first() or Tokenizer.load(config.data.tokenizer, config.data.root)))
    stored, tokenizer = found
    stored = stored.at(checkpoint.step, saved)
    together(lambda: check_tokenizer(tokenizer, stored, config.data.tokenizer, str(run)))
    together(lambda: stored.check_lesson(lesson(), run))
    then, now = stored.trained_on(saved), DataRecord.of(reader.index, config.data.split)
    assert then is not None, "an imported run is never gone on with"
    changes = then.differences(now)
    if config.data.tokenizer is None and stored.named is None and then.tokenizer != now.tokenizer:
        changes.append("its tokenizer, in whose place the run uses its own")
    if changes and not config.data.allow_changed:
        raise IdentityError(
            f"data.root={config.data.root} is not what {run} was trained on until step {checkpoint.step}: "
            f"{'; '.join(changes)}. Name the old data (a moved folder is fine), or say "
            "data.allow_changed=true to go on with these, or choose a new run.dir"
        )
    if changes and distributed.is_main():
        logger.warning(
            "going on with CHANGED DATA (data.allow_changed) after step %d: %s",
            checkpoint.step, "; ".join(changes),
        )  # fmt: skip
    return TakenUp(tokenizer, stored, tuple(changes))


def check_drawn(config: Config, checkpoint: Checkpoint | None, drawn: str, samples: int) -> tuple[str, ...]:
    """What to note where a run goes on with other samples of the dataset of its checkpoint.

    Which ones the rules let pass follows from what could be read of the dataset: one whose metadata was
    damaged is drawn, and repaired it may be excluded, which moves all the others.

    Args:
        config: of this start.
        checkpoint: what the run goes on from; None: it begins.
        drawn: fingerprint of the samples that this start draws, equal on all ranks.
        samples: how many these are in an epoch.

    Raises:
        IdentityError: they are others, without `data.allow_changed`.
    """
    then = drawn if checkpoint is None else checkpoint.manifest.identity.get(DRAWN, drawn)
    if checkpoint is None or then == drawn:
        return ()
    change = f"other samples of split {config.data.split} are drawn ({samples} an epoch now)"
    if not config.data.allow_changed:
        raise IdentityError(
            f"{change} than until step {checkpoint.step} of {config.run.dir}, though its dataset is the "
            "same: some that could not be read then were repaired, or cannot be now (medvlp shards verify). "
            "Bring the dataset back to how it was, or say data.allow_changed=true to go on (of this epoch "
            "some samples come twice and others not), or choose a new run.dir"
        )
    if distributed.is_main():
        logger.warning("going on (data.allow_changed) after step %d: %s", checkpoint.step, change)
    return (change,)
