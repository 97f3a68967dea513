"""What a model card says about the data: counts, fingerprint and licence, nothing about a patient."""

import dataclasses
from dataclasses import dataclass

from medvlp.config import DataConfig
from medvlp.data.cache import open_reader
from medvlp.export.folder import ExportError
from medvlp.runs.identity import DataRecord, read_licences
from medvlp.runs.saved_run import SavedRun


@dataclass(frozen=True)
class DataFacts:
    """The data of a run as the model card shows them.

    Attributes:
        data: the dataset the exported weights were last trained on; None: imported, so it is not known.
        earlier: those before it (`data.allow_changed`), oldest first.
        tokenizer_from: the dataset whose tokenizer the run has; None where the config named another.
    """

    data: DataRecord | None
    earlier: tuple[DataRecord, ...] = ()
    tokenizer_from: DataRecord | None = None


def facts_of(source: SavedRun, config: DataConfig, given: bool) -> DataFacts:
    """What is stored with the run; the dataset itself is needed only by runs of versions that stored nothing.

    Args:
        source: run and checkpoint.
        config: where the data are.
        given: the user named that place: it is looked at for the licence, and must be the run's data.

    Raises:
        ExportError: another dataset than the run's was given.
        DataError: a dataset that is needed cannot be read, or lacks the split.
    """
    if source.stored is None:
        read = _read(config)
        return DataFacts(read, tokenizer_from=read if config.tokenizer is None else None)
    identity, _ = source.stored
    record = identity.trained_on(source.manifest.identity)
    if record is None:
        return DataFacts(None)
    # A run keeps the tokenizer it began with, also on data that were added later.
    origin = identity.data[0] if identity.named is None else None
    facts = DataFacts(record, identity.data[: identity.data.index(record)], origin)
    if not given:
        return facts
    read = _read(config)
    if changes := record.differences(read):
        raise ExportError(
            f"{config.root} is not what the run was trained on: {'; '.join(changes)}. Leave --data out: what "
            "the card says is stored with the run"
        )
    record = dataclasses.replace(record, licences=read.licences, asked=read.asked)
    return dataclasses.replace(facts, data=record)


def _read(config: DataConfig) -> DataRecord:
    reader = open_reader(config)
    licences, asked = read_licences(reader, config.split)
    reader.close()
    record = DataRecord.of(reader.index, config.split)
    return dataclasses.replace(record, licences=licences, asked=asked)
