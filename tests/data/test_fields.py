"""Batch fields: what each holds, how crop, flip and resize move it, and what happens without any."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medvlp.config import Config, TransformConfig
from medvlp.config_files import ConfigError
from medvlp.data.fields import Questions, question_text
from medvlp.data.loader import build_loader, evaluation_loader
from medvlp.data.questions import normalised, text_code
from medvlp.data.report import r2gen_words, report_text, scored_words
from medvlp.data.sample_store import EntityRows, SampleStore
from medvlp.data.text import Tokenizer
from medvlp.data.transforms import DRAWS, SampleRandom, training_view
from medvlp.methods import registry
from shards.entities.matrix import entity_matrix, mirrored
from shards.errors import DataError
from shards.reader import ShardReader

ConfigFactory = Callable[..., Config]


def test_packed_rows_give_back_every_matrix() -> None:
    samples = [
        [["left pleural space", "effusion", 1], ["heart", "cardiomegaly", 0], ["lung", "edema", -1]],
        [],
        [["unspecified", "normal", 1], ["other thing", "unknown word", 0]],
    ]
    rows = EntityRows.pack(samples)
    for selection in ([0, 1, 2], [2, 0, 0], [1], []):
        matrices = rows.matrices(np.array(selection, dtype=np.int64))
        assert matrices.shape == (len(selection), 51, 75)
        assert matrices.dtype == np.int8
        for matrix, i in zip(matrices, selection, strict=True):
            np.testing.assert_array_equal(matrix, entity_matrix(samples[i]))
    last = EntityRows.pack([[["other", "excluded_obs", 1]]]).matrices(np.array([0]))
    assert last[0, 50, 74] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_matrices_of_their_samples(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, workers: int
) -> None:
    config, reader = make_config(workers=workers), ShardReader(dataset)
    loader = build_loader(config, reader, tokenizer, 0, 1, 16, fields=["entities"])
    for batch in itertools.islice(loader, 3):
        assert batch.fields["entities"].shape == (16, 51, 75)
        assert batch.fields["entities"].dtype == torch.int8
        for matrix, position in zip(batch.fields["entities"], batch.sample.tolist(), strict=True):
            expected = entity_matrix(reader.metadata("train", position)["entities"])
            np.testing.assert_array_equal(matrix.numpy(), expected)
        assert (batch.fields["entities"] == 1).any()
        assert (batch.fields["entities"] == 0).any()


def test_only_who_asks_gets_a_field(make_config: ConfigFactory, tokenizer: Tokenizer) -> None:
    config = make_config()
    reader = ShardReader(config.data.root)
    assert next(iter(build_loader(config, reader, tokenizer, 0, 1, 16))).fields == {}
    for fields in ([], ["entities"]):
        batch = next(iter(evaluation_loader(config, reader, tokenizer, "test", 4, fields=fields)))
        assert list(batch.fields) == fields
    with pytest.raises(ConfigError, match="entitys; there are entities, boxes, phrases, masks"):
        evaluation_loader(config, reader, tokenizer, "test", 4, fields=["entitys"])


@pytest.mark.parametrize("policy", ["swap", "keep"])
def test_a_flipped_sample_has_its_sides_exchanged(
    make_config: ConfigFactory, tokenizer: Tokenizer, policy: str
) -> None:
    config = make_config(transform=TransformConfig(flip=0.5, flip_entities=policy))  # type: ignore[arg-type]
    reader = ShardReader(config.data.root)
    batch = next(iter(build_loader(config, reader, tokenizer, 0, 1, 16, fields=["entities"])))
    random, changed = SampleRandom(config.train.seed, 0), 0
    for matrix, position in zip(batch.fields["entities"], batch.sample.tolist(), strict=True):
        stored = entity_matrix(reader.metadata("train", position)["entities"])
        flipped = random.uniform(position, DRAWS)[3] < 0.5
        expected = mirrored(stored) if flipped and policy == "swap" else stored
        np.testing.assert_array_equal(matrix.numpy(), expected)
        changed += flipped and not np.array_equal(stored, mirrored(stored))
    assert changed > 2


def test_store_maps_entities_in_a_worker(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    store = SampleStore.open_or_build(ShardReader(dataset), "train", make_config().data, tokenizer)
    copy = pickle.loads(pickle.dumps(store))
    rows = np.arange(len(store))
    np.testing.assert_array_equal(copy.entities.matrices(rows), store.entities.matrices(rows))


def test_dataset_without_entities_is_refused(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    for tar in own_dataset.glob("*.tar"):
        data = tar.read_bytes()
        while (start := data.find(b'"entities":[[')) >= 0:
            end = data.index(b"]]", start) + 2
            empty = b'"entities":[]'
            data = data[:start] + empty + b" " * (end - start - len(empty)) + data[end:]
        tar.write_bytes(data)
    reader = ShardReader(own_dataset)
    assert json.dumps(reader.metadata("train", 0)["entities"]) == "[]"
    config = make_config(root=str(own_dataset))
    with pytest.raises(DataError, match="medvlp shards annotate"):
        build_loader(config, reader, tokenizer, 0, 1, 16, fields=["entities"])
    build_loader(config, reader, tokenizer, 0, 1, 16)


def test_registry_says_which_fields_a_method_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.fields_of("mgca") == frozenset()
    known = registry.REGISTRY["mgca"]
    entry = registry.Entry(known.config, known.build, frozenset(["entities"]))
    monkeypatch.setitem(registry.REGISTRY, "reader", entry)
    assert registry.fields_of("reader") == {"entities"}
    with pytest.raises(registry.UnknownMethodError, match="nothing"):
        registry.fields_of("nothing")


def box_truth(image: np.ndarray, boxes: list[dict[str, float]]) -> np.ndarray:
    """A picture of the stored size with the inside of the boxes white."""
    picture = np.zeros_like(image)
    for box in boxes:
        x, y = box["x"], box["y"]
        picture[round(y) : round(y + box["height"]), round(x) : round(x + box["width"])] = 255
    return picture


@pytest.mark.parametrize(
    "transform",
    [
        TransformConfig(crop="none"),
        TransformConfig(crop="center"),
        TransformConfig(crop="random", flip=1.0),
        TransformConfig(crop="random", flip=0.5, scale_min=0.5),
    ],
    ids=["whole", "center", "flipped", "resized crops"],
)
@pytest.mark.parametrize(("stored", "size"), [(64, 48), (64, 96)])
def test_a_view_moves_boxes_as_it_moves_pixels(transform: TransformConfig, stored: int, size: int) -> None:
    """A picture of a box goes through the crop; the moved box must lie where its white pixels are."""
    stated = {"x": 20.0, "y": 8.0, "width": 24.0, "height": 32.0}
    picture = box_truth(np.zeros((stored, stored), dtype=np.uint8), [stated])
    random = SampleRandom(0, 0)
    for sample in range(40):
        pixels, view = training_view(picture, size, transform, random.uniform(sample, DRAWS))
        left, right = view.horizontal(np.array([20.0]), np.array([44.0]))
        top, bottom = view.vertical(np.array([8.0]), np.array([40.0]))
        rows, columns = np.nonzero(pixels > 127)
        found = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
        expected = np.clip([left[0], right[0], top[0], bottom[0]], 0, size)
        assert np.abs(np.array(found) - expected).max() <= 1.5


def test_boxes_of_a_batch_are_those_of_its_samples(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config, reader = make_config(transform=TransformConfig(crop="none")), ShardReader(dataset)
    names, scale = reader.index.label_names, config.data.image_size / reader.index.image_size
    batch = next(iter(evaluation_loader(config, reader, tokenizer, "train", 8, fields=["boxes"])))
    boxes = batch.fields["boxes"]
    assert boxes.dtype == torch.float32
    seen = 0
    for row, position in zip(boxes.numpy(), batch.sample.tolist(), strict=True):
        stated = reader.metadata("train", position)["boxes"]
        assert (row[len(stated) :] == [-1, 0, 0, 0, 0]).all()
        for found, box in zip(row, stated, strict=False):
            ends = [box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]]
            np.testing.assert_allclose(
                found, [names.index(box["label"]), *np.multiply(ends, scale)], atol=1e-3
            )
            seen += 1
    assert seen > 3


def test_phrases_of_a_batch_are_those_of_its_samples(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers count all phrases, those without a box too; what the view cuts off is left out."""
    config, reader = make_config(transform=TransformConfig(crop="random")), ShardReader(dataset)
    names, size, stored = reader.index.label_names, config.data.image_size, ShardReader.metadata
    border = (reader.index.image_size - size) / 2
    assert border > 0

    def changed(self: ShardReader, split: str, i: int) -> dict[str, object]:
        sample = stored(self, split, i)
        corner = {"label": "elsewhere", "x": 0, "y": 0, "width": border, "height": border, "side": ""}
        inside = {**corner, "width": border + 2, "height": border + 3}
        extra = [{"text": "nowhere", "boxes": []}, {"text": "corner", "boxes": [corner, inside]}]
        return sample | {"phrases": [*extra, *sample["phrases"]]}

    monkeypatch.setattr(ShardReader, "metadata", changed)
    batch = next(iter(evaluation_loader(config, reader, tokenizer, "train", 8, fields=["phrases"])))
    seen = 0
    for rows, position in zip(batch.fields["phrases"].numpy(), batch.sample.tolist(), strict=True):
        np.testing.assert_array_equal(rows[0], [1, 0, 0, 2, 3, -1])
        expected = []
        for number, phrase in enumerate(reader.metadata("train", position)["phrases"][2:], 2):
            for box in phrase["boxes"]:
                x, y = box["x"] - border, box["y"] - border
                ends = np.clip([x, y, x + box["width"], y + box["height"]], 0, size)
                if ends[2] > ends[0] and ends[3] > ends[1]:
                    expected.append([number, *ends, names.index(box["label"])])
        np.testing.assert_allclose(rows[1 : 1 + len(expected)], np.reshape(expected, (-1, 6)), atol=1e-3)
        assert (rows[1 + len(expected) :] == [-1, 0, 0, 0, 0, 0]).all()
        seen += len(expected)
    assert seen > 3


