"""Imported weights give what the published classes gave: embeddings, local features, scores, decoders.

Weights follow from the golden files' rule at the published sizes. Tensors that no forward reads are NaN here,
so that one that is read shows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medvlp.data.batch import Text
from medvlp.encoders.words import aggregate_words
from medvlp.losses.normalise import unit_norm
from medvlp.methods.medslip.method import fuse_anatomies, mean_attention
from medvlp.methods.pair import PairMethod
from medvlp.published import medslip, mgca, prior
from medvlp.published.reading import PublishedFile
from medvlp.published.run import config_of, method_of
from medvlp.published.tokenizers import VOCABULARY
from tests.golden_files import Golden, every
from tests.published.rule import drawn, facts_of, state_dict


def imported(golden: Golden, source: Any, *overrides: str) -> tuple[Any, Any]:
    """The method with the weights of a golden file's rule, and the account of its keys."""
    facts = facts_of(golden.file)
    recipe = source.recipe([key for key, *_ in facts["state_dict"]])
    state = state_dict(facts, "|".join(recipe.unused))
    file = PublishedFile(golden.file, "", state, ())
    config = config_of(recipe.values, Path("unused"), overrides)
    method, account = method_of(file, recipe, config, VOCABULARY)
    return method, account


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def close(found: Tensor, expected: Tensor, what: str, small: bool = False) -> None:
    """Within 1e-5 for unit vectors and probabilities, else relative to the largest value."""
    largest = max(1.0, expected.abs().max().item())
    tolerance = 1e-5 if small else 2e-5 * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


def text_of(golden: Golden, sentence: Tensor | None = None, prefix: str = "in_") -> Text:
    ids, mask = golden(f"{prefix}ids"), golden(f"{prefix}mask")
    body = (mask == 1) & (ids != 101) & (ids != 102)
    continues = golden("in_continues") if "in_continues" in golden.names() else torch.zeros_like(body)
    opens = (body & ~continues) | (ids == 102)
    word = torch.where(mask == 1, opens.cumsum(1), -1)
    return Text(ids, mask, word, torch.where(body, 0, -1) if sentence is None else sentence)


@every("import_mgca_*.npz")
def test_mgca(golden: Golden) -> None:
    method, account = imported(golden, mgca)
    assert isinstance(method, PairMethod)
    assert len(account.unused) == 69
    assert not account.unknown
    alignment: Any = method.alignment
    vit = "vit" in golden.name
    image = method.image_encoder(golden("in_image_u8")[:, None], attention=vit)
    text = text_of(golden)
    features = method.text_encoder(text, attention=True)
    words, valid, attention = alignment._words(features, text)
    pieces = aggregate_words(features.hidden, features.cls_attention, text, True, True, True)
    patches, slots, tokens = (golden(f"index_{name}") for name in ("patches", "words", "tokens"))
    close(image.pooled, golden("out_image_pooled"), "pooled")
    close(image.local[:, patches], golden("out_image_local"), "local")
    if vit:
        close(image.attention, golden("out_image_attention"), "attention", small=True)
    close(alignment.image_head(image.pooled), golden("out_image_head_output"), "image head")
    unit = unit_norm(alignment.patch_head(image.local)[:, patches])
    close(unit, golden("out_patch_embedding"), "patches", small=True)
    close(features.hidden[:, tokens], golden("out_text_hidden"), "hidden")
    close(features.cls_attention, golden("out_text_cls_attention_mean"), "[CLS]", small=True)
    close(pieces.features[:, slots], golden("out_word_feature"), "word features")
    close(attention, golden("out_word_attention"), "word attention", small=True)
    close(unit_norm(words[:, slots]), golden("out_word_embedding"), "words", small=True)
    assert valid.sum(1).tolist() == golden("out_word_count").tolist()
    one, other = method.encode_image(golden("in_image_u8")[:, None]), method.encode_text(text)
    close(one, golden("out_image_embedding"), "image embedding", small=True)
    close(other, golden("out_report_embedding"), "report embedding", small=True)
    close(method.score(golden("in_image_u8")[:, None], text), golden("out_similarity"), "score", small=True)
    prototypes = unit_norm(alignment.objective.prototypes.weight)
    for name, embedding in (("image", one), ("report", other)):
        close(embedding @ prototypes.T, golden(f"out_prototype_logits_{name}"), "prototypes", small=True)


