"""One import from beginning to end: read, rename, check, write a run folder."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from medvlp import config_files
from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.methods.medslip.method import MeDSLIP
from medvlp.methods.registry import build_method, schemas
from medvlp.published import medslip, mgca, prior
from medvlp.published.card import Card
from medvlp.published.reading import PublishedFile, PublishedFileError, printable, read_published
from medvlp.published.recipe import CLINICAL_BERT, Recipe
from medvlp.published.renaming import Renamed, rename
from medvlp.published.run_files import check_free, write_run
from medvlp.published.tokenizers import check_clinical_bert

#: Published methods -> how their files are read.
METHODS: dict[str, ModuleType] = {"mgca": mgca, "prior": prior, "medslip": medslip}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sources:
    """What an import may need beside the file.

    Attributes:
        tokenizer: folder or hub name of the text encoder's tokenizer.
        text: folder or hub name of the frozen text model (MeDSLIP alone).
        book: file of the authors' descriptions (MeDSLIP alone); None: not given.
        allow_unknown: list keys that the published model does not have instead of refusing them.
    """

    tokenizer: str = CLINICAL_BERT
    text: str = CLINICAL_BERT
    book: Path | None = None
    allow_unknown: bool = False


def import_checkpoint(kind: str, path: Path, out: Path, sources: Sources, say: Say) -> Path:
    """Make a run folder of a published checkpoint.

    Args:
        kind: a key of `METHODS`.
        path: the published file.
        out: a folder that does not exist or is empty.
        sources: what stands in no published file.
        say: receives one line of progress at a time.

    Returns:
        The run folder.

    Raises:
        PublishedFileError: the file is not what it is said to be, something it needs is missing, or `out`
            is in use.
        MedvlpError: tokenizer or text model cannot be loaded.
    """
    check_free(out)
    descriptions = _descriptions(sources) if kind == "medslip" else None
    say(f"reading {path}")
    file = read_published(path, METHODS[kind].WRAPPERS)
    recipe: Recipe = METHODS[kind].recipe(file.tensors.keys())
    more = {} if descriptions is None else {"text": {**recipe.values["text"], "name": sources.text}}
    config = config_of({**recipe.values, **more}, out)
    reads_text = config.method.trains
    tokenizer = _clinical_bert(sources.tokenizer) if reads_text else no_words()
    say(f"building {recipe.origin.title}")
    method, renamed = method_of(file, recipe, config, tokenizer.vocab_size, sources.allow_unknown)
    if descriptions is not None:
        assert isinstance(method, MeDSLIP)
        method.write_book(tokenizer, descriptions)
    _tell(renamed, file.others, say)
    card = Card(
        recipe.origin, path.name, file.sha256, sources.tokenizer if reads_text else "",
        tokenizer.content if reads_text else "", renamed.unused, renamed.unknown, file.others,
        {} if sources.book is None else {"text model": sources.text, "descriptions": sources.book.name},
    )  # fmt: skip
    return write_run(out, config, method, tokenizer, card)


def method_of(
    file: PublishedFile, recipe: Recipe, config: Config, vocab_size: int, allow_unknown: bool = False
) -> tuple[Method, Renamed]:
    """The method of the config with the file's weights, in evaluation mode, and the account of its keys.

    Raises:
        PublishedFileError: see `rename`.
    """
    method = build_method(config, vocab_size).eval()
    own = recipe.own or "-"
    expected = {name: value for name, value in method.state_dict().items() if not re.fullmatch(own, name)}
    renamed = rename(file, recipe.origin.title, expected, recipe.rules, recipe.unused, allow_unknown)
    method.load_state_dict(method.state_dict() | renamed.state, strict=True)
    return method, renamed


def config_of(values: Mapping[str, Any], out: Path, overrides: Sequence[str] = ()) -> Config:
    """A checked config with these sections, the run folder `out`, and no dataset.

    Raises:
        ConfigError: values that cannot stand together.
    """
    given = [f"run.dir={json.dumps(str(out))}", "data.root=unknown", *overrides]
    return config_files.load([config_files.Layer("published recipe", values)], given, schemas())


def no_words() -> Tokenizer:
    """The tokenizer of a run without a text encoder, which readers of reports ask for: no word is known."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Tokenizer(backend)


def _clinical_bert(named: str) -> Tokenizer:
    tokenizer = Tokenizer.load(named, ".")
    check_clinical_bert(tokenizer, named)
    return tokenizer


def _descriptions(sources: Sources) -> Sequence[str]:
    if sources.book is None:
        raise PublishedFileError(
            "MeDSLIP's file holds no text book: give the authors' `observation explanation.json` (from "
            "their repository, pykale/MeDSLIP) with --book; other descriptions ask what it was not trained on"
        )
    return medslip.read_descriptions(sources.book)


def _tell(renamed: Renamed, others: Sequence[str], say: Say) -> None:
    """Say what of the file is not in the run."""
    say(f"{len(renamed.state)} tensors taken over")
    reasons = dict.fromkeys(renamed.unused.values())
    for reason in reasons:
        keys = [key for key, why in renamed.unused.items() if why == reason]
        say(f"{len(keys)} keys not used, {reason}: {printable(keys)}")
    if renamed.unknown:
        say(f"{len(renamed.unknown)} unknown keys LEFT OUT: {printable(renamed.unknown)}")
    if others:
        say(f"not read: {printable(others)}")
