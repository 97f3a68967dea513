"""Any registered method in small, and batches that every method can read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from medvlp.config import Config, MethodConfig
from medvlp.data.batch import Batch
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, fields_of, schemas
from shards.entities.vocabulary import OBSERVATIONS
from tests.methods import small_mgca
from tests.methods.small_medslip import MAX_TOKENS, random_matrix, tokenizer
from tests.methods.small_place import report_batch

#: Values of the keys that sizes and randomness usually have; a method takes those it has. Dropout is off, and
#: what is drawn anew at each call is not drawn.
SMALL: dict[str, Any] = {
    "embedding": 8, "head_hidden": 16, "prototypes": 6, "queries": 4, "query_layers": 2,
    "decoder_width": 16, "decoder_heads": 2, "decoder_layers": 1, "decoder_hidden": 32,
    "decoder_dropout": 0.0, "channel_dropout": 0.0, "image_decoder_width": 32, "pool_heads": 2,
    "bank_noise": "never", "max_sentences": 5, "patch_drop": 0.0, "fusion_layers": 2, "fusion_heads": 2,
    "fusion_hidden": 32, "fusion_dropout": 0.0, "memory_slots": 4, "memory_highest": 2,
    "width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "prototype_negatives": len(OBSERVATIONS),
}  # fmt: skip
#: Words of each sentence of each report; a report without any is nothing but padding.
REPORTS = [[3, 2], [1, 4, 2, 1], [5], [2, 2, 2], [1], [3, 3], [2, 1, 1, 1, 1], [2, 5]]


def names() -> list[str]:
    """Every registered method that trains."""
    return sorted(name for name, schema in schemas().items() if schema.trains)


def shrink(config: MethodConfig) -> MethodConfig:
    """The same config with the sizes of `SMALL`, sections included."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, MethodConfig):
            shrink(value)
        elif item.name in SMALL:
            setattr(config, item.name, SMALL[item.name])
    return config


def small_config(name: str, **method: Any) -> Config:
    """A config of method `name` that builds in a moment, and passes its own check."""
    config = small_mgca.small_config("vit")
    config.data.max_tokens = MAX_TOKENS
    config.text.options = {**small_mgca.TEXT, "max_position_embeddings": MAX_TOKENS, "initializer_range": 0.5}
    # Methods that read entities ask frozen texts; the others learn theirs.
    config.text.frozen = "entities" in fields_of(name)
    config.method = dataclasses.replace(shrink(schemas()[name](name=name)), **method)
    return config


def built(config: Config) -> Method:
    """The method of a config with weights from seed 0, in its first step."""
    torch.manual_seed(0)
    method = build_method(config, tokenizer().vocab_size)
    method.prepare(tokenizer())
    return method


def small_batch(reports: list[list[int]] | None = None, mentioned: float = 0.05, seed: int = 0) -> Batch:
    """Images, reports, labels and entities of as many samples as there are reports.

    Args:
        reports: see `REPORTS`.
        mentioned: share of the cells of the entities that are present or absent; 0: no positives at all.
        seed: of everything else.
    """
    given = REPORTS if reports is None else reports
    batch = report_batch(given, seed=seed)
    labels = torch.randint(0, 2, (len(given), 3), generator=torch.Generator().manual_seed(seed)).float()
    fields = {"entities": random_matrix(len(given), seed, mentioned)}
    return dataclasses.replace(batch, labels=labels, fields=fields)


def reordered(batch: Batch, order: torch.Tensor) -> Batch:
    """The samples of a batch in another order."""
    text = type(batch.text)(*(value[order] for value in batch.text.tensors().values()))
    return dataclasses.replace(
        batch,
        image=batch.image[order],
        text=text,
        sample=batch.sample[order],
        labels=batch.labels[order],
        keys=[batch.keys[row] for row in order],
        fields={name: value[order] for name, value in batch.fields.items()},
    )
