"""Files of published weights made by the golden files' rule: every tensor follows from its key."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from medvlp.published.tokenizers import KNOWN, VOCABULARY


def drawn(key: str, shape: list[int], salt: int) -> np.ndarray[Any, Any]:
    """Standard normal draws [shape] in float64 from the checksum of a key."""
    seed = (zlib.crc32(key.encode()) + salt) % 2**32
    return np.random.RandomState(seed).standard_normal(int(np.prod(shape, dtype=int))).reshape(shape)


def tensor(key: str, shape: list[int], dtype: str, salt: int) -> Tensor:
    """The value of a published key by the rule."""
    last = key.rsplit(".", 1)[-1]
    if dtype == "int64":
        if last == "position_ids":
            return torch.arange(shape[-1]).expand(shape).clone()
        return torch.full(shape, 7, dtype=torch.int64)
    n = drawn(key, shape, salt)
    if last == "running_var":
        n = 1 + 0.1 * np.abs(n)
    elif last == "running_mean":
        n = 0.1 * n
    elif not shape:
        n = 4 + 0.1 * n
    elif len(shape) == 1:
        n = 0.1 * n + (last == "weight")
    else:
        first = len(shape) == 3 and shape[0] == 1
        n = n / np.sqrt(shape[-1] if first else np.prod(shape[1:]))
        n = (
            n
            * (4 if key == "sentence_bank.embed.weight" else 1)
            * (1.5 if key.startswith("image_decoder.") else 1)
        )
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def state_dict(facts: dict[str, Any], unused: str = "-", only: str = "") -> dict[str, Tensor]:
    """Every tensor of a golden file's JSON; those that the method never reads (`unused`) as NaN."""
    import re

    aliases = facts.get("aliases", {})
    state = {}
    for key, shape, dtype in facts["state_dict"]:
        if not key.startswith(only):
            continue
        if dtype == "float32" and re.fullmatch(unused, key):
            state[key] = torch.full(shape, torch.nan)
        else:
            state[key] = tensor(aliases.get(key, key), shape, dtype, facts["salt"])
    return state


def facts_of(file: Path) -> dict[str, Any]:
    """The JSON beside a golden file."""
    return json.loads(file.with_suffix(".json").read_text())


def clinical_tokenizer(folder: Path) -> str:
    """A tokenizer of Bio_ClinicalBERT's size with its known words in their places; returns the folder."""
    vocabulary = {f"[unused{number}]": number for number in range(VOCABULARY)}
    places = {number: token for token, number in KNOWN.items()}
    vocabulary = {places.get(number, token): number for token, number in vocabulary.items()}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    from medvlp.data.text import Tokenizer

    Tokenizer(backend).save(folder)
    return str(folder)