@every("import_prior.npz")
def test_prior(golden: Golden) -> None:
    method, account = imported(golden, prior)
    assert {re.sub(r"\d+", "N", key) for key in account.unused} >= {"global_text_projection.weight"}
    alignment: Any = method.alignment
    pixels = golden("in_image_u8")[:, None]
    image = method.image_encoder(pixels)
    close(image.local[:, :2], golden("out_image_map").transpose(1, 2), "map")
    close(image.pooled, golden("out_image_average_pooled"), "average")
    close(alignment.image_pool(image.local), golden("out_image_pooled"), "attention pool")
    close(alignment._image(image), golden("out_image_projection"), "projection")
    close(method.encode_image(pixels), golden("out_image_embedding"), "image embedding", small=True)
    patches = alignment._patches(image)
    close(patches[:, golden("index_patches")], golden("out_patch_projection"), "patches")

    text = text_of(golden, (golden("in_sentence_index") - 1).clamp(min=-1))
    features = method.text_encoder(text)
    close(features.hidden[:, golden("index_tokens")], golden("out_text_hidden"), "hidden")
    alignment.config.zero_shot = "embedding"  # reports are no prompts: [SEP] belongs to no sentence of theirs
    sentences, valid = alignment._sentences(features, text, generated=False)
    close(sentences * valid[..., None], golden("out_sentences"), "sentences")
    report = unit_norm(alignment.objective.report(sentences, valid))
    close(report, golden("out_report_embedding"), "report without bank", small=True)
    embedding = method.encode_text(text)
    close(embedding, golden("out_report_embedding_bank"), "report", small=True)
    close(method.encode_image(pixels) @ embedding.T, golden("out_similarity_bank"), "similarity", small=True)
    banked = alignment.objective.banked(sentences)
    first = [row for report in valid for row in report.nonzero().flatten().tolist()]
    found = banked.weights[valid].argmax(-1)
    assert len(first) == len(golden("out_bank_index"))
    assert found.tolist() == golden("out_bank_index").tolist()

    alignment.config.zero_shot = "official"
    prompts = text_of(golden, prefix="in_prompt_")
    close(method.encode_text(prompts), golden("out_prompt_embedding"), "prompts", small=True)
    scores = torch.cat([method.score(one[None], prompts) for one in pixels])
    close(scores, golden("out_zero_shot_scores"), "zero-shot", small=True)

    mixed = banked.sentences[:2, :16]
    context = alignment.objective.cross_attention(patches, mixed, valid[:2, :16])
    close(context.image[:, golden("index_patches")], golden("out_patch_context"), "context")
    close(context.image_weights[0, :, :5], golden("out_patch_attention"), "patch attention", small=True)
    close(context.text_weights[0, :5], golden("out_sentence_attention"), "sentence attention", small=True)
    generated = alignment.objective.sentence_decoder(patches)
    close(generated[:, [0, 1, 8, 15]], golden("out_generated_sentences"), "generated")
    scale = [alignment.objective.scale.log_scale, alignment.objective.local_scale.log_scale]
    close(torch.cat(scale), golden("out_logit_scale"), "scales")


@every("import_medslip.npz")
def test_medslip(golden: Golden) -> None:
    facts = facts_of(golden.file)
    recipe = medslip.recipe(())
    file = PublishedFile(golden.file, "", state_dict(facts), ())
    small = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    values = {**recipe.values, "text": {"frozen": True, "options": small}}
    method, account = method_of(file, recipe, config_of(values, Path("unused")), 100)
    assert not account.unused
    assert not account.unknown
    for name, rows in (("pathology", 75), ("anatomy", 51)):
        book = 0.5 * torch.from_numpy(drawn(f"{name}_book", [rows, 768], facts["salt"])).float()
        close(book[:2], golden(f"check_{name}_book_rows"), "the rule of the book")
        getattr(method.book, name).copy_(book)
    method.book.written = True
    pixels = golden("in_image_u8")[:, None]
    streams = method._image_streams(pixels).streams
    for name in ("pathology", "anatomy"):
        index, tokens = golden(f"index_{name}"), getattr(streams, name)
        close(tokens[:, golden("index_tokens")], golden(f"out_tokens_{name}"), "tokens")
        close(tokens.mean(1), golden(f"out_tokens_{name}_mean"), "mean tokens")
        book = getattr(method.book, name)
        close(method.queries(book)[index], golden(f"out_queries_{name}"), "queries")
        read = method._read(getattr(method, f"{name}_decoder"), book, tokens, attention=True)
        close(read.features[:, index], golden(f"out_features_{name}"), "features")
        logits = getattr(method.objective, f"{name}_existence")(read.features)
        close(logits, golden(f"out_existence_{name}"), "existence")
        if name == "pathology":
            close(mean_attention(read)[:, index], golden("out_attention_pathology"), "maps", small=True)
            pathology = read
    maps = fuse_anatomies(mean_attention(pathology), mean_attention(read))
    close(maps[:, golden("index_pathology")], golden("out_attention_fused"), "fused maps", small=True)
    probability = method.objective.probability(pathology.features)
    close(probability, golden("out_probability_pathology"), "probability", small=True)
    relation = torch.einsum("bad,bpd->bap", read.features, pathology.features)
    torch.testing.assert_close(relation, golden("out_relation_logits"), rtol=0, atol=2e-4)