@pytest.mark.parametrize("last", [True, False])
def test_one_box_in_the_last_sample_is_a_dataset_with_boxes(
    dataset: Path,
    make_config: ConfigFactory,
    tokenizer: Tokenizer,
    last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, reader = make_config(), ShardReader(dataset)
    count, stored = reader.sample_count("train"), ShardReader.metadata

    def without(self: ShardReader, split: str, i: int) -> dict[str, object]:
        return stored(self, split, i) | ({} if last and i == count - 1 else {"boxes": []})

    assert reader.metadata("train", count - 1)["boxes"]
    monkeypatch.setattr(ShardReader, "metadata", without)
    if last:
        build_loader(config, reader, tokenizer, 0, 1, 16, fields=["boxes"])
        return
    with pytest.raises(DataError, match=r"lacks the boxes .* no sample has a box"):
        build_loader(config, reader, tokenizer, 0, 1, 16, fields=["boxes"])


@pytest.mark.parametrize(
    "transform",
    [
        TransformConfig(crop="none"),
        TransformConfig(crop="center"),
        TransformConfig(crop="random", flip=1.0),
        TransformConfig(crop="random", flip=0.5, scale_min=0.5),
    ],
    ids=["whole", "center", "flipped", "resized crops"],
)
@pytest.mark.parametrize(("stored", "size"), [(64, 48), (64, 96)])
def test_a_view_moves_masks_as_it_moves_pixels(transform: TransformConfig, stored: int, size: int) -> None:
    """An asymmetric shape goes through the crop; the mask must be where its white pixels are."""
    mask = np.zeros((stored, stored), dtype=np.uint8)
    mask[10:40, 12:20] = mask[30:40, 20:50] = 1
    random = SampleRandom(0, 0)
    for sample in range(40):
        pixels, view = training_view(mask * 255, size, transform, random.uniform(sample, DRAWS))
        found = mask[view.stored_rows()[:, None], view.stored_columns()]
        assert found.any()
        # They differ at edges at most, where resizing mixes pixels.
        sure = (pixels < 30) | (pixels > 225)
        np.testing.assert_array_equal(found[sure], pixels[sure] > 127)
        assert sure.mean() > 0.85


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_of_a_batch_are_those_of_its_samples(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, flip: float
) -> None:
    config = make_config(transform=TransformConfig(crop="none", flip=flip), image_size=64)
    reader = ShardReader(dataset)
    batch = next(iter(build_loader(config, reader, tokenizer, 0, 1, 16, fields=["masks"])))
    masks = batch.fields["masks"]
    assert masks.dtype == torch.uint8
    assert masks.shape == (16, len(reader.index.label_names), 64, 64)
    for found, position in zip(masks.numpy(), batch.sample.tolist(), strict=True):
        stored = np.stack(list(reader.masks("train", position).values()))
        np.testing.assert_array_equal(found, stored[:, :, ::-1] if flip else stored)
    assert 0 < masks.float().mean() < 0.5


def test_a_finding_without_a_mask_is_unknown(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reader, stored = make_config(), ShardReader(dataset), ShardReader.masks
    monkeypatch.setattr(ShardReader, "masks", lambda self, *which: {"mass": stored(self, *which)["mass"]})
    batch = next(iter(evaluation_loader(config, reader, tokenizer, "train", 40, fields=["masks"])))
    mass = reader.index.label_names.index("mass")
    others = np.delete(batch.fields["masks"].numpy(), mass, axis=1)
    assert (others == 255).all()
    assert set(np.unique(batch.fields["masks"][:, mass])) == {0, 1}
    monkeypatch.setattr(ShardReader, "masks", lambda self, *which: {})
    with pytest.raises(DataError, match=r"lacks the masks .* no sample has a mask"):
        build_loader(config, reader, tokenizer, 0, 1, 16, fields=["masks"])


def test_questions_and_answers_of_samples_stand_beside_each_other(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config, reader = make_config(workers=1), ShardReader(dataset)
    loader = evaluation_loader(config, reader, tokenizer, "valid", 4, fields=["questions", "answers"])
    counts = set()
    for batch in loader:
        questions, answers = batch.fields["questions"], batch.fields["answers"]
        stored = [reader.metadata("valid", row)["questions"] for row in batch.sample.tolist()]
        assert questions.shape[:2] == answers.shape == (len(stored), max(len(of) for of in stored))
        for row, of in enumerate(stored):
            text = tokenizer.tokenize([[item["question"]] for item in of], 32, pad_to_max=True)
            rebuilt = question_text(questions[row, : len(of)])
            for name in ("input_ids", "attention_mask", "word_index", "sentence_index"):
                assert torch.equal(getattr(rebuilt, name), getattr(text, name))
            assert answers[row, : len(of)].tolist() == [text_code(normalised(item["answer"])) for item in of]
            assert not answers[row, len(of) :].any()
            assert not questions[row, len(of) :].any()
            counts.add(len(of))
    assert len(counts) > 1


@pytest.mark.parametrize(("name", "words"), [("report_words", scored_words), ("r2gen_words", r2gen_words)])
def test_report_words_are_those_of_the_chosen_sections(
    dataset: Path,
    make_config: ConfigFactory,
    tokenizer: Tokenizer,
    name: str,
    words: Callable[[str], list[str]],
) -> None:
    reader = ShardReader(dataset)
    found = {}
    for sections in (["findings"], ["findings", "impression"]):
        config = make_config(sections=sections)
        (batch,) = evaluation_loader(
            config, reader, tokenizer, "valid", 3, positions=[0, 2, 1], fields=[name]
        )
        for row, position in enumerate(batch.sample.tolist()):
            report = words(report_text(reader.metadata("valid", position), config.data))
            codes = batch.fields[name][row]
            assert codes[: len(report)].tolist() == [text_code(word) for word in report]
            assert not codes[len(report) :].any()
            found[len(sections), position] = len(report)
    assert all(found[1, position] < found[2, position] for position in range(3))


def test_more_questions_than_are_read_are_refused(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Questions, "MOST", 2)
    loader = evaluation_loader(
        make_config(), ShardReader(dataset), tokenizer, "valid", 4, fields=["questions"]
    )
    with pytest.raises(DataError, match="questions, more than the 2 that are read"):
        list(loader)


def test_fields_with_places_refuse_what_moves_them_freely(
    dataset: Path, make_config: Callable[..., Config], tokenizer: Tokenizer
) -> None:
    config = make_config(transform=TransformConfig(rotate=5))
    with pytest.raises(ConfigError, match=r"data\.transform\.rotate.*boxes"):
        build_loader(config, ShardReader(dataset), tokenizer, 0, 1, 16, fields=["boxes"])
    build_loader(config, ShardReader(dataset), tokenizer, 0, 1, 16, fields=["entities"])
