"""The combination: parts with weights on shared encoders, its config, corners, and several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import Config, PhaseConfig, PrototypesConfig
from medvlp.config_files import ConfigError, load
from medvlp.methods.base import Progress
from medvlp.methods.combination.config import CombinationConfig
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.pair import PairMethod
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.prior.config import PRIORConfig
from medvlp.methods.registry import build_method, schemas
from medvlp.prototypes.initialise import initialise_prototypes
from tests.methods import small_mgca
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small_mgca import VOCABULARY
from tests.methods.small_place import SMALL as SMALL_PLACE
from tests.methods.small_place import report_batch

NONE = [0.0, 0.0, 0.0]
REPORTS = [[3, 2], [4], [1, 1, 1], [2, 5]]


#: PRIOR's third stage without the sentence decoder.
GENERATES_NOTHING = {f"{term}_weights": NONE for term in ("image", "sentence", "score", "generated")}


def small_config(image: str = "vit", prior: dict[str, Any] | None = None, **method: Any) -> Config:
    """The shipped recipe in small: MGCA, PRIOR's bank, PLACE's correlations."""
    config = small_mgca.small_config(image)
    bank: dict[str, Any] = {
        "stage": 2,
        "embedding": 8,
        "prototypes": 6,
        "bank_noise": "never",
        "global_weights": NONE,
        "local_image_weights": NONE,
        "local_text_weights": [1.0, 1.0, 1.0],
        "bank_weights": [0.0, 10.0, 10.0],
    }
    place = {**SMALL_PLACE, "instance_weight": 0.0, "observation_weight": 0.0, "diversity_weight": 0.0}
    config.method = CombinationConfig(
        mgca=MGCAConfig(embedding=8, head_hidden=16, prototypes=6),
        prior=PRIORConfig(**{**bank, **(prior or {})}),
        place=PLACEConfig(**place),
        **method,
    )
    return config


def small_combination(image: str = "vit", **method: Any) -> PairMethod:
    torch.manual_seed(0)
    built = build_method(small_config(image, **method), VOCABULARY)
    assert isinstance(built, PairMethod)
    return built


@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_the_loss_is_the_weighted_sum_of_the_parts(image: str) -> None:
    model = small_combination(image, mgca_weight=1.0, prior_weight=0.25, place_weight=3.0)
    terms = model(report_batch(REPORTS)).named
    expected = terms["mgca/loss"] + 0.25 * terms["prior/loss"] + 3.0 * terms["place/loss"]
    torch.testing.assert_close(terms["loss"], expected)
    assert {"mgca/loss/instance", "prior/loss/bank", "place/loss/correlation"} <= set(terms)
    assert "prior/loss/global" not in terms
    terms["loss"].backward()
    for name in ("alignment.parts.mgca", "alignment.parts.prior", "alignment.parts.place", "image_encoder"):
        gradients = [p.grad for n, p in model.named_parameters() if n.startswith(name) and p.grad is not None]
        assert sum(gradient.abs().sum() for gradient in gradients) > 0, name


def test_a_part_alone_is_that_method() -> None:
    alone = small_combination(prior_weight=0.0, place_weight=0.0)
    torch.manual_seed(0)
    config = small_mgca.small_config()
    mgca = build_method(config, VOCABULARY)
    renamed = {name.replace("parts.mgca.", ""): value for name, value in alone.state_dict().items()}
    mgca.load_state_dict(renamed)
    batch = report_batch(REPORTS)
    torch.testing.assert_close(alone(batch).loss, mgca(batch).loss)
    alone.eval(), mgca.eval()
    torch.testing.assert_close(alone.encode_image(batch.image), mgca.encode_image(batch.image))
    assert alone.prototype_users[0].prototype_size() == (6, 8)
    assert alone.parameters_without_decay() == {"alignment.parts.mgca.objective.prototypes.weight"}


def test_prototypes_of_every_part_start_where_they_are_first_used() -> None:
    """PRIOR's bank by its own sentences at stage 2; MGCA's by its own embeddings, whatever part embeds."""
    config = small_config(
        prior={"global_weights": [1.0] * 3, "pool_heads": 2, **GENERATES_NOTHING}, embeds_with="prior"
    )
    config.optimizer.phases = [PhaseConfig(1, 1e-3), PhaseConfig(1, 1e-3), PhaseConfig(1, 1e-3)]
    torch.manual_seed(0)
    model = build_method(config, VOCABULARY)
    kmeans = PrototypesConfig(init="kmeans", init_samples=12, iterations=5)
    batches = [report_batch(REPORTS, seed=seed) for seed in range(3)]
    parts = model.alignment.parts
    banks = {"mgca": parts["mgca"].objective.prototypes, "prior": parts["prior"].objective.bank}
    for phase, started, rows in ((0, "mgca", 2 * 12), (1, "prior", 3 * 8)):
        before = {name: bank.weight.clone() for name, bank in banks.items()}
        (clusters,) = initialise_prototypes(model, lambda: batches, kmeans, seed=0, phase=phase)
        assert clusters.counts.sum() == rows
        for name, bank in banks.items():
            assert torch.equal(bank.weight, before[name]) == (name != started)
    assert initialise_prototypes(model, lambda: batches, kmeans, seed=0, phase=2) == []


def test_progress_reaches_every_part() -> None:
    model = small_combination()
    model.on_progress(Progress(epoch=0, step=0, steps=10))
    parts = model.alignment.parts
    assert parts["mgca"].objective.frozen
    model.on_progress(Progress(epoch=5, step=5, steps=10))
    assert not parts["mgca"].objective.frozen
    assert not parts["place"].soft


def test_ranks_of_the_parts_follow_the_combination() -> None:
    model = small_combination(negatives="local", batch_norm="local")
    assert {part.config.negatives for part in model.alignment.parts.values()} == {"local"}


@pytest.mark.parametrize("reports", [[[1]], [[], []], [[12]], [[], [3]]])
def test_corners_stay_finite(reports: list[list[int]]) -> None:
    model = small_combination()
    terms = model(report_batch(reports)).named
    terms["loss"].backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_embedding_part_needs_a_weight() -> None:
    with pytest.raises(ConfigError, match="embeds_with=mgca"):
        small_combination(mgca_weight=0.0)


def test_keys_of_parts_are_checked_and_named(tmp_path) -> None:
    file = tmp_path / "combination.yaml"
    file.write_text("method: {name: combination, place: {patch_dorp: 0.5}}\n")
    with pytest.raises(ConfigError, match=r"method\.place\.patch_dorp.*method\.place\.patch_drop"):
        load([file], [], schemas())
    file.write_text("method: {name: combination, mgca: {prototypes: 0}}\n")
    with pytest.raises(ConfigError, match=r"method\.mgca\.prototypes=0 is out of range"):
        load([file], ["data.root=/nowhere", "run.dir=/nowhere"], schemas())


def gradients(ranks: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    reports = [[3, 2], [4], [1, 1, 1], [2, 5], [2], [6, 1], [3, 3], [1, 4]]
    return averaged_gradients(small_combination().double(), report_batch(reports), ranks)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_equals_that_of_one_process(gloo_pool, ranks: int) -> None:
    _, expected = gradients(1)
    assert_equal_gradients(gloo_pool(ranks).run(gradients, ranks), expected)


def test_without_all_but_the_instance_loss_it_is_mgca_s_ablation(repository: Path) -> None:
    """Bit for bit, from the same seed: why `make bench-methods` trains no ablation of the combination."""
    folder = repository / "configs" / "benchmarks"
    encoder = repository / "configs" / "models" / "resnet_phantom.yaml"
    shared = [folder / "phantom.yaml", folder / "methods.yaml", encoder]
    words = ["data.root=d", "run.dir=r", f"data.image_size={small_mgca.SIZE}"]
    less = ["method.place_weight=0", "method.mgca.token_weight=0", "method.mgca.prototype_weight=0"]
    alone = load([*shared, folder / "mgca.yaml", folder / "mgca-ablation.yaml"], words, schemas())
    combined = load(
        [*shared, folder / "combination.yaml"], [*words, *less, "prototypes.init=random"], schemas()
    )
    for name in ("data", "image", "text", "train", "optimizer", "prototypes"):
        assert getattr(alone, name) == getattr(combined, name), name
    found = []
    batch = small_mgca.small_batch([3, 5, 2, 4])
    for config in (alone, combined):
        torch.manual_seed(3)
        built = build_method(config, VOCABULARY).train()
        torch.manual_seed(4)
        loss = built(batch).loss
        loss.backward()
        found.append([loss, *built.parameters(), *(one.grad for one in built.parameters())])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
