"""MeDSLIP as a whole: corners, precisions, options, the text book, prompts, grounding, training, errors."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp.config_files import ConfigError, load
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder
from medvlp.losses.normalise import unit_norm
from medvlp.methods.medslip.config import MeDSLIPConfig
from medvlp.methods.medslip.losses import TextProjection
from medvlp.methods.medslip.modules import QueryDecoder
from medvlp.methods.registry import build_method, fields_of, schemas
from shards.entities.vocabulary import DESCRIPTIONS, OBSERVATIONS
from tests.methods.small_medslip import (
    MAX_TOKENS,
    random_matrix,
    small_batch,
    small_config,
    small_medslip,
    tokenizer,
)

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OFFICIAL = {
    "gate": "linear", "initialisation": "normal", "shared_norm": True, "negatives": "local",
    "batch_norm": "local", "prototype_normalise": False, "prototype_temperature": 1.0,
    "relation_scale": "one", "standardise_book": False,
}  # fmt: skip
TERMS = {
    "loss", "loss/existence_pathology", "loss/existence_anatomy", "loss/prototype_pathology",
    "loss/prototype_anatomy", "loss/relation",
}  # fmt: skip


@settings(max_examples=20)
@given(
    fill=st.lists(st.sampled_from(["random", -1, 0, 1]), min_size=1, max_size=3),
    official=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    image=st.sampled_from(["vit", "resnet"]),
)
def test_any_batch_gives_finite_loss_and_gradients(
    fill: list[str | int], official: bool, dtype: torch.dtype, image: str
) -> None:
    model = small_medslip(image, **(OFFICIAL if official else {})).to(dtype)
    matrix = random_matrix(len(fill))
    for row, value in enumerate(fill):
        if isinstance(value, int):
            matrix[row] = value
    batch, before = small_batch(matrix), matrix.clone()
    terms = model(batch).named
    assert torch.equal(matrix, before)
    assert set(terms) == TERMS
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    assert terms["loss"].dtype == torch.float32
    terms["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
            assert name.startswith("text_encoder."), name


def test_a_batch_without_entities_mentioned_trains_nothing() -> None:
    model = small_medslip()
    terms = model(small_batch(torch.full((2, 51, 75), -1, dtype=torch.int8))).named
    assert all(value == 0 for value in terms.values())
    terms["loss"].backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("option", [name for name in OFFICIAL if name not in ("negatives", "batch_norm")])
def test_every_published_choice_changes_the_loss(option: str) -> None:
    batch = small_batch(random_matrix(3))
    sound = small_medslip()(batch).loss
    if option == "shared_norm":
        model = small_medslip(shared_norm=True)
        assert model.anatomy_decoder.norm is model.pathology_decoder.norm
    else:
        assert (sound - small_medslip(**{option: OFFICIAL[option]})(batch).loss).abs() > 1e-4


def test_weights_and_terms_add_up_and_unweighted_terms_are_left_out() -> None:
    batch = small_batch(random_matrix(3))
    weights = {"existence_weight": 2.0, "prototype_weight": 0.5, "relation_weight": 3.0}
    terms = small_medslip(**weights)(batch).named
    expected = sum(
        weights[f"{name.split('/')[1].split('_')[0]}_weight"] * terms[name] for name in TERMS - {"loss"}
    )
    torch.testing.assert_close(terms["loss"], expected)
    for name in weights:
        found = set(small_medslip(**{name: 0.0})(batch).named)
        assert found == {term for term in TERMS if name.split("_")[0] not in term}


def test_training_lowers_the_loss_and_recognises_the_images() -> None:
    model = small_medslip("vit")
    text = copy.deepcopy(model.text_encoder.state_dict())
    matrix = torch.full((6, 51, 75), -1, dtype=torch.int8)
    effusion = OBSERVATIONS.index("effusion")
    matrix[:, 4, effusion] = torch.tensor([1, 1, 1, 0, 0, 0])
    batch = small_batch(matrix)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = model(batch).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    prompt = tokenizer().tokenize([[DESCRIPTIONS["effusion"]]], MAX_TOKENS)
    with torch.no_grad():
        scores = model.eval().score(batch.image, prompt)[:, 0]
    assert scores[:3].min() > 0.7 > 0.3 > scores[3:].max()
    assert all(torch.equal(value, text[name]) for name, value in model.text_encoder.state_dict().items())


def test_a_learned_relation_scale_starts_at_the_root_and_learns() -> None:
    batch = small_batch(random_matrix(3))
    fixed, learned = small_medslip(), small_medslip(relation_scale="learned")
    torch.testing.assert_close(fixed(batch).terms["loss/relation"], learned(batch).terms["loss/relation"])
    learned(batch).terms["loss/relation"].backward()
    assert learned.objective.relation_scale.logarithm.grad.abs() > 0


@torch.no_grad()
def test_a_prompt_that_repeats_a_description_is_its_row() -> None:
    model = small_medslip().eval()
    images = small_batch(random_matrix(2)).image
    numbers = [OBSERVATIONS.index(name) for name in ("effusion", "mass")]
    text = tokenizer().tokenize([[list(DESCRIPTIONS.values())[n]] for n in numbers], MAX_TOKENS)
    streams = model._image_streams(images).streams
    row = model._read(model.pathology_decoder, model.book.pathology, streams.pathology, attention=True)
    expected = model.objective.probability(row.features)[:, numbers]
    torch.testing.assert_close(model.score(images, text), expected)
    maps = model.ground(images, text)
    assert maps.shape == (2, 2, *model.image_encoder.grid)
    torch.testing.assert_close(maps.flatten(2), row.attention.mean(0)[:, numbers])
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 2))


@torch.no_grad()
def test_a_prompts_score_depends_on_no_other_prompt() -> None:
    model = small_medslip().eval()
    images = small_batch(random_matrix(2)).image
    sentences = [["A broken heart of the lung."], ["The pleura is clear."], ["normal"]]
    text = tokenizer().tokenize(sentences, MAX_TOKENS)
    together = model.score(images, text)
    assert together.shape == (2, 3)
    assert ((together > 0) & (together < 1)).all()
    for number, sentence in enumerate(sentences):
        alone = model.score(images, tokenizer().tokenize([sentence], MAX_TOKENS))
        torch.testing.assert_close(alone[:, 0], together[:, number])


@torch.no_grad()
def test_grounding_by_anatomy_weights_the_map_by_the_mean_anatomy_map() -> None:
    plain, fused = small_medslip().eval(), small_medslip(ground_by_anatomy=True).eval()
    images = small_batch(random_matrix(2)).image
    text = tokenizer().tokenize([["Calcium"]], MAX_TOKENS)
    streams = plain._image_streams(images).streams
    read = plain._read(plain.anatomy_decoder, plain.book.anatomy, streams.anatomy, attention=True)
    each = plain.ground(images, text).flatten(2)[:, :, None] * read.attention.mean(0)[:, None]
    torch.testing.assert_close(fused.ground(images, text).flatten(2), each.mean(2))


@torch.no_grad()
def test_context_queries_do_not_see_the_others() -> None:
    torch.manual_seed(0)
    decoder = QueryDecoder(8, 2, 2).eval()
    queries, tokens = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    alone = decoder(queries[:, :3], tokens).features
    torch.testing.assert_close(decoder(queries, tokens, context=3).features[:, :3], alone)
    assert (decoder(queries, tokens).features[:, :3] - alone).abs().max() > 1e-3


def test_the_book_is_saved_stays_float32_and_is_needed() -> None:
    model = small_medslip()
    state = model.state_dict()
    assert state["book.pathology"].shape == (75, 16)
    assert state["book.anatomy"].shape == (51, 16)
    # Standardised: rows of one vocabulary differ although the texts share most words.
    assert state["book.anatomy"].mean(0).abs().max() < 1e-5
    torch.testing.assert_close(state["book.anatomy"].square().mean(), torch.tensor(1.0))
    half = copy.deepcopy(model).bfloat16()
    assert half.book.pathology.dtype == torch.float32
    assert torch.equal(half.book.pathology, model.book.pathology)
    empty = build_method(small_config(), tokenizer().vocab_size)
    batch = small_batch(random_matrix(2))
    with pytest.raises(RuntimeError, match="prepare"):
        empty(batch)
    empty.load_state_dict(state)
    torch.testing.assert_close(empty.eval()(batch).loss, model.eval()(batch).loss)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_book_rows_do_not_depend_on_padding(pooling: str) -> None:
    model = small_medslip(text_pooling=pooling).eval()
    text = tokenizer().tokenize([[DESCRIPTIONS["mass"]]], MAX_TOKENS, pad_to_max=True)
    row = model.book.pathology[OBSERVATIONS.index("mass")]
    torch.testing.assert_close(model.book.look_up(model.text_encoder, text)[0], row, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_embeddings_and_features() -> None:
    model = small_medslip("resnet").eval()
    images = small_batch(random_matrix(2)).image
    embedding = model.encode_image(images)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    assert not model.embeds_reports
    assert not model.scores_by_embedding
    with pytest.raises(NotImplementedError, match="embeds no reports"):
        model.encode_text(small_batch(random_matrix(1)).text)
    local = model.image_encoder(images).local
    torch.testing.assert_close(model.image_features(images), local.mean(1))
    assert not any("layer4" in name for name, _ in model.named_parameters()), "layer4 would never be trained"


@torch.no_grad()
def test_without_existence_losses_no_prompt_is_scored() -> None:
    """The logits that score prompts have no other loss; the streams have."""
    model, batch = small_medslip(existence_weight=0.0).eval(), small_batch(random_matrix(2))
    assert not model.scores_prompts
    with pytest.raises(NotImplementedError, match="existence_weight"):
        model.score(batch.image, batch.text)
    assert model.embeds_images
    assert model.ground(batch.image, batch.text).isfinite().all()


def test_sine_positions_reach_the_tokens() -> None:
    batch = small_batch(random_matrix(2))
    assert (small_medslip()(batch).loss - small_medslip(positions="sine")(batch).loss).abs() > 1e-4


def test_errors_say_what_to_do() -> None:
    config = small_config()
    config.text.frozen = False
    with pytest.raises(ConfigError, match=r"text\.frozen=true"):
        build_method(config, tokenizer().vocab_size)
    with pytest.raises(ConfigError, match=r"method\.heads=3"):
        small_medslip(heads=3)
    with pytest.raises(ConfigError, match="no loss is left"):
        small_medslip(existence_weight=0, prototype_weight=0, relation_weight=0)
    config = small_config("resnet")
    config.image.local_stage = 9
    with pytest.raises(EncoderError, match=r"local_stage=9"):
        build_method(config, tokenizer().vocab_size)
    batch = small_batch(random_matrix(1))
    batch.fields = {}
    with pytest.raises(ValueError, match="batch field entities"):
        small_medslip()(batch)
    assert fields_of("medslip") == {"entities"}


def test_the_official_file_turns_on_everything_published() -> None:
    needed = ["run.dir=/tmp/run", "data.root=/tmp/data"]
    files = [CONFIGS / "methods" / f"{name}.yaml" for name in ("medslip", "medslip-official")]
    sound, official = load(files[:1], needed, schemas()), load(files, needed, schemas())
    fields = dataclasses.fields(MeDSLIPConfig)
    quirks = {f.name for f in fields if "published" in f.metadata["help"]} | {"negatives", "batch_norm"}
    different = {f.name for f in fields if getattr(official.method, f.name) != getattr(sound.method, f.name)}
    assert different == set(OFFICIAL) == quirks
    for name, value in OFFICIAL.items():
        assert getattr(official.method, name) == value
    assert (official.data.transform.flip_entities, sound.data.transform.flip_entities) == ("keep", "swap")
    assert official.text.frozen
    assert official.optimizer.schedule == "epoch_cosine"


@pytest.mark.parametrize("length", [1e-3, 1.0])
def test_cosines_stay_cosines_where_a_mapped_query_is_short(length: float) -> None:
    """W q + b nearly 0 though W q and b are long: an expansion of its square is rounding, and reached 114."""
    torch.manual_seed(0)
    projection = TextProjection(16, 32)
    queries = 20 * torch.randn(4, 5, 16)
    texts = unit_norm(torch.randn(7, 32))
    with torch.no_grad():
        projection.bias.copy_(-(queries[0, 0] @ projection.weight.T) + length * texts[0])
        found = projection(queries, texts, True)
        mapped = queries.double() @ projection.weight.double().T + projection.bias.double()
    assert found.abs().max() <= 1 + 1e-5
    expected = unit_norm(mapped) @ texts.double().T
    torch.testing.assert_close(found[1:].double(), expected[1:], rtol=1e-4, atol=1e-5)


def test_the_official_file_starts_the_trunk_as_torchvision_does() -> None:
    """No norm of a block starts at zero, as timm's do by default."""
    needed = ["run.dir=/tmp/run", "data.root=/tmp/data"]
    files = [CONFIGS / "methods" / f"{name}.yaml" for name in ("medslip", "medslip-official")]
    image = load(files, needed, schemas()).image
    image = dataclasses.replace(image, name="resnet18")
    trunk = ImageEncoder(image, 64, ends_at_local=True).backbone
    assert all(
        weight.detach().eq(1).all()
        for name, weight in trunk.named_parameters()
        if name.endswith("bn2.weight")
    )
