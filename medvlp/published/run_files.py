"""Writing imported weights as a run folder that everything that reads runs takes."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from medvlp.config import CheckpointConfig, Config
from medvlp.config_files import to_yaml
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.published.card import Card, model_card
from medvlp.published.reading import PublishedFileError
from medvlp.runs import checkpoint_files
from medvlp.runs.encoder_records import describe_encoders, described
from medvlp.runs.identity import RunIdentity
from medvlp.runs.manifest import FORMAT, WEIGHTS, Manifest
from medvlp.runs.run_folder import CONFIG, config_hash, library_versions
from medvlp.runs.state_files import StateFile
from shards.atomic import atomic_folder

CARD = "README.md"
#: `data.root` of a run whose dataset is not known: OmegaConf's word for a value that has to be given.
NO_DATA = "???"


def check_free(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        PublishedFileError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PublishedFileError(f"{out} is not an empty folder: choose another --out, or remove it first")


def write_run(out: Path, config: Config, method: Method, tokenizer: Tokenizer, card: Card) -> Path:
    """Write a run folder with one checkpoint of step 0, all of it or nothing.

    Args:
        out: a place that is free, or an empty folder.
        config: of the method; models it names are stored described, so that nothing is fetched again.
        method: with its weights.
        tokenizer: of its texts.
        card: for the model card; its record is part of the run's identity.

    Returns:
        The folder.

    Raises:
        PublishedFileError: it cannot be written.
    """
    named = card.tokenizer or None
    identity = RunIdentity(tokenizer.content, tokenizer.special, named, (), describe_encoders(method, config))
    stored = described(config, identity)
    stored.data.root, stored.data.tokenizer = NO_DATA, None
    identity = replace(identity, encoders={}, origin=card.record())
    weights: dict[str, Tensor] = {
        name: value.detach().float() if value.is_floating_point() else value
        for name, value in method.state_dict().items()
    }
    manifest = Manifest(
        step=0, epoch=0, world_size=1, zero_stage=0, precision="fp32",
        global_batch=stored.train.global_batch, config_hash=config_hash(stored), versions=library_versions(),
        identity=identity.summary(), format=FORMAT,
    )  # fmt: skip
    values = sum(value.numel() for value in weights.values())
    try:
        check_free(out)
        with atomic_folder(out) as folder:
            identity.write(folder, tokenizer)
            (folder / CONFIG).write_text(to_yaml(stored), encoding="utf-8")
            (folder / CARD).write_text(model_card(card, stored, values), encoding="utf-8")
            partial = checkpoint_files.partial_folder(folder / "checkpoints", 0)
            manifest.files = checkpoint_files.write(partial, [StateFile(partial / WEIGHTS, weights)])
            checkpoint_files.commit(partial, manifest, CheckpointConfig())
    except OSError as error:
        reason = error.strerror or str(error)
        raise PublishedFileError(f"{out} cannot be written: {reason}; mend that, and import again") from error
    return out
