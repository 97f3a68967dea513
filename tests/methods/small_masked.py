"""Every method in small with masks of false negatives, labelled batches for them, and tables of clusters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.data.batch import Batch
from medvlp.methods.base import Method
from medvlp.methods.combination.config import CombinationConfig
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.prior.config import PRIORConfig
from medvlp.methods.registry import build_method
from medvlp.prototypes.table import PrototypeTable
from tests.methods import small_medslip, small_mgca, small_mpma, small_place, small_prior

REPORTS = [[3, 2], [1, 4, 2, 1], [5], [2, 2, 2], [1], [3, 3], [2, 1, 1, 1, 1], [2, 5]]
METHODS = ("mgca", "mpma", "place", "prior", "medslip", "combination")
CLUSTERS = 3


def masked_config(name: str, **method: Any) -> Config:
    """The small config of a method, with masks by K = 3 clusters."""
    if name == "combination":
        config = small_mgca.small_config()
        parts = {
            "mgca": MGCAConfig(embedding=8, head_hidden=16, prototypes=6),
            "prior": PRIORConfig(**{**small_prior.SMALL, "embedding": 8, "stage": 1}),
            "place": PLACEConfig(**small_place.SMALL),
        }
        config.method = CombinationConfig(**{**parts, **method})
    else:
        build = {
            "mgca": small_mgca.small_config,
            "mpma": small_mpma.small_config,
            "place": small_place.small_config,
            "prior": small_prior.small_prior_config,
            "medslip": small_medslip.small_config,
        }[name]
        config = build(**method)
    config.prototypes.false_negatives, config.prototypes.clusters = "mask", CLUSTERS
    config.prototypes.false_negatives_by = "clusters"
    return config


def masked_method(name: str, **method: Any) -> Method:
    """The method of `masked_config` with weights from seed 0."""
    return built(masked_config(name, **method))


def built(config: Config) -> Method:
    """The method of a config with weights from seed 0."""
    medslip = config.method.name == "medslip"
    torch.manual_seed(0)
    size = small_medslip.tokenizer().vocab_size if medslip else small_mgca.VOCABULARY
    method = build_method(config, size)
    if medslip:
        method.prepare(small_medslip.tokenizer())
    return method


def labelled_batch(name: str) -> Batch:
    """Eight samples; three findings, of which two samples know nothing."""
    if name == "medslip":
        batch = small_medslip.small_batch(small_medslip.random_matrix(len(REPORTS), mentioned=0.05))
    else:
        batch = small_place.report_batch(REPORTS)
    batch.labels = torch.randint(-1, 2, (len(REPORTS), 3), generator=torch.Generator().manual_seed(1)).float()
    batch.labels[[2, 6]] = torch.nan
    return batch


def table_for(method: Method, batch: Batch) -> PrototypeTable:
    """A table whose clusters lie around embeddings of the batch, spread over it; `method` stays as it is."""
    copied = copy.deepcopy(method)
    assert copied.service_user is not None
    size = copied.service_user.service_size()
    assert size is not None
    with torch.no_grad():
        embeddings = copied(batch).embeddings
    rows = embeddings.get("text", embeddings["image"])
    return PrototypeTable.start(rows[torch.linspace(0, len(rows) - 1, size[0]).long()])


def cluster_sharing(table: PrototypeTable, embeddings: Tensor) -> Tensor:
    """[B, B] bool: different samples of one cluster, the slow way."""
    clusters = [int((table.centroids @ row).argmax()) for row in embeddings]
    return torch.tensor(
        [[i != j and mine == other for j, other in enumerate(clusters)] for i, mine in enumerate(clusters)]
    )
