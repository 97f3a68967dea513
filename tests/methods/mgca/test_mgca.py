"""MGCA as a whole: corners, precisions, options, freezing, embeddings, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import PrototypesConfig
from medvlp.encoders.backbones import EncoderError
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress
from medvlp.methods.registry import UnknownMethodError, build_method, schemas
from medvlp.prototypes.initialise import initialise_prototypes
from medvlp.prototypes.kmeans import TooFewRowsError
from medvlp.prototypes.synchronous import SynchronousService
from medvlp.prototypes.table import PrototypeTable
from tests.methods.small_mgca import VOCABULARY, rows_of, small_batch, small_config, small_mgca

OFFICIAL = {
    "batch_norm": "local",
    "negatives": "local",
    "normalise_patch_context": False,
    "separator_word": True,
    "padding_negatives": True,
    "padding_statistics": True,
    "attention_off_by_one": True,
    "lost_last_word": True,
}
TERMS = {
    "loss",
    "loss/instance",
    "loss/word",
    "loss/patch",
    "loss/prototype",
    "retrieval/top1",
    "retrieval/top5",
}


@settings(max_examples=20)
@given(
    words=st.lists(st.sampled_from([-1, 0, 1, 2, 5, 10]), min_size=1, max_size=5),
    official=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    image=st.sampled_from(["vit", "resnet"]),
)
def test_any_batch_gives_finite_loss_and_gradients(
    words: list[int], official: bool, dtype: torch.dtype, image: str
) -> None:
    model = small_mgca(image, **(OFFICIAL if official else {})).to(dtype)
    terms = model(small_batch(words)).named
    assert set(terms) == TERMS
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert terms["loss"].dtype == torch.float32
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Equal reports leave only rounding to the two batch norms, which multiply its gradient by 1e5: more
        # than fp16 holds. The engine skips such a step.
        assert parameter.grad.isfinite().all() or dtype == torch.float16, name


@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_fp16_gradients_are_finite(image: str) -> None:
    model = small_mgca(image).half()
    model(small_batch([3, 7, 1, 5])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_loss_does_not_depend_on_padding_but_the_published_one_does() -> None:
    batch = small_batch([3, 7, 1, 5], length=16)
    short = rows_of(batch, 0, 4)
    assert short.text.input_ids.shape[1] < 16
    torch.testing.assert_close(small_mgca()(batch).loss, small_mgca()(short).loss)
    official = [small_mgca(**OFFICIAL)(each).loss.item() for each in (batch, short)]
    assert abs(official[0] - official[1]) > 1e-4


@pytest.mark.parametrize("option", [name for name in OFFICIAL if name not in ("batch_norm", "negatives")])
def test_every_published_quirk_changes_the_loss(option: str) -> None:
    batch = small_batch([3, 7, 1, 10])
    sound = small_mgca()(batch).loss.item()
    quirk = small_mgca(**{option: OFFICIAL[option]})(batch).loss.item()
    assert abs(sound - quirk) > 1e-6


def test_weights_and_terms_add_up() -> None:
    terms = small_mgca(instance_weight=2.0, token_weight=0.5, prototype_weight=3.0)(
        small_batch([3, 4, 5])
    ).named
    expected = (
        2.0 * terms["loss/instance"]
        + 0.5 * (terms["loss/word"] + terms["loss/patch"])
        + 3.0 * terms["loss/prototype"]
    )
    torch.testing.assert_close(terms["loss"], expected)


def test_training_lowers_the_loss_and_finds_the_pairs() -> None:
    model = small_mgca(freeze_epochs=0)
    model.on_progress(Progress(0, 0, 60))
    batch = small_batch([3, 7, 1, 5, 2, 6])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model(batch).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        terms = model(batch).named
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"].item() < 0.6 * first
    assert terms["retrieval/top1"] == 1


def test_frozen_prototypes_get_zero_gradients() -> None:
    model = small_mgca()
    weight = model.alignment.objective.prototypes.weight
    for epoch, frozen in ((0, True), (1, False)):
        model.zero_grad()
        model.on_progress(Progress(epoch, 0, 2))
        model(small_batch([3, 4])).loss.backward()
        assert (weight.grad == 0).all() == frozen
    assert model.parameters_without_decay() == {"alignment.objective.prototypes.weight"}
    assert "alignment.objective.prototypes.weight" in dict(model.named_parameters())


def test_embeddings_and_scores() -> None:
    model = small_mgca().eval()
    batch = small_batch([3, 7, 1])
    image, text = model.encode_image(batch.image), model.encode_text(batch.text)
    for embedding in (image, text):
        assert embedding.shape == (3, 8)
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.score(batch.image, batch.text), image @ text.T)
    assert model.image_features(batch.image).shape == (3, 16)
    with torch.no_grad():
        short = rows_of(batch, 0, 3)
        torch.testing.assert_close(model.encode_text(short.text), text, rtol=1e-4, atol=1e-5)


def test_clusters_replace_learned_prototypes() -> None:
    model = small_mgca(prototype_source="clusters")
    batch = small_batch([3, 7, 1, 5])
    size = model.service_user.service_size()
    assert size is not None
    assert model.parameters_without_decay() == set()
    assert not any("prototypes" in name for name, _ in model.named_parameters())
    assert not model.prototype_users
    before = model(batch)
    assert "loss/prototype" not in before.terms
    service = SynchronousService(PrototypesConfig(bank_rows=32, iterations=3), *size)
    service.update(before.embeddings, batch.sample, step=1)
    assert service.refresh(step=1)["prototypes/rows"] == 8
    terms = model(batch, service.table).named
    assert terms["loss/prototype"] > 0
    terms["loss/prototype"].backward()
    assert model.alignment.image_head.linear1.weight.grad.abs().sum() > 0


def test_cluster_loss_prefers_pairs_that_agree() -> None:
    model = small_mgca(prototype_source="clusters", prototypes=4, embedding=4)
    table = PrototypeTable.start(torch.eye(4))
    agree = model.alignment.objective.prototype(torch.eye(4), torch.eye(4), table)
    disagree = model.alignment.objective.prototype(torch.eye(4), torch.eye(4).roll(1, 0), table)
    assert agree < disagree


def test_kmeans_start() -> None:
    model = small_mgca().train()
    batches = [small_batch([3, 7, 1, 5], seed=seed) for seed in range(6)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    config = PrototypesConfig(init="kmeans", init_samples=16, iterations=5)
    (clusters,) = initialise_prototypes(model, lambda: batches, config, seed=0)
    assert clusters.counts.sum() == 2 * 16
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(part.training for part in model.modules())
    for name, value in model.state_dict().items():
        if name == "alignment.objective.prototypes.weight":
            torch.testing.assert_close(value, clusters.centroids)
        else:
            assert torch.equal(value, state[name]), name
    embeddings = torch.cat([model.encode_image(batches[0].image), model.encode_text(batches[0].text)])
    started = model.alignment.objective.prototypes(embeddings).amax(1).mean()
    random = (embeddings @ unit_norm(state["alignment.objective.prototypes.weight"]).T).amax(1).mean()
    assert started > random + 0.1


def test_kmeans_start_options_and_errors() -> None:
    model = small_mgca(prototypes=9)
    batch = small_batch([3, 7])
    assert initialise_prototypes(model, lambda: [batch], PrototypesConfig(init="random"), seed=0) == []
    with pytest.raises(TooFewRowsError, match=r"init_samples"):
        initialise_prototypes(model, lambda: [batch], PrototypesConfig(init="kmeans", init_samples=2), seed=0)
    with pytest.raises(ValueError, match="centroids"):
        model.prototype_users[0].learned_prototypes.set(torch.eye(3))


def test_registry_and_errors() -> None:
    assert "mgca" in schemas()
    config = small_config()
    config.method.name = "mcga"
    with pytest.raises(UnknownMethodError, match="mgca"):
        build_method(config, VOCABULARY)
    with pytest.raises(EncoderError, match="patch_weights"):
        small_mgca("resnet", patch_weights="attention")
    config = small_config()
    config.text.options = {**config.text.options, "max_position_embeddings": 8}
    with pytest.raises(EncoderError, match=r"data\.max_tokens=16"):
        build_method(config, VOCABULARY)


def test_a_term_without_weight_is_neither_computed_nor_built() -> None:
    model = small_mgca(token_weight=0.0, prototype_weight=0.0)
    terms = model(small_batch([3, 4])).named
    assert set(terms) == {"loss", "loss/instance", "retrieval/top1", "retrieval/top5"}
    assert terms["loss"] == terms["loss/instance"]
    assert not any("patch_head" in name or "prototypes" in name for name in model.state_dict())
    assert not model.prototype_users
