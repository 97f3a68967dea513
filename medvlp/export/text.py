"""The text encoder and its tokenizer as transformers reads them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from medvlp.data.text import Tokenizer
from medvlp.encoders.text import TextEncoder
from medvlp.encoders.text_model import NoTokenTypes
from medvlp.export.agreement import check_agreement
from medvlp.export.errors import ExportError

#: Two texts of different length, one with a special token's name in it, for the comparison after writing.
_SENTENCES = ("The heart is enlarged; no [SEP] pleural effusion.", "Normal.")


def load_options(encoder: TextEncoder) -> dict[str, bool]:
    """Arguments of `AutoModel.from_pretrained` that keep it from adding an untrained pooling layer."""
    accepted = inspect.signature(type(encoder.model).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def write_text(encoder: TextEncoder, tokenizer: Tokenizer, max_tokens: int, folder: Path) -> None:
    """Write model and tokenizer so that `AutoModel` and `AutoTokenizer` `.from_pretrained(FOLDER)` are they.

    Args:
        encoder: the text backbone; `text.layers` and `text.options` are in its transformers config already.
        tokenizer: the run's.
        max_tokens: `data.max_tokens`, where the tokenizer cuts with `truncation=True`.
        folder: an existing folder.

    Raises:
        ExportError: weights cannot express an option of the config, or what was written gives other features.
    """
    with _quiet_transformers():
        encoder.model.save_pretrained(folder, state_dict=plain_weights(encoder))
        tokenizer.to_transformers(max_tokens).save_pretrained(str(folder))
        _check(encoder, tokenizer, max_tokens, folder)


def plain_weights(encoder: TextEncoder) -> dict[str, Tensor]:
    """State dict for an unchanged transformers model that computes the same.

    Without token types the table of them is zero; without positions every row of that table is row 0.

    Raises:
        ExportError: `text.positions=false` in a model without a table of positions.
    """
    weights = dict(encoder.model.state_dict())
    settings = encoder.model.config
    width = encoder.model.get_input_embeddings().embedding_dim
    for name, module in encoder.model.named_modules():
        if isinstance(module, NoTokenTypes):
            weights[f"{name}.weight"] = torch.zeros(settings.type_vocab_size, width)
    if not encoder.config.positions:
        tables = [
            f"{name}.weight"
            for name, module in encoder.model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        ]
        if not tables:
            raise ExportError(
                f"text.positions=false cannot be written as weights: {settings.model_type} models have no "
                "table of positions"
            )
        for name in tables:
            weights[name] = weights[name][:1].expand_as(weights[name]).contiguous()
    return weights


@torch.no_grad()
def _check(encoder: TextEncoder, tokenizer: Tokenizer, max_tokens: int, folder: Path) -> None:
    """Load what was written with plain transformers and compare token ids and hidden states."""
    what = f"text.model_type={encoder.model.config.model_type} in transformers"
    try:
        plain: Any = transformers.AutoModel.from_pretrained(folder, **load_options(encoder)).eval()
        plain_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{what} cannot be read back: {' '.join(str(error).split())[:300]}") from error
    text = tokenizer.tokenize([[sentence] for sentence in _SENTENCES], max_tokens)
    tokens = plain_tokenizer(list(_SENTENCES), padding=True, truncation=True, return_tensors="pt")
    if not torch.equal(text.input_ids, tokens["input_ids"]):
        raise ExportError(f"the tokenizer gives other token ids in transformers than in training ({folder})")
    keep = text.attention_mask[..., None]
    check_agreement(encoder(text).hidden * keep, plain(**tokens).last_hidden_state * keep, what)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars for a second's work, and no load reports: what was loaded is compared here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
