"""PRIOR as a whole: corners, precisions, stages, options, the bank's schedule, embeddings, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config import PhaseConfig, PrototypesConfig
from medvlp.config_files import ConfigError
from medvlp.encoders.backbones import EncoderError
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress
from medvlp.methods.prior.bank import gumbel_noise
from medvlp.methods.prior.terms import masked_mean, sentence_contrast, simsiam
from medvlp.methods.registry import build_method, schemas
from medvlp.prototypes.initialise import initialise_prototypes
from tests.methods.small_mgca import VOCABULARY, rows_of
from tests.methods.small_prior import report_batch, small_prior, small_prior_config

OFFICIAL: dict[str, Any] = {
    "bank_noise": "always",
    "local_layout": "official_view",
    "wrong_permutation": True,
    "causal_decoder": True,
    "rank_means": True,
    "zero_shot": "official",
}
ALIGNED = {"loss/global", "loss/local_image", "loss/local_text"}
TERMS = {
    1: ALIGNED,
    2: ALIGNED | {"loss/bank"},
    3: ALIGNED | {"loss/bank", "loss/image", "loss/sentence", "loss/score", "loss/generated"},
}
METRICS = {"loss", "retrieval/top1", "retrieval/top5", "temperature/global", "temperature/local"}
REPORTS = [[3, 2], [1, 4, 2, 1], [5], [2, 2, 2], [1], [3, 3]]


@settings(max_examples=20)
@given(
    reports=st.lists(st.lists(st.integers(1, 4), max_size=6), min_size=1, max_size=4),
    stage=st.sampled_from([1, 2, 3]),
    official=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    image=st.sampled_from(["vit", "resnet"]),
)
def test_any_batch_gives_finite_loss_and_gradients(
    reports: list[list[int]], stage: int, official: bool, dtype: torch.dtype, image: str
) -> None:
    model = small_prior(image, stage=stage, **(OFFICIAL if official else {})).to(dtype)
    batch = report_batch(reports)
    copies = [value.clone() for value in (batch.image, batch.text.input_ids, batch.text.sentence_index)]
    terms = model(batch).named
    assert set(terms) == TERMS[stage] | METRICS
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert terms["loss"].dtype == torch.float32
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Batch norms of equal values multiply rounding by 300, which fp16 cannot always hold.
        assert parameter.grad.isfinite().all() or dtype == torch.float16, name
    for before, after in zip(
        copies, (batch.image, batch.text.input_ids, batch.text.sentence_index), strict=True
    ):
        assert torch.equal(before, after)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_gradients_are_finite(stage: int) -> None:
    model = small_prior(stage=stage).half()
    model(report_batch(REPORTS)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("scale", [14.0, 100.0, 1000.0])
@pytest.mark.parametrize("alike", [1.0, 0.0, -1.0])
def test_sentences_are_contrasted_at_every_temperature(scale: float, alike: float) -> None:
    """Published runs start at 0.01 and may come down to 0.001: e^100 and e^-100 have no place in float32."""
    generator = torch.Generator().manual_seed(0)
    sentences, others = unit_norm(torch.randn(2, 2, 4, 8, generator=generator))
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    context = alike * sentences if alike else others
    scaled = (scale * sentences).requires_grad_()
    loss = sentence_contrast(scaled, context, valid)
    loss.backward()
    logits = (scale * sentences[0, :3] @ context[0, :3].T).double()
    both = F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))
    torch.testing.assert_close(loss.double(), both / 4, rtol=1e-5, atol=1e-5)
    assert scaled.grad is not None
    assert scaled.grad.isfinite().all()
    assert not scaled.grad[1].any()


def test_reports_of_one_sentence_or_none_add_nothing_to_the_local_losses() -> None:
    one = small_prior(stage=1)(report_batch([[4]])).named
    assert one["loss/local_text"] == 0
    assert one["loss/local_image"] != 0
    for stage in (1, 2, 3):
        none = small_prior(stage=stage)(report_batch([[], []])).named
        for name in TERMS[stage] - {"loss/global", "loss/generated", "loss/image"}:
            assert none[name] == 0, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_neither_padding_nor_order_of_samples_matters(stage: int) -> None:
    batch = report_batch(REPORTS, length=16)
    short = rows_of(batch, 0, len(REPORTS))
    assert short.text.input_ids.shape[1] < 16
    model = small_prior(stage=stage)
    whole = model(batch).named
    flipped_text = type(batch.text)(*(value.flip(0) for value in batch.text.tensors().values()))
    flipped = type(batch)(batch.image.flip(0), flipped_text, batch.sample, batch.labels, batch.keys)
    for other in (short, flipped):
        for name, value in model(other).named.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5, msg=name)


def test_sentences_beyond_the_limits_take_no_part() -> None:
    reports = [[1] * 9, [1] * 8]
    first_four = report_batch(reports)
    beyond = first_four.text.sentence_index >= 4
    assert beyond.any()
    cut = report_batch(reports)
    cut.text.sentence_index[beyond] = -1
    for options in ({"stage": 3}, {"stage": 2, "max_sentences": 4}):
        model = small_prior(**options)
        torch.testing.assert_close(model(first_four).loss, model(cut).loss)
    model = small_prior(stage=2)
    assert abs(model(first_four).loss - model(cut).loss) > 1e-4


def test_weights_and_terms_add_up_and_zero_weights_cost_nothing() -> None:
    model = small_prior(global_weights=[0, 0, 3.0], score_weights=[0, 0, 0.5], image_weights=[0, 0, 0])
    assert model.alignment.objective.image_decoder is None
    terms = model(report_batch(REPORTS)).named
    assert "loss/image" not in terms
    factors = {
        "global": 3,
        "local_image": 1,
        "local_text": 1,
        "bank": 10,
        "sentence": 10,
        "score": 0.5,
        "generated": 1,
    }
    expected = sum(factor * terms[f"loss/{name}"] for name, factor in factors.items())
    torch.testing.assert_close(terms["loss"], expected)


def test_bank_and_local_text_alone() -> None:
    off = {
        f"{name}_weights": [0.0, 0.0, 0.0]
        for name in ("global", "local_image", "image", "sentence", "score", "generated")
    }
    model = small_prior(stage=2, **off)
    terms = model(report_batch(REPORTS)).named
    assert {name for name in terms if name.startswith("loss/")} == {"loss/local_text", "loss/bank"}
    terms["loss"].backward()
    without = {name for name, parameter in model.alignment.named_parameters() if parameter.grad is None}
    image_side = {"query1", "key2", "value2"}  # patches attend to sentences in the other losses only
    assert {name.split(".")[2] for name in without} == image_side
    with pytest.raises(NotImplementedError, match="global_weights"):
        model.encode_image(report_batch(REPORTS).image)


def test_phases_are_stages() -> None:
    config = small_prior_config()
    config.optimizer.phases = [PhaseConfig(epochs=1, lr=1e-4)] * 3
    model = build_method(config, VOCABULARY)
    batch = report_batch(REPORTS)
    for phase in (0, 1, 2):
        model.on_progress(Progress(phase, phase, 3, phase))
        assert set(model(batch).named) == TERMS[phase + 1] | METRICS
    without = small_prior(stage=2)
    without.on_progress(Progress(0, 0, 3, 2))
    assert set(without(batch).named) == TERMS[2] | METRICS


@pytest.mark.parametrize(
    ("schedule", "temperatures"),
    [
        ("fixed", [0.9, 0.9, 0.9]),
        ("linear", [0.9, 0.495, 0.09]),
        ("exponential", [0.9, 0.9 * 0.1**0.5, 0.09]),
    ],
)
def test_bank_temperature_and_stage_come_back_with_the_weights(
    schedule: str, temperatures: list[float]
) -> None:
    config = small_prior_config(bank_schedule=schedule)
    config.optimizer.phases = [PhaseConfig(epochs=1, lr=1e-4)] * 3
    model = build_method(config, VOCABULARY)
    for phase, expected in enumerate(temperatures):
        model.on_progress(Progress(0, 50 * phase, 100, phase))
        assert model.alignment.objective.temperature == pytest.approx(expected)
        loaded = build_method(config, VOCABULARY)
        assert loaded.alignment.objective.stage == 1
        loaded.load_state_dict(model.state_dict())
        assert loaded.alignment.objective.stage == phase + 1
        assert loaded.alignment.objective.temperature == pytest.approx(expected)


def test_noise_is_gumbel_drawn_from_the_default_generator_in_training_only() -> None:
    torch.manual_seed(3)
    noise = gumbel_noise((200_000,), torch.zeros(1))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)
    batch = report_batch(REPORTS)
    model = small_prior(stage=2, bank_noise="training")
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert torch.equal(model.encode_text(batch.text), model.encode_text(batch.text))
    always = small_prior(stage=2, bank_noise="always").eval()
    assert not torch.equal(always.encode_text(batch.text), always.encode_text(batch.text))


def test_training_lowers_the_loss_and_finds_the_pairs() -> None:
    model = small_prior(prototypes=24, temperature=0.1)
    batch = report_batch(REPORTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model(batch).named
    for _ in range(30):
        optimizer.zero_grad()
        terms = model(batch).named
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"] < 0.5 * first["loss"]
    for name in ("loss/global", "loss/image", "loss/bank", "loss/sentence"):
        assert terms[name] < first[name], name
    assert terms["retrieval/top1"] == 1


def test_embeddings_scores_and_maps() -> None:
    model = small_prior().eval()
    batch = report_batch(REPORTS)
    image, text = model.encode_image(batch.image), model.encode_text(batch.text)
    for embedding in (image, text):
        assert embedding.shape == (6, 16)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6))
    assert model.scores_by_embedding
    torch.testing.assert_close(model.score(batch.image, batch.text), image @ text.T)
    maps = model.ground(batch.image[:2], batch.text)
    assert maps.shape == (2, 6, *model.image_encoder.grid)
    assert ((maps > 0) & (maps < 1)).all()
    features, hidden = model.image_encoder(batch.image), model.text_encoder(batch.text)
    alignment = model.alignment
    sentences, valid = alignment._mixed_sentences(hidden, batch.text)
    alone = alignment.objective.cross_attention(alignment._patches(features)[1:2], sentences[3:4], valid[3:4])
    expected = alone.text_weights[0][valid[3]].mean(0)
    torch.testing.assert_close(maps[1, 3].flatten(), expected)


def test_official_scores() -> None:
    model = small_prior(**{**OFFICIAL, "bank_noise": "never"}).eval()
    assert not model.scores_by_embedding
    batch, prompts = report_batch(REPORTS), report_batch([[3], [5], [2]], seed=1).text
    scores = model.score(batch.image, prompts)
    torch.testing.assert_close(scores.sum(1), torch.full((6,), 1.5))
    alignment = model.alignment
    cosine = model.encode_image(batch.image) @ model.encode_text(prompts).T
    scaled = alignment.objective.scale.log_scale.item() * cosine
    rest = 2 * (scores - scaled.softmax(1))
    torch.testing.assert_close(rest.sum(1), torch.ones(6))
    assert rest.std() > 0
    ends = prompts.attention_mask.sum(1) - 1
    changed = prompts.input_ids.clone()
    changed[torch.arange(3), ends] = 7
    assert not torch.allclose(
        model.score(batch.image, type(prompts)(changed, *list(prompts.tensors().values())[1:])), scores
    )
    with pytest.raises(NotImplementedError, match="official_view"):
        model.ground(batch.image, prompts)


def test_maps_need_the_attention_that_sentences_train() -> None:
    batch = report_batch(REPORTS)
    model = small_prior(local_text_weights=[0.0, 0.0, 0.0])
    assert not model.grounds
    with pytest.raises(NotImplementedError, match="local_text_weights"):
        model.ground(batch.image, batch.text)
    assert small_prior().grounds


def test_reconstruction_at_another_size_is_of_the_same_image() -> None:
    batch = report_batch(REPORTS)
    target = small_prior(reconstruction_size=16).alignment._target(batch.image)
    blocks = (batch.image.double() / 255).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(target.double(), (blocks - 0.5) / 0.5, rtol=1e-5, atol=1e-5)
    assert small_prior(reconstruction_size=16)(batch).terms["loss/image"].isfinite()


def test_batch_norm_heads_spread_what_random_encoders_give() -> None:
    batch = report_batch(REPORTS)
    similar = {}
    for norm in ("none", "batch"):
        model = small_prior(head_norm=norm)
        model(batch).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        for _ in range(30):
            model(batch)  # running averages
        images = model.eval().encode_image(batch.image)
        similar[norm] = (images @ images.T).mean()
    assert similar["none"] > 0.8
    assert similar["batch"] < 0.5


def test_losses_in_the_corners() -> None:
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    assert (simsiam(zero, zero, zero, zero) == 0).all()
    same = torch.randn(2, 3, 4)
    torch.testing.assert_close(simsiam(same, same, same, same), -torch.ones(2, 3))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss = sentence_contrast(zero, zero, nothing) + masked_mean(zero.sum(2), nothing)
    assert loss == 0
    loss.backward()
    assert (zero.grad == 0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"global_weights": [1.0]}, ConfigError, r"method\.global_weights"),
        ({"stage": 1, **{f"{n}_weights": [0, 1, 1] for n in ("global", "local_image", "local_text")}},
         ConfigError, "no loss"),
        ({"pool_heads": 3}, ConfigError, r"method\.pool_heads=3"),
        ({"decoder_heads": 3}, ConfigError, r"method\.decoder_heads=3"),
        ({"image_decoder_width": 2}, EncoderError, r"method\.image_decoder_width=2"),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_prior(**options)


def test_kmeans_starts_the_bank_from_sentences() -> None:
    assert "prior" in schemas()
    method = small_prior()
    batches = [report_batch([[3, 2], [4], [2, 2, 2], []], seed=seed) for seed in range(3)]
    config = PrototypesConfig(init="kmeans", init_samples=12, iterations=5)
    (clusters,) = initialise_prototypes(method, lambda: batches, config, seed=0)
    assert clusters.counts.sum() == 3 * 6  # sentences, not slots
    weight = method.alignment.objective.bank.weight
    (user,) = method.prototype_users
    (features,) = user.prototype_features(user.prototype_encodings(method, batches[0]), batches[0])
    lengths = features.norm(dim=2)
    assert (lengths > 0).sum() == 6
    torch.testing.assert_close(weight.norm(dim=1), weight.norm(dim=1)[:1].expand(len(weight)))
    assert weight.norm(dim=1)[0].item() == pytest.approx(lengths[lengths > 0].mean().item(), rel=0.2)
    torch.testing.assert_close(unit_norm(weight), clusters.centroids)


def test_the_bank_as_an_auxiliary_loss() -> None:
    """bank_stage 4: embeddings come from the sentences themselves, and the bank's term is there too."""
    batch = report_batch([[3, 2], [4], [2, 2, 2]])
    mixed, raw = small_prior(stage=2), small_prior(stage=2, bank_stage=4)
    raw.load_state_dict(mixed.state_dict())
    without = small_prior(stage=2, bank_stage=4, bank_weights=[0.0, 0.0, 0.0])
    without.load_state_dict(mixed.state_dict(), strict=False)
    terms = raw(batch).named
    torch.testing.assert_close(terms["loss/bank"], mixed(batch).terms["loss/bank"])
    torch.testing.assert_close(terms["loss/global"], without(batch).terms["loss/global"])
    mixed.eval(), raw.eval(), without.eval()
    torch.testing.assert_close(raw.encode_text(batch.text), without.encode_text(batch.text))
    assert not torch.allclose(raw.encode_text(batch.text), mixed.encode_text(batch.text))


@pytest.mark.parametrize("noise", ["never", "training"])
def test_a_detached_bank_follows_the_sentences_and_does_not_move_them(noise: str) -> None:
    batch = report_batch([[3, 2], [4], [2, 2, 2]])
    gradients, losses = [], []
    for detached in (False, True):
        method = small_prior(stage=2, bank_stage=4, bank_detached=detached, bank_noise=noise)
        torch.manual_seed(1)
        loss = method(batch).terms["loss/bank"]
        loss.backward()
        losses.append(loss.item())
        sentences = method.alignment.sentence_projection.linear.weight.grad
        gradients.append((method.alignment.objective.bank.weight.grad, sentences))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "the value is the same, with the same noise"
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert gradients[0][1].abs().sum() > 0
    assert gradients[1][1] is None or not gradients[1][1].any()


def test_kmeans_needs_a_bank() -> None:
    config = small_prior_config(stage=1)
    config.prototypes.init = "kmeans"
    with pytest.raises(ConfigError, match=r"prototypes\.init=random"):
        build_method(config, VOCABULARY)
