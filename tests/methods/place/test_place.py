"""PLACE as a whole: corners, precisions, options, embeddings, scores, maps, errors."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config_files import ConfigError, load
from medvlp.methods.base import Progress
from medvlp.methods.place.config import PLACEConfig
from medvlp.methods.place.losses import Sentences, observation_terms
from medvlp.methods.registry import build_method, schemas
from tests.methods.small_mgca import VOCABULARY, rows_of
from tests.methods.small_place import report_batch, small_place

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
REPORTS = [[3, 2, 4], [1], [2, 2, 1, 1], [5, 1]]
EVERYTHING: dict[str, Any] = {
    "token_weight": 0.5,
    "report_pool": "attention",
    "correlation_target": "teacher",
    "correlation_layers": 2,
    "huber_delta": 0.1,
    "patch_drop": 0.5,
}
#: Options that change the loss of one batch, and what makes them visible.
VARIANTS: dict[str, dict[str, Any]] = {
    "matching": {"matching": "soft"},
    "scope": {"negative_scope": "report"},
    "features": {"false_negatives": "features", "false_negative_threshold": -1.0},
    "sentences": {"max_sentences": 2},
    "pool": {"report_pool": "attention"},
    "teacher": {"correlation_target": "teacher"},
    "huber": {"huber_delta": 0.1},
    "drop": {"patch_drop": 0.5},
    "tokens": {"token_weight": 1.0},
    "diversity": {"diversity_weight": 1.0},
    "positions": {"patch_positions": False},
    "temperature": {"observation_temperature": 0.3},
}


def hard_place(image: str = "vit", **method: Any) -> Any:
    """A small PLACE past its epochs of soft matching."""
    model = small_place(image, **method)
    model.on_progress(Progress(1, 10, 20))
    return model


@settings(max_examples=20)
@given(
    reports=st.lists(
        st.sampled_from([[], [1], [4], [1, 1, 2], [2, 1, 1, 1, 1, 1, 2]]), min_size=1, max_size=4
    ),
    options=st.sampled_from([{}, EVERYTHING, {"negative_scope": "report", "matching": "soft"}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    image=st.sampled_from(["vit", "resnet"]),
    epoch=st.integers(0, 1),
    flat=st.booleans(),
)
def test_any_batch_gives_finite_loss_and_gradients(
    reports: list[list[int]],
    options: dict[str, Any],
    dtype: torch.dtype,
    image: str,
    epoch: int,
    flat: bool,
) -> None:
    model = small_place(image, **options).to(dtype)
    model.on_progress(Progress(epoch, epoch, 2))
    batch = report_batch(reports)
    if flat:
        batch.image.zero_()
    before = copy.deepcopy(batch)
    terms = model(batch).named
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert terms["loss"].dtype == torch.float32
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # As in MGCA: equal rows leave only rounding to two batch norms, whose gradient can exceed fp16.
        assert parameter.grad.isfinite().all() or dtype == torch.float16, name
    for name, value in before.text.tensors().items():
        assert torch.equal(value, batch.text.tensors()[name])
    assert torch.equal(before.image, batch.image)


@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_fp16_gradients_are_finite(image: str) -> None:
    model = hard_place(image).half()
    model(report_batch(REPORTS)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_changes_the_loss(variant: str) -> None:
    batch = report_batch(REPORTS)
    plain, changed = hard_place(), hard_place(**VARIANTS[variant])
    shared = plain.state_dict()
    changed.load_state_dict({name: shared.get(name, value) for name, value in changed.state_dict().items()})
    if variant == "pool":
        torch.manual_seed(1)
        changed.alignment.report_pool.score.weight.data.normal_()
    assert abs(plain(batch).loss.item() - changed(batch).loss.item()) > 1e-5


def test_soft_matching_in_the_first_epochs_only() -> None:
    batch = report_batch(REPORTS)
    model, soft = small_place(soft_epochs=2), hard_place(matching="soft")
    losses = []
    for epoch in (0, 1, 2):
        model.on_progress(Progress(epoch, epoch, 3))
        losses.append(model(batch).terms["loss/observation"].item())
    assert losses[0] == losses[1] == pytest.approx(soft(batch).terms["loss/observation"].item())
    assert abs(losses[2] - losses[0]) > 1e-4
    assert losses[2] == pytest.approx(hard_place()(batch).terms["loss/observation"].item())


def test_metrics_of_observations() -> None:
    number = torch.tensor([[0, 1], [0, 2]])
    sentences = Sentences(torch.eye(4)[number], torch.tensor([[True, True], [True, False]]), number)
    # Three pairs exist; two of the six (anchor, other) pairs say the same.
    terms = observation_terms(torch.eye(4).expand(2, 4, 4), sentences, False, PLACEConfig())
    assert terms["observation/similarity"] == 1
    assert terms["observation/excluded"].item() == pytest.approx(2 / 6)
    kept = PLACEConfig(false_negatives="keep")
    terms = observation_terms(torch.eye(4).expand(2, 4, 4), sentences, False, kept)
    assert terms["observation/excluded"] == 0


@pytest.mark.parametrize("false_negatives", ["tokens", "features"])
@pytest.mark.parametrize("soft", [True, False])
def test_a_collapse_of_all_sentences_does_not_end_the_loss(soft: bool, false_negatives: str) -> None:
    """Equal outputs of the heads, and even of the encoder, are at chance, not at 0."""
    one = torch.eye(4)[:1].expand(3, 4, 4).clone().requires_grad_()
    sentences = Sentences(one, torch.ones(3, 4, dtype=torch.bool), torch.arange(12).view(3, 4), one.detach())
    config = PLACEConfig(false_negatives=false_negatives)
    terms = observation_terms(one, sentences, soft, config)
    assert terms["loss/observation"].item() == pytest.approx(math.log(12))
    assert terms["observation/excluded"] == 0


def test_the_same_sentence_is_no_negative_whatever_the_heads_say() -> None:
    batch = report_batch([[3], [3], [3]])
    batch.text.input_ids[1] = batch.text.input_ids[0]
    model = hard_place()
    assert model(batch).terms["observation/excluded"].item() == pytest.approx(2 / 6)
    other = dataclasses.replace(batch.text, input_ids=batch.text.input_ids.clone())
    other.input_ids[1, 1:4] = other.input_ids[0, 1:4].flip(0)
    found = model(dataclasses.replace(batch, text=other)).terms["observation/excluded"]
    assert found == 0, "other words, or the same in another order"


def test_the_report_shuffled_is_the_control_of_the_correlations() -> None:
    """Same dropped patches, another report; where no report says anything else both losses agree."""
    model = hard_place(patch_drop=0.5)
    terms = model(report_batch(REPORTS)).terms
    assert not terms["correlation/shuffled"].requires_grad
    assert abs(terms["loss/correlation"] - terms["correlation/shuffled"]).item() > 1e-6
    same = report_batch([[2, 1]] * 3)
    same.text.input_ids[:] = same.text.input_ids[:1]
    terms = model(same).terms
    torch.testing.assert_close(terms["loss/correlation"].detach(), terms["correlation/shuffled"])
    assert "correlation/shuffled" not in model(report_batch([[3]])).terms


def test_weights_and_terms_add_up() -> None:
    weights = {"instance": 2.0, "observation": 0.5, "diversity": 0.3, "correlation": 3.0, "token": 0.25}
    model = hard_place(**{f"{name}_weight": value for name, value in weights.items()})
    terms = model(report_batch(REPORTS)).named
    token = weights.pop("token")
    expected = sum(value * terms[f"loss/{name}"] for name, value in weights.items())
    expected = expected + token * (terms["loss/word"] + terms["loss/patch"])
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("left", ["instance", "observation", "correlation", "token"])
def test_terms_without_weight_do_not_exist(left: str) -> None:
    weights = dict.fromkeys(("instance", "observation", "correlation", "token"), 0.0) | {left: 1.0}
    model = hard_place(**{f"{name}_weight": value for name, value in weights.items()}, diversity_weight=0.0)
    terms = model(report_batch(REPORTS)).named
    expected = {"loss/word", "loss/patch"} if left == "token" else {f"loss/{left}"}
    assert {name for name in terms if name.startswith("loss/")} == expected
    names = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("alignment.")}
    own = {
        "instance": set(),
        "observation": {"extractor", "observation_head", "sentence_head"},
        "correlation": {"correlation"},
        "token": {"patch_head", "word_head"},
    }[left]
    assert names == {"image_head", "report_head"} | own


def test_loss_depends_neither_on_padding_nor_on_the_order_of_samples() -> None:
    batch = report_batch(REPORTS, length=16)
    short = rows_of(batch, 0, 4)
    assert short.text.input_ids.shape[1] < 16
    options = {"token_weight": 1.0}
    whole = hard_place(**options)(batch).named
    for name, value in hard_place(**options)(short).named.items():
        torch.testing.assert_close(value, whole[name], msg=name, rtol=1e-4, atol=1e-5)
    text = type(batch.text)(*(value.flip(0) for value in batch.text.tensors().values()))
    flipped = type(batch)(batch.image.flip(0), text, batch.sample.flip(0), batch.labels, batch.keys)
    for name, value in hard_place(**options)(flipped).named.items():
        torch.testing.assert_close(value, whole[name], msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"negative_scope": "report"}], ids=["", "all", "report"])
def test_training_lowers_every_loss(options: dict[str, Any]) -> None:
    model = small_place(**options)
    batch = report_batch([*REPORTS, [2, 5], [6]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for step in range(50):
        model.on_progress(Progress(step // 25, step, 50))
        optimizer.zero_grad()
        terms = model(batch).named
        terms["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    for name in ("loss/instance", "loss/observation"):
        assert history[-1][name] < 0.6 * history[0][name], name
    last = sum(terms["loss/correlation"] for terms in history[-5:]) / 5
    assert last < 0.8 * history[0]["loss/correlation"]
    assert history[-1]["retrieval/top1"] == 1


def test_embeddings_scores_and_maps() -> None:
    model = small_place().eval()
    batch = report_batch(REPORTS)
    image, text = model.encode_image(batch.image), model.encode_text(batch.text)
    for embedding in (image, text):
        assert embedding.shape == (4, 8)
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    assert model.scores_by_embedding
    torch.testing.assert_close(model.score(batch.image, batch.text), image @ text.T)
    assert model.image_features(batch.image).shape == (4, 16)
    maps = model.ground(batch.image[:3], batch.text)
    assert maps.shape == (3, 4, 4, 4)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 4))
    assert (maps >= 0).all()


def test_maps_show_the_query_most_like_the_prompt() -> None:
    model = small_place().eval()
    alignment, batch = model.alignment, report_batch([[3], [2, 2]])
    with torch.no_grad():
        image, text = model.image_encoder(batch.image), model.text_encoder(batch.text)
        found = alignment.extractor(image.local, image.grid, attention=True)
        observations = alignment._observations(found.features)
        sentences, valid = alignment._sentences(text, batch.text)
        maps = alignment.ground(image, text, batch.text)
    for row in range(2):
        for prompt in range(2):
            mean = sentences[prompt][valid[prompt]].mean(0)
            best = max(range(4), key=lambda query: float(observations[row, query] @ mean))
            torch.testing.assert_close(maps[row, prompt], found.attention[row, best])


def test_patch_maps_and_observation_scores() -> None:
    batch = report_batch(REPORTS)
    model = small_place("resnet", token_weight=1.0, grounding="patch").eval()
    maps = model.ground(batch.image, batch.text)
    assert maps.shape == (4, 4, 2, 2)
    assert maps.abs().max() <= 1.0001
    assert maps.std() > 1e-3
    model = small_place(observation_score=0.5).eval()
    assert not model.scores_by_embedding
    with torch.no_grad():
        scores = model.score(batch.image, batch.text)
        added = scores - model.encode_image(batch.image) @ model.encode_text(batch.text).T
        image, text = model.image_encoder(batch.image), model.text_encoder(batch.text)
        found = model.alignment._observations(model.alignment.extractor(image.local, image.grid).features)
        sentences, valid = model.alignment._sentences(text, batch.text)
    for row in range(4):
        for prompt in range(4):
            best = [float((found[row] @ s).max()) for s in sentences[prompt][valid[prompt]]]
            assert added[row, prompt].item() == pytest.approx(0.5 * sum(best) / len(best), abs=1e-5)


def test_prompts_of_nothing_but_padding_score_and_ground() -> None:
    model = small_place(observation_score=1.0).eval()
    batch = report_batch([[], [2]])
    assert model.score(batch.image, batch.text).isfinite().all()
    assert model.ground(batch.image, batch.text).isfinite().all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"instance_weight": 0, "observation_weight": 0, "correlation_weight": 0}, "no loss"),
        ({"observation_score": 1.0, "observation_weight": 0}, "observation_score"),
        ({"grounding": "patch"}, "grounding"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        small_place(**options)


def test_no_map_without_observations() -> None:
    model, batch = small_place(observation_weight=0), report_batch([[1]])
    with pytest.raises(NotImplementedError):
        model.ground(batch.image, batch.text)


@pytest.mark.parametrize("image", ["vit_cpu", "resnet_cpu"])
def test_the_shipped_file_runs_with_small_models(image: str) -> None:
    files = [
        CONFIGS / name for name in ("methods/place.yaml", f"models/{image}.yaml", "models/bert_cpu.yaml")
    ]
    overrides = ["run.dir=/tmp/run", "data.root=/tmp/data", "data.image_size=32", "data.max_tokens=14"]
    config = load(files, [*overrides, "method.decoder_width=48"], schemas())
    model = build_method(config, VOCABULARY)
    terms = model(report_batch(REPORTS)).named
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
