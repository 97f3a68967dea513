"""Vocabularies and landmark rules against the published ones, and the words phantoms use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.entities.landmarks import MIRRORED_ROWS, landmark
from shards.entities.observations import EXCLUDED_LEMMAS, observation_class
from shards.entities.vocabulary import ANATOMIES, DESCRIPTIONS, NORMAL_OBSERVATIONS, OBSERVATIONS
from shards.reader import ShardReader


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, list[str]]:
    with np.load(golden_dir / "medslip_landmark_map.npz", allow_pickle=False) as arrays:
        return {name: arrays[name].tolist() for name in arrays.files}


def test_vocabularies_are_the_published_ones(golden: dict[str, list[str]]) -> None:
    assert list(ANATOMIES) == golden["landmark_list"]
    assert list(OBSERVATIONS) == golden["observation_list"]
    assert list(NORMAL_OBSERVATIONS) == golden["normal"]
    assert sorted(EXCLUDED_LEMMAS) == sorted(golden["excluded"])
    assert all(text.endswith(".") and len(text.split()) >= 3 for text in DESCRIPTIONS.values())


def test_landmarks_are_the_published_ones(golden: dict[str, list[str]]) -> None:
    found = [landmark(anatomy) for anatomy in golden["anatomy"]]
    assert found == golden["landmark"]


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ("left lower lobe", "lower_left_lobe"),
        ("right upper lung zone", "right_upper_lung"),
        ("Right Midlung", "right_mid_lung"),
        ("left lung base", "left_lower_lung"),
        ("left base", "left_lower_lung"),
        ("bilateral lung bases", "lung_bases"),
        ("lower lobes", "lung_bases"),
        ("superior vena cava", "svc"),
        ("left pleural space", "left_pleural"),
        ("pleura", "pleural_unspec"),
        ("cardiophrenic sulcus", "cardiophrenic_sulcus"),
        ("right costophrenic sulcus", "right_costophrenic"),
        ("cavoatrial junction", "cavoatrial_junction"),
        ("right ventricle", "right_ventricle"),
        ("left fifth rib", "rib"),
        ("bone", "other"),
        ("", "other"),
        ("unspecified", "unspecified"),
    ],
)
def test_plain_words_find_their_landmark(plain: str, expected: str) -> None:
    assert landmark(plain) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("effusions", "effusion"),
        ("pleural effusion", "effusion"),
        ("pleural thickening", "thicken"),
        ("support device", "device"),
        ("masses", "mass"),
        ("mass", "mass"),
        ("loss", "loss"),
        ("scarring", "scar"),
        ("enlarged", "enlarge"),
        ("increased", "enlarge"),
        ("calcified", "calcification"),
        ("pneumothoraces", "pneumothorax"),
        ("infectious process", "pneumonia"),
        ("opacities", "opacity"),
        ("worsening", "excluded_obs"),
        ("worse", "excluded_obs"),
        ("Moderate", "excluded_obs"),
        ("fibrotic", "tail_abnorm_obs"),
        ("granuloma", "tail_abnorm_obs"),
        ("sharply", "sharply"),
        ("", "tail_abnorm_obs"),
    ],
)
def test_words_find_their_class(word: str, expected: str) -> None:
    assert observation_class(word) == expected


def test_every_class_but_the_buckets_is_its_own() -> None:
    assert [observation_class(name) for name in OBSERVATIONS[:-2]] == list(OBSERVATIONS[:-2])


def test_sides_are_mirrored_in_pairs() -> None:
    pairs = {
        name: ANATOMIES[row] if row >= 0 else None for name, row in zip(ANATOMIES, MIRRORED_ROWS, strict=True)
    }
    assert pairs["lower_left_lobe"] == "lower_right_lobe"
    assert pairs["right_hilar"] == "left_hilar"
    assert pairs["heart_size"] == "heart_size"
    assert {name for name, twin in pairs.items() if twin is None} == {
        "middle_right_lobe",
        "right_atrium",
        "right_ventricle",
    }
    assert all(pairs[twin] == name for name, twin in pairs.items() if twin is not None)


def test_phantom_entities_are_in_the_vocabularies(phantom_dataset: Path) -> None:
    """Only bones and the chest have no landmark of their own, as in the published rules."""
    reader = ShardReader(phantom_dataset)
    others, classes = set(), set()
    for split in reader.index.splits:
        for i in range(reader.sample_count(split)):
            for anatomy, observation, _ in reader.metadata(split, i)["entities"]:
                classes.add(observation_class(observation))
                if landmark(anatomy) == "other":
                    others.add(anatomy)
    assert others == {"bone", "chest"}
    assert classes == {
        "atelectasis", "cardiomegaly", "consolidation", "device", "edema", "effusion", "emphysema",
        "fracture", "mass", "nodule", "pneumothorax", "thicken",
    }  # fmt: skip
