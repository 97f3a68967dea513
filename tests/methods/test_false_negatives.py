"""Masks of false negatives in every method: what they change, what they leave alone, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch
from medvlp.encoders.words import report_identity
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Method
from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.losses import Sentences, observation_terms
from tests.methods.small_masked import (
    CLUSTERS,
    METHODS,
    REPORTS,
    built,
    cluster_sharing,
    labelled_batch,
    masked_config,
    masked_method,
    table_for,
)

FIGURES = {"prototypes/masked", "prototypes/mask_precision"}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_with_masks(name: str) -> None:
    plain = masked_config(name)
    plain.prototypes.false_negatives = "keep"
    batch, without, method = labelled_batch(name), built(plain), masked_method(name)
    assert without.service_user.service_size() is None
    user = method.service_user
    assert user.service_size() == (CLUSTERS, user.embedding_width())
    torch.manual_seed(1)
    expected = without(batch).named
    torch.manual_seed(1)
    before = method(batch).named
    assert set(before) == set(expected), "there is no table yet"
    for term, value in expected.items():
        torch.testing.assert_close(before[term], value)
    table = table_for(method, batch)
    torch.manual_seed(1)
    output = method(batch, table)
    terms, embeddings = output.named, output.embeddings
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    for modality, values in embeddings.items():
        assert values.dtype == torch.float32, modality
        torch.testing.assert_close(values.norm(dim=1), torch.ones(len(REPORTS)))
    if name == "medslip":
        assert set(embeddings) == {"image"}
        torch.testing.assert_close(terms["loss"], expected["loss"])
        return
    assert set(embeddings) == {"image", "text"}
    sharing = cluster_sharing(table, embeddings["text"])
    assert 0 < sharing.sum() < sharing.numel() - len(sharing)
    assert set(terms) == set(expected) | FIGURES
    assert terms["prototypes/masked"] == pytest.approx(sharing.sum().item() / 56)
    changed = {term for term in expected if not torch.equal(terms[term], expected[term])}
    contrasts = {
        "mgca": {"loss/instance"},
        "mpma": {"loss/global"},
        "place": {"loss/instance", "loss/observation", "observation/excluded"},
        "prior": {"loss/global", "loss/generated"},
        "combination": {
            "mgca/loss", "mgca/loss/instance", "prior/loss", "prior/loss/global", "place/loss",
            "place/loss/instance", "place/loss/observation", "place/observation/excluded",
        },
    }  # fmt: skip
    assert changed == contrasts[name] | {"loss"}, "tokens of one sample are never masked"
    for term in changed:
        if "loss" in term:
            assert terms[term] < expected[term], f"{term}: fewer negatives"


def test_instance_loss_by_hand() -> None:
    method = masked_method("mgca", token_weight=0.0, prototype_weight=0.0)
    batch = labelled_batch("mgca")
    table = table_for(method, batch)
    output = method(batch, table)
    loss, image, report = output.terms["loss/instance"], *output.embeddings.values()
    sharing = cluster_sharing(table, report)
    expected = torch.zeros(())
    for side in (image @ report.T / 0.07, report @ image.T / 0.07):
        for row, left in zip(side, ~sharing, strict=True):
            own = int(left[: int((side == row).all(1).nonzero())].sum())
            expected = expected + F.cross_entropy(row[left][None], torch.tensor([own])) / len(side)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "medslip"])
def test_one_cluster_for_all_leaves_no_negatives(name: str) -> None:
    config = masked_config(name)
    config.prototypes.clusters = 1
    method, batch = built(config), labelled_batch(name)
    terms = method(batch, table_for(method, batch)).named
    terms["loss"].backward()
    assert terms["prototypes/masked"] == 1
    for term, value in terms.items():
        if term.rpartition("loss/")[2] in ("instance", "global", "generated"):
            torch.testing.assert_close(value, torch.zeros(()), atol=1e-6, rtol=0)
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    method, batch = masked_method("mgca", image="vit"), labelled_batch("mgca")
    table = table_for(method, batch)
    terms = method.to(dtype)(batch, table).named
    terms["loss"].backward()
    assert terms["loss/instance"].dtype == torch.float32
    assert 0 < terms["prototypes/masked"] < 1
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_place_keeps_the_sentences_of_one_report_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    observations, sentences = (unit_norm(torch.randn(2, 3, 4, generator=generator)) for _ in range(2))
    valid = torch.tensor([[True, True, True], [True, True, False]])
    config = PLACEConfig(false_negatives="keep", negatives="local")
    said = Sentences(sentences, valid, torch.arange(6).view(2, 3))
    everything = ~torch.eye(2, dtype=torch.bool)
    masked = observation_terms(observations, said, False, config, everything)
    config.negative_scope = "report"
    inside = observation_terms(observations, said, False, config, everything)
    torch.testing.assert_close(masked["loss/observation"], inside["loss/observation"])
    # 3 * 2 pairs between the reports in each direction, of 5 * 4 pairs of sentences.
    assert masked["observation/excluded"] == pytest.approx(12 / 20)


def test_learned_prototypes_and_masks_are_two_things() -> None:
    method = masked_method("mgca")
    assert method.prototype_users[0].prototype_size() == (6, 8)
    assert method.service_user.service_size() == (CLUSTERS, 8)
    assert masked_method("mgca", prototype_source="clusters").service_user.service_size() == (6, 8)


def test_a_step_without_a_table_has_no_prototype_loss() -> None:
    method = masked_method("mgca", prototype_source="clusters")
    batch = labelled_batch("mgca")
    for table in (None, table_for(method, batch), None, table_for(method, batch)):
        method.zero_grad()
        terms = method(batch, table).named
        terms["loss"].backward()
        assert ("loss/prototype" in terms) == (table is not None)
        assert FIGURES.isdisjoint(terms) == (table is None)
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_one_part_of_the_combination_decides() -> None:
    method = masked_method("combination", embeds_with="place")
    assert method.service_user is method.alignment.parts["place"]
    clusters = masked_config("combination", embeds_with="place")
    clusters.method.mgca.prototype_source = "clusters"
    other = built(clusters)
    assert other.service_user is other.alignment.parts["mgca"]
    assert other.service_user.service_size() == (6, 8)


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "mgca": ("mgca", {"instance_weight": 0.0}, r"method\.instance_weight"),
    "combination": (
        "combination",
        {"mgca": MGCAConfig(instance_weight=0.0, prototype_weight=0.0)},
        r"has none without method\.mgca\.instance_weight",
    ),
    "mpma": ("mpma", {"global_weight": 0.0}, r"method\.global_weight"),
    "place": ("place", {"instance_weight": 0.0, "observation_weight": 1.0}, r"method\.instance_weight"),
    "prior": ("prior", {"stage": 2, "global_weights": [1.0, 0.0, 1.0]}, r"method\.global_weights"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_masks_need_embeddings_and_contrasts(case: str) -> None:
    name, keys, named = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=rf"prototypes\.false_negatives=mask.*{named}"):
        masked_method(name, **keys)


def test_medslip_says_that_nothing_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="medvlp"):
        masked_method("medslip")
    assert "changes no loss of MeDSLIP" in caplog.text


def test_anchors_need_something_to_hold() -> None:
    config = masked_config("mgca")
    config.prototypes.anchors = ["edema", "mass"]
    assert built(config).service_user.service_size() == (CLUSTERS, 8)
    config.prototypes.anchors = ["edema"] * (CLUSTERS + 1)
    with pytest.raises(ConfigError, match=r"prototypes\.anchors \(4 texts\).*there are 3"):
        built(config)
    config.prototypes.anchors = ["edema"]
    config.prototypes.false_negatives = "keep"
    with pytest.raises(ConfigError, match=r"prototypes\.anchors.*method\.prototype_source=clusters"):
        built(config)
    medslip = masked_config("medslip")
    medslip.prototypes.anchors = ["edema"]
    with pytest.raises(ConfigError, match=r"prototypes\.anchors.*embeds no reports"):
        built(medslip)
    combination = masked_config("combination", embeds_with="place")
    combination.method.mgca.prototype_source = "clusters"
    combination.prototypes.anchors = ["edema"]
    with pytest.raises(ConfigError, match=r"prototypes\.anchors.*method\.embeds_with=place"):
        built(combination)


def test_clusters_alone_would_leave_steps_without_a_loss() -> None:
    with pytest.raises(ConfigError, match=r"method\.prototype_source=clusters"):
        masked_method("mgca", prototype_source="clusters", instance_weight=0.0, token_weight=0.0)


def by_tokens(name: str) -> tuple[Method, Batch]:
    """A method that masks by equal reports, and a batch whose samples 0 and 4 have one report."""
    config = masked_config(name)
    config.prototypes.false_negatives_by = "tokens"
    batch = labelled_batch(name)
    for values in batch.text.tensors().values():
        values[4] = values[0]
    return built(config), batch


@pytest.mark.parametrize("name", [name for name in METHODS if name != "medslip"])
def test_equal_reports_are_no_negatives_without_clusters(name: str) -> None:
    method, batch = by_tokens(name)
    assert method.service_user is not None
    assert method.service_user.service_size() is None, "nothing has to be clustered"
    output = method(batch)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[0, 4] = expected[4, 0] = True
    assert output.exclusion.pairs is not None
    assert torch.equal(output.exclusion.pairs, expected)
    assert output.terms["prototypes/masked"] == pytest.approx(2 / 56)


@pytest.mark.parametrize("embeds_with", ["mgca", "prior", "place"])
def test_equal_reports_are_no_negatives_in_any_part_of_the_combination(embeds_with: str) -> None:
    config = masked_config("combination", embeds_with=embeds_with)
    config.prototypes.false_negatives_by = "tokens"
    batch = labelled_batch("combination")
    for values in batch.text.tensors().values():
        values[4] = values[0]
    masked = built(config)(batch).named
    config.prototypes.false_negatives = "keep"
    plain = built(config)(batch).named
    for term in ("mgca/loss/instance", "prior/loss/global", "place/loss/instance"):
        assert masked[term] < plain[term], term


def test_the_order_of_sentences_does_not_matter() -> None:
    text = labelled_batch("mgca").text
    swapped = dataclasses.replace(text, input_ids=text.input_ids.clone())
    first, second = ((text.sentence_index[0] == sentence).nonzero()[:2, 0] for sentence in (0, 1))
    assert len(first) == len(second) == 2
    swapped.input_ids[0, first], swapped.input_ids[0, second] = (
        text.input_ids[0, second], text.input_ids[0, first],
    )  # fmt: skip
    cut = dataclasses.replace(text, sentence_index=text.sentence_index.clone())
    cut.sentence_index[0, first[1]] = -1
    assert (report_identity(swapped) == report_identity(text))[1:].all()
    assert report_identity(text).unique().numel() == len(REPORTS)
    assert report_identity(cut)[0] != report_identity(text)[0]


def test_a_collapse_takes_no_negatives_away() -> None:
    """Heads that make all reports alike: clusters then leave nothing to tell apart, equal sentences do."""
    losses = {}
    config = masked_config("mgca", token_weight=0.0, prototype_weight=0.0)
    batch = labelled_batch("mgca")
    table = table_for(built(config), batch)
    for by in ("tokens", "clusters"):
        config.prototypes.false_negatives_by = by
        method = built(config)
        for head in (method.alignment.image_head, method.alignment.report_head):
            last = [layer for layer in head.modules() if isinstance(layer, torch.nn.Linear)][-1]
            torch.nn.init.zeros_(last.weight)
        losses[by] = method(batch, table).loss.item()
    assert losses["clusters"] == pytest.approx(0, abs=1e-5)
    assert losses["tokens"] == pytest.approx(2 * math.log(len(REPORTS)), rel=1e-3)
