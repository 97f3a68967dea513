"""The papers' rules of what is trained on, and studies of several images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlp import config_files
from medvlp.config import Config, DataConfig
from medvlp.config_files import ConfigError
from medvlp.data.loader import build_loader
from medvlp.data.order import StudyImages
from medvlp.data.report import report_sentences
from medvlp.data.rules import excluding_rule
from medvlp.data.sample_store import SampleStore
from medvlp.data.text import Tokenizer
from medvlp.methods.registry import schemas
from shards.reader import ShardReader

ConfigFactory = Callable[..., Config]


@pytest.mark.parametrize(
    ("view", "report", "keys", "rule"),
    [
        ("PA", ["clear lungs"], {}, 0),
        ("", ["clear lungs"], {}, 0),
        ("PA", [], {}, 1),
        ("LATERAL", ["clear lungs"], {"views": ["PA", "AP"]}, 2),
        ("", ["clear lungs"], {"views": ["PA", "AP"]}, 2),
        ("AP", ["a", "b", "c"], {"views": ["PA", "AP"], "min_sentences": 4}, 3),
        ("AP", ["a", "b", "c", "d"], {"views": ["PA", "AP"], "min_sentences": 4}, 0),
        ("AP", ["no change."], {"min_tokens": 3}, 4),
        ("AP", ["no", "acute change."], {"min_tokens": 3}, 0),
        ("AP", ["? - ..."], {}, 4),
    ],
)
def test_rules(view: str, report: list[str], keys: dict[str, object], rule: int) -> None:
    assert excluding_rule(view, report, DataConfig(root="", **keys)) == rule  # type: ignore[arg-type]


def test_rules_decide_what_an_epoch_holds(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ShardReader(dataset)
    sections = ["impression", "findings"]
    plain = SampleStore.open_or_build(reader, "train", make_config(sections=sections).data, tokenizer)
    config = make_config(sections=sections, views=["PA"], min_sentences=5, tail="wrap")
    loader = build_loader(config, reader, tokenizer, 0, 1, 16)
    samples = [reader.metadata("train", i) for i in range(len(plain))]
    reports = [report_sentences(sample["sections"], sections, "none") for sample in samples]
    expected = {i for i, sample in enumerate(samples) if sample["view"] == "PA" and len(reports[i]) >= 5}
    assert 16 <= len(expected) < len(samples)
    seen = torch.cat([batch.sample for batch in itertools.islice(loader, loader.steps_per_epoch)])
    assert set(seen.tolist()) == expected
    others = sum(sample["view"] != "PA" for sample in samples)
    assert f"{others} have a view that is none of data.views=[PA]" in caplog.text
    assert "fewer sentences than data.min_sentences=5" in caplog.text
    ruled = SampleStore.open_or_build(reader, "train", config.data, tokenizer)
    assert ruled.path != plain.path
    assert set(np.flatnonzero(ruled.trainable())) == expected
    assert plain.trainable().all()
    np.testing.assert_array_equal(ruled.rows.ids, plain.rows.ids)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"views": ["LATERAL"]}, r"data\.views=\[LATERAL\]"),
        ({"min_sentences": 900}, r"data\.min_sentences=900"),
        ({"min_tokens": 90000}, r"data\.min_tokens=90000"),
    ],
)
def test_a_rule_that_leaves_nothing_is_refused_by_name(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, keys: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        build_loader(make_config(**keys), ShardReader(dataset), tokenizer, 0, 1, 16)


def join_studies(root: Path, positions: list[int], patients: bool = True) -> None:
    """Give samples of the train split the study of the first of them, and its patient if asked."""
    reader = ShardReader(root)
    first, *others = (reader.metadata("train", i) for i in positions)
    for position, metadata in zip(positions[1:], others, strict=True):
        tar = root / reader.locate("train", position)[0].file
        data = tar.read_bytes()
        end = data.index(f'"study_id":"{metadata["study_id"]}"'.encode())
        for name in ("study_id", "patient_id") if patients else ("study_id",):
            before, after = (f'"{name}":"{of[name]}"'.encode() for of in (metadata, first))
            assert len(before) == len(after)
            # Both stand in one sample, the patient first.
            start = data.rindex(before, 0, end + len(before))
            data = data[:start] + after + data[start + len(before) :]
        tar.write_bytes(data)


def test_equal_study_ids_of_different_patients_are_different_studies(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    """Tables number the visits of each patient: study 1 of one is not study 1 of another."""
    group = [3, 20, 41]
    join_studies(own_dataset, group, patients=False)
    config = make_config(root=str(own_dataset), images_per_study="one", tail="wrap")
    reader = ShardReader(own_dataset)
    assert len({reader.metadata("train", i)["study_id"] for i in group}) == 1
    assert len({reader.metadata("train", i)["patient_id"] for i in group}) == len(group)
    assert build_loader(config, reader, tokenizer, 0, 1, 16).samples == reader.sample_count("train")
    store = SampleStore.open_or_build(reader, "train", config.data, tokenizer)
    assert store.studies[group].tolist() == group, "each may be a negative of the others"


def test_images_of_one_study_are_known_and_one_of_them_can_be_drawn(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    group = [3, 4, 20, 41]
    join_studies(own_dataset, group)
    config = make_config(root=str(own_dataset), tail="wrap")
    reader = ShardReader(own_dataset)
    total = reader.sample_count("train")
    loader = build_loader(config, reader, tokenizer, 0, 1, 16)
    assert loader.samples == total
    for batch in itertools.islice(loader, loader.steps_per_epoch):
        expected = [group[0] if i in group else i for i in batch.sample.tolist()]
        assert batch.study.tolist() == expected
    config.data.images_per_study = "one"
    loader = build_loader(config, reader, tokenizer, 0, 1, 16)
    assert loader.samples == total - 3
    steps = loader.steps_per_epoch
    seen = [batch.sample for batch in itertools.islice(loader, 12 * steps)]
    epochs = [torch.cat(seen[e * steps : (e + 1) * steps])[: total - 3].tolist() for e in range(12)]
    drawn = [set(epoch) & set(group) for epoch in epochs]
    assert all(len(each) == 1 for each in drawn)
    assert set().union(*drawn) == set(group), "another of them in time"
    assert all(set(epoch) - set(group) == set(range(total)) - set(group) for epoch in epochs)
    resumed = build_loader(config, reader, tokenizer, 0, 1, 16, start_step=2 * steps + 1)
    assert torch.equal(next(iter(resumed)).sample, seen[2 * steps + 1])
    halves = [build_loader(config, reader, tokenizer, rank, 2, 8, start_step=3) for rank in range(2)]
    assert torch.equal(torch.cat([next(iter(half)).sample for half in halves]), seen[3])


@settings(max_examples=30)
@given(data=st.data(), count=st.integers(1, 30), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_a_draw_is_an_image_of_its_study(data: st.DataObject, count: int, seed: int, epoch: int) -> None:
    groups = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    studies = np.array([groups.index(group) for group in groups])
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    images = StudyImages(studies, mask, seed)
    firsts = np.flatnonzero(images.first)
    assert len(firsts) == len(set(studies[mask]))
    drawn = images.draw(epoch, firsts)
    assert mask[drawn].all()
    assert (studies[drawn] == studies[firsts]).all()
    np.testing.assert_array_equal(StudyImages(studies, mask, seed).draw(epoch, firsts[::-1]), drawn[::-1])


@pytest.mark.parametrize(
    ("name", "sentences", "tokens", "images"),
    [
        ("mgca", 1, 3, "all"),
        ("mgca-resnet50", 1, 3, "all"),
        ("prior", 4, 1, "one"),
        ("mpma", 1, 3, "one"),
        ("place", 1, 3, "all"),
    ],
)
def test_the_papers_rules_are_in_the_methods_files(
    name: str, sentences: int, tokens: int, images: str
) -> None:
    file = Path(__file__).resolve().parents[2] / "configs" / "methods" / f"{name}.yaml"
    data = config_files.load([file], ["data.root=/data", "run.dir=/run"], schemas()).data
    assert data.views == ["PA", "AP"]
    assert (data.min_sentences, data.min_tokens, data.images_per_study) == (sentences, tokens, images)
