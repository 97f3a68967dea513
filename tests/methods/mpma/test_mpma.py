"""MPMA as a whole: corners, precisions, masks, ablations, training, embeddings, errors."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config_files import ConfigError
from medvlp.data.batch import Batch, Text
from medvlp.encoders.backbones import EncoderError
from medvlp.losses.normalise import unit_norm
from medvlp.methods.base import Progress
from medvlp.methods.mpma.alignment import LearnedTemperature
from medvlp.methods.mpma.masking import is_word, scored_positions
from medvlp.methods.mpma.method import MPMA
from medvlp.methods.registry import build_method
from tests.methods.small_mgca import VOCABULARY, rows_of, small_batch
from tests.methods.small_mpma import small_config, small_mpma

LOSSES = {"loss/image", "loss/report", "loss/global", "loss/local"}
METRICS = {"report/accuracy", "retrieval/top1", "retrieval/top5", "alignment/temperature"}
ABLATIONS: list[dict[str, Any]] = [
    {},
    {"masking": "separate", "decoder_reads_report": True, "head": "mlp"},
    {"memory": "retrieval", "summary": "mean", "tie_words": True},
    {"memory": "none", "fixed_positions": False, "normalise_pixels": False},
]


def changed(batch: Batch, **text: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, text=dataclasses.replace(batch.text, **text))


@settings(max_examples=12)
@given(
    words=st.lists(st.sampled_from([-1, 0, 1, 2, 5, 10]), min_size=1, max_size=4),
    ablation=st.sampled_from(ABLATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ratio=st.sampled_from([0.1, 0.5, 0.99]),
)
def test_any_batch_gives_finite_loss_and_gradients(
    words: list[int], ablation: dict[str, Any], dtype: torch.dtype, ratio: float
) -> None:
    ratios = {"image_mask_ratio": ratio, "text_mask_ratio": ratio}
    model = small_mpma(**ablation, **ratios).to(dtype)
    batch = small_batch(words)
    before = copy.deepcopy(batch)
    terms = model(batch).named
    assert set(terms) == {"loss"} | LOSSES | METRICS
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert terms["loss"].dtype == torch.float32
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
        # As in MGCA: equal reports leave only rounding to the batch norms, which multiply its gradient by
        # more than fp16 holds. The engine skips such a step.
        exempt = dtype == torch.float16 and model.config.head == "batch_norm"
        assert parameter.grad is None or parameter.grad.isfinite().all() or exempt, name
    assert torch.equal(batch.image, before.image)
    for name, value in before.text.tensors().items():
        assert torch.equal(batch.text.tensors()[name], value)


def test_masks_have_the_exact_share_and_change_with_the_step() -> None:
    model = small_mpma()
    batch = small_batch([4, 8, 1, 6])
    masks = model.draw_masks(batch)
    assert masks.patches.visible.shape == (4, 4)
    assert masks.patches.hidden.shape == (4, 12)
    for row, words in enumerate([4, 8, 1, 6]):
        hidden = batch.text.word_index[row][masks.words[row]].unique()
        assert len(hidden) == words // 2, "the only word of a report stays visible"
    assert not (masks.words & ~is_word(batch.text)).any()
    again = model.draw_masks(rows_of(batch, 1, 3))
    assert torch.equal(again.patches.visible, masks.patches.visible[1:3])
    model.on_progress(Progress(0, 1, 10))
    assert not torch.equal(model.draw_masks(batch).patches.visible, masks.patches.visible)
    other = build_method(dataclasses.replace(small_config(), train=dataclasses.replace(
        small_config().train, seed=1)), VOCABULARY)  # fmt: skip
    assert not torch.equal(other.draw_masks(batch).patches.visible, masks.patches.visible)


def count_calls(model: MPMA, batch: Batch) -> list[str]:
    """Which encodings a forward pass makes."""
    calls = []

    def note(name: str, key: str) -> Any:
        return lambda _, args, kwargs: calls.append(f"{name} {'masked' if key in kwargs else 'whole'}")

    handles = [
        model.image_encoder.register_forward_pre_hook(note("image", "visible"), with_kwargs=True),
        model.text_encoder.register_forward_pre_hook(note("text", "hidden"), with_kwargs=True),
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    return sorted(calls)


def test_one_masked_pair_serves_every_task() -> None:
    batch = small_batch([3, 7])
    assert count_calls(small_mpma(), batch) == ["image masked", "text masked"]
    separate = count_calls(small_mpma(masking="separate"), batch)
    assert separate == ["image masked", "image whole", "text masked", "text whole"]
    alone = {"masking": "separate", "global_weight": 0.0, "local_weight": 0.0, "report_weight": 0.0}
    assert count_calls(small_mpma(**alone), batch) == ["image masked"]


def test_hidden_words_and_patches_are_seen_by_no_task() -> None:
    model = small_mpma().eval()
    batch = small_batch([6, 8])
    masks = model.draw_masks(batch)
    terms = model(batch).named
    other = changed(batch, input_ids=batch.text.input_ids.masked_fill(masks.words, 5))
    for name in ("loss/image", "loss/global", "loss/local"):
        torch.testing.assert_close(model(other).terms[name], terms[name])
    assert (model(other).terms["loss/report"] - terms["loss/report"]).abs() > 1e-4
    image = batch.image.clone()
    for row in range(2):
        for patch in masks.patches.hidden[row].tolist():
            y, x = 8 * (patch // 4), 8 * (patch % 4)
            image[row, :, y : y + 8, x : x + 8] = image[row, :, y : y + 8, x : x + 8].flip(-1)
    found = model(dataclasses.replace(batch, image=image)).named
    for name in ("loss/report", "loss/global", "loss/local"):
        torch.testing.assert_close(found[name], terms[name])
    assert (found["loss/image"] - terms["loss/image"]).abs() > 1e-4


def test_visible_words_and_patches_are_no_targets() -> None:
    model = small_mpma(masking="separate", global_weight=0.0, local_weight=0.0).eval()
    batch = small_batch([6, 8])
    masks = model.draw_masks(batch)
    model.zero_grad()
    logits = []
    model.report_head.register_forward_hook(lambda _, inputs, output: logits.append(output))
    terms = model(batch).named
    logits[0].retain_grad()
    terms["loss/report"].backward()
    places, _ = scored_positions(batch.text, masks.words, model.config.text_mask_ratio)
    hidden = masks.words.flatten()[places]
    assert hidden.sum() == masks.words.sum()
    assert (logits[0].grad[~hidden] == 0).all()
    assert (logits[0].grad[hidden].abs().sum(1) > 0).all()


def test_the_report_is_reconstructed_from_the_image() -> None:
    model = small_mpma().eval()
    batch = small_batch([6, 8])
    terms = model(batch).named
    swapped = model(dataclasses.replace(batch, image=batch.image.flip(0))).named
    assert (swapped["loss/report"] - terms["loss/report"]).abs() > 1e-5
    plain, reading = small_mpma(), small_mpma(decoder_reads_report=True)
    other = changed(batch, input_ids=batch.text.input_ids.flip(0))
    assert plain(other).terms["loss/image"] == plain(batch).terms["loss/image"]
    assert (reading(other).terms["loss/image"] - reading(batch).terms["loss/image"]).abs() > 1e-6


def test_terms_add_up_and_weightless_ones_are_left_out() -> None:
    weights = {"image_weight": 0.5, "report_weight": 2.0, "global_weight": 3.0, "local_weight": 0.25}
    batch = small_batch([3, 4, 5])
    terms = small_mpma(**weights)(batch).named
    expected = sum(weights[f"{name}_weight"] * terms[f"loss/{name}"] for name in
                   ("image", "report", "global", "local"))  # fmt: skip
    torch.testing.assert_close(terms["loss"], expected)
    for name in ("image", "report", "global", "local"):
        model = small_mpma(**{f"{name}_weight": 0.0})
        terms = model(batch).named
        assert LOSSES - set(terms) == {f"loss/{name}"}
        terms["loss"].backward()
        unused = [
            key for key, value in model.named_parameters() if value.requires_grad and value.grad is None
        ]
        assert not unused, unused


def slow_local_loss(patches: torch.Tensor, words: torch.Tensor) -> float:
    """The local loss of one pair from its definition; [P, E] and [W, E], both unit norm."""

    def one_way(queries: torch.Tensor, keys: torch.Tensor) -> float:
        contexts = []
        for query in queries:
            weights = torch.stack([(query @ key / 0.1).exp() for key in keys])
            summed = sum(w * key for w, key in zip(weights / weights.sum(), keys, strict=True))
            contexts.append(summed / summed.norm())
        total = 0.0
        for own, query in enumerate(queries):
            forward = torch.stack([query @ context / 0.1 for context in contexts])
            backward = torch.stack([other @ contexts[own] / 0.1 for other in queries])
            for logits in (forward, backward):
                total -= 0.5 * float(logits.log_softmax(0)[own])
        return total / len(queries)

    return 0.5 * (one_way(words, patches) + one_way(patches, words))


@torch.no_grad()
def test_alignment_losses_from_their_definition() -> None:
    model = small_mpma().double().eval()
    batch = small_batch([4, 7, 1])
    masks = model.draw_masks(batch)
    terms = model(batch).named
    image = model.image_encoder(batch.image, visible=masks.patches.visible)
    hidden = model.text_encoder(batch.text, hidden=masks.words).hidden
    seen = is_word(batch.text) & ~masks.words
    patches = model.alignment.embed_patches(image)
    tokens = model.alignment.embed_words(hidden)
    local = 0.0
    for row in range(3):
        if seen[row].any():
            local += slow_local_loss(patches[row], tokens[row][seen[row]])
    assert seen[2].any(), "the only word of the last report stays visible"
    assert terms["loss/local"].item() == pytest.approx(local / 3)
    images, reports = model.alignment.embed_image(image), model.alignment.embed_report(hidden, seen)
    scores = images @ reports.T / 0.07
    expected = 0.5 * sum(
        -float(row[own] - row.exp().sum().log()) / 3
        for matrix in (scores, scores.T)
        for own, row in enumerate(matrix)
    )
    assert terms["loss/global"].item() == pytest.approx(expected, rel=1e-6)


def test_temperature_stays_in_its_bounds_and_can_come_back() -> None:
    temperature = LearnedTemperature(0.07, 0.01, 0.5)
    torch.testing.assert_close(temperature().item(), 0.07, rtol=1e-5, atol=0.0)
    for sign, bound in ((1, 0.01), (-1, 0.5), (1, 0.01)):
        optimizer = torch.optim.Adam(temperature.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            (sign * temperature()).backward()
            optimizer.step()
        assert 0.01 <= temperature().item() <= 0.5
        assert temperature().item() == pytest.approx(bound, rel=0.25)


def test_loss_does_not_depend_on_order_or_padding() -> None:
    batch = small_batch([3, 7, 1, 5], length=16)
    whole = small_mpma()(batch).named
    short = rows_of(batch, 0, 4)
    assert short.text.input_ids.shape[1] < 16
    turned = Text(*(value.flip(0) for value in short.text.tensors().values()))
    flipped = Batch(short.image.flip(0), turned, short.sample.flip(0), short.labels, short.keys)
    for name, value in small_mpma()(flipped).named.items():
        torch.testing.assert_close(value, whole[name], msg=name)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_training_lowers_every_loss(ablation: dict[str, Any]) -> None:
    model = small_mpma(**ablation)
    batch = small_batch([3, 7, 1, 5, 2, 6])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(25):
        optimizer.zero_grad()
        terms = model(batch).named
        terms["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    for name in LOSSES:
        assert history[-1][name] < history[0][name], name
    if model.config.head == "batch_norm":
        assert history[-1]["retrieval/top1"] > 0.8


@torch.no_grad()
def test_embeddings_scores_and_maps() -> None:
    model = small_mpma().eval()
    batch = small_batch([3, 7, 1])
    image, text = model.encode_image(batch.image), model.encode_text(batch.text)
    for embedding in (image, text):
        assert embedding.shape == (3, 8)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.score(batch.image, batch.text), image @ text.T)
    torch.testing.assert_close(model.image_features(batch.image), model.image_encoder(batch.image).pooled)
    torch.testing.assert_close(model.encode_text(rows_of(batch, 0, 3).text), text)
    model.on_progress(Progress(0, 5, 9))
    torch.testing.assert_close(model.encode_image(batch.image), image)
    maps = model.ground(batch.image, rows_of(batch, 0, 2).text)
    assert maps.shape == (3, 2, 4, 4)
    patches = model.alignment.embed_patches(model.image_encoder(batch.image))
    words = model.alignment.embed_words(model.text_encoder(batch.text).hidden)[1, 1:-1]
    words = words[is_word(batch.text)[1, 1:-1]]
    torch.testing.assert_close(maps[2, 1, 1, 3], (words @ patches[2, 7]).mean())
    rows = torch.arange(3)
    fused = model.eval().fused_features(batch.image, batch.text, rows)
    assert fused.shape == (3, 32)
    other = model.fused_features(batch.image[[2, 0]], batch.text, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(other[2], model.fused_features(batch.image[2:], batch.text, 0 * rows)[2])
    assert not torch.allclose(other[1], fused[1])


def test_missing_parts_say_so() -> None:
    batch = small_batch([3, 7])
    model = small_mpma(global_weight=0.0)
    assert not model.embeds_reports
    with pytest.raises(NotImplementedError, match="global_weight"):
        model.encode_image(batch.image)
    with pytest.raises(NotImplementedError, match="local_weight"):
        small_mpma(local_weight=0.0).ground(batch.image, batch.text)
    with pytest.raises(NotImplementedError, match="report_weight"):
        small_mpma(report_weight=0.0).fused_features(batch.image, batch.text, torch.arange(3))


def test_errors_at_build_time() -> None:
    with pytest.raises(ConfigError, match="all 0"):
        small_mpma(image_weight=0.0, report_weight=0.0, global_weight=0.0, local_weight=0.0)
    with pytest.raises(ConfigError, match=r"temperature=0\.7"):
        small_mpma(temperature=0.7)
    config = small_config()
    config.image = dataclasses.replace(config.image, name="resnet10t", options={})
    with pytest.raises(EncoderError, match="resnet10t"):
        build_method(config, VOCABULARY)
    config = small_config(tie_words=True)
    config.text.model_type = "electra"
    config.text.options = {**config.text.options, "embedding_size": 12}
    with pytest.raises(EncoderError, match="tie_words"):
        build_method(config, VOCABULARY)


def test_the_temperature_does_not_decay() -> None:
    assert small_mpma().parameters_without_decay() == {"alignment.temperature.position"}


@pytest.mark.parametrize("head", ["mlp", "batch_norm"])
def test_fp16_gradients_are_finite(head: str) -> None:
    model = small_mpma(head=head).half()
    model(small_batch([3, 7, 1, 5])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_projected_tokens_are_averaged() -> None:
    batch = small_batch([3, 7, 4, 5])
    for head in ("mlp", "batch_norm"):
        first, after = (
            small_mpma(summary="mean", head=head, project_first=True),
            small_mpma(summary="mean", head=head),
        )
        after.load_state_dict(first.state_dict())
        assert abs(first(batch).loss - after(batch).loss).item() > 1e-5
        first.eval()
        image = first.image_encoder(batch.image)
        expected = unit_norm(first.alignment.image_head(image.local).mean(1))
        torch.testing.assert_close(first.encode_image(batch.image), expected)
    with pytest.raises(ConfigError, match=r"method\.summary=mean"):
        small_mpma(project_first=True)


def test_words_are_filled_in_from_what_is_seen() -> None:
    """The report's own tokens elsewhere; at hidden places what image and other words say."""
    model = small_mpma().eval()
    batch = small_batch([4, 8, 6])
    words = is_word(batch.text)
    hidden = words & (batch.text.word_index % 2 == 1)
    with torch.no_grad():
        filled = model.fill_words(batch.image, batch.text, hidden)
        assert torch.equal(filled[~hidden], batch.text.input_ids[~hidden])
        other = batch.text.input_ids.clone()
        other[hidden] = (other[hidden] + 1) % VOCABULARY
        said = model.fill_words(batch.image, changed(batch, input_ids=other).text, hidden)
        assert torch.equal(said[hidden], filled[hidden]), "a hidden word is not seen"
        logits: list[torch.Tensor] = []
        model.report_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
        model.fill_words(batch.image, batch.text, hidden)
        model.fill_words(255 - batch.image, batch.text, hidden)
    assert not torch.allclose(logits[0], logits[1]), "the image is seen"
    assert logits[0].shape == (hidden.sum(), VOCABULARY), "no logits but those of hidden places"


def test_without_reconstruction_no_words_are_filled_in() -> None:
    model = small_mpma(report_weight=0.0)
    assert not model.fills_words
    batch = small_batch([4, 8])
    with pytest.raises(NotImplementedError, match="report_weight=0"):
        model.fill_words(batch.image, batch.text, is_word(batch.text))
