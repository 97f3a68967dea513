"""The phantom source: the same bytes everywhere, exact annotations, a believable population."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.sources.phantom import FINDINGS, PhantomSource
from shards.sources.phantom.anatomy import Anatomy
from shards.sources.phantom.findings import SPECS
from shards.sources.phantom.questions import ask
from shards.sources.phantom.render import render
from shards.sources.phantom.seeds import Stream, generator
from shards.study import Study

SIZE = 96
NAMES = [spec.name for spec in FINDINGS]


@pytest.fixture(scope="module")
def studies() -> list[Study]:
    source = PhantomSource(150, SIZE, seed=3)
    return [source.load(i)[0] for i in range(len(source))]


def fingerprint(source: PhantomSource, i: int) -> str:
    """Hash of everything a study holds."""
    (study,) = source.load(i)
    text = json.dumps([study.sentences, study.labels, study.patient_id, study.view, study.extra])
    targets = (study.boxes, study.entities, study.anatomy, study.phrases, study.questions)
    pixels = b"".join(array.tobytes() for array in (study.image, *study.masks.values()))
    return hashlib.sha256(pixels + text.encode() + repr(targets).encode()).hexdigest()


def test_same_seed_same_bytes_in_any_order_and_process() -> None:
    numbers = [0, 1, 7, 30, 31]
    forward = {i: fingerprint(PhantomSource(40, SIZE, 5), i) for i in numbers}
    source = pickle.loads(pickle.dumps(PhantomSource(40, SIZE, 5)))
    assert {i: fingerprint(source, i) for i in reversed(numbers)} == forward
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_source import *\n"
        f"print(json.dumps([fingerprint(PhantomSource(40, {SIZE}, 5), i) for i in {numbers}]))"
    )
    folder = str(Path(__file__).parent)
    printed = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout) == [forward[i] for i in numbers]


def test_other_seeds_and_other_studies_differ() -> None:
    prints = {fingerprint(PhantomSource(20, SIZE, seed), i) for seed in (0, 1) for i in range(5)}
    assert len(prints) == 10


def test_a_larger_source_begins_with_the_smaller_one() -> None:
    small, large = PhantomSource(25, SIZE, 0), PhantomSource(300, SIZE, 0)
    assert [small.split_key(i) for i in range(25)] == [large.split_key(i) for i in range(25)]
    assert fingerprint(small, 24) == fingerprint(large, 24)


@pytest.mark.parametrize("arguments", [(0, 64, 0), (10, 16, 0), (10, 9000, 0), (10, 64, -1)])
def test_arguments_out_of_range_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="phantom source"):
        PhantomSource(*arguments)


def test_studies_outside_the_source_are_refused() -> None:
    source = PhantomSource(4, 64, 0)
    for i in (-1, 4):
        with pytest.raises(IndexError):
            source.load(i)


@pytest.mark.parametrize("size", [33, 64, 300])
def test_any_size_is_drawn(size: int) -> None:
    (study,) = PhantomSource(1, size, 0).load(0)
    assert study.image.shape == (size, size)
    assert study.image.dtype == np.uint8
    assert study.image.std() > 15


def test_labels_boxes_masks_and_entities_agree(studies: list[Study]) -> None:
    for study in studies:
        assert list(study.labels) == list(study.masks) == NAMES
        boxed = {box.label for box in study.boxes}
        for name, value in study.labels.items():
            assert (name in boxed) == (value != 0) == bool(study.masks[name].any()), (study.study_id, name)
            stated = {entity.value for entity in study.entities if entity.observation == name}
            assert stated <= {value}, (study.study_id, name)
            assert bool(stated) or value == 0
        for box in study.boxes:
            assert box.width >= 2
            assert box.height >= 2
            assert 0 <= box.x <= box.x + box.width <= SIZE
            assert 0 <= box.y <= box.y + box.height <= SIZE


def test_the_boxes_of_a_finding_are_those_of_its_mask(studies: list[Study]) -> None:
    """Of the whole mask, also where another finding lies over it: the box's edges touch the mask."""
    overlaps = 0
    for study in studies:
        for name, mask in study.masks.items():
            boxes = [box for box in study.boxes if box.label == name]
            inside = np.zeros_like(mask)
            for box in boxes:
                inside[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)] = 1
            assert not (mask & ~inside & 1).any()
            if len(boxes) == 1:
                rows, columns = np.nonzero(mask)
                (box,) = boxes
                assert (columns.min(), columns.max() + 1) == (box.x, box.x + box.width)
                assert (rows.min(), rows.max() + 1) == (box.y, box.y + box.height)
        overlaps += bool((np.sum(list(study.masks.values()), axis=0) > 1).any())
    assert overlaps > 10


def test_sides_of_boxes_and_anatomy(studies: list[Study]) -> None:
    """The patient's left is the image's right; lungs lie on either side, the heart between them."""
    for study in studies:
        sides = {finding["name"]: finding["side"] for finding in study.extra["findings"]}
        for name, side in sides.items():
            found = sorted(box.side for box in study.boxes if box.label == name)
            assert found == (["left", "right"] if side == "bilateral" else [side])
        regions = {box.label: box for box in study.anatomy}
        assert list(regions) == ["left lung", "right lung", "heart"]
        left, right, heart = (box.x + box.width / 2 for box in regions.values())
        assert right < heart < left
        assert (regions["left lung"].side, regions["right lung"].side) == ("left", "right")
        for box in study.anatomy:
            assert box.width > SIZE / 8
            assert box.height > SIZE / 8


def test_phrases_are_sentences_of_the_report_about_the_findings_in_their_boxes(studies: list[Study]) -> None:
    for study in studies:
        said = set()
        for phrase in study.phrases:
            assert phrase.text in study.sentences
            named = {box.label for box in phrase.boxes}
            assert named
            assert set(phrase.boxes) == {box for box in study.boxes if box.label in named}
            said |= named
        assert said == {name for name, value in study.labels.items() if value}
    assert any(len({box.label for box in phrase.boxes}) == 2 for s in studies for phrase in s.phrases)


def test_answers_are_the_labels(studies: list[Study]) -> None:
    answers: Counter[str] = Counter()
    words = {"size": ["small", "moderate", "large"], "degree": ["mild", "moderate", "severe"]}
    for study in studies:
        drawn = {item["name"]: item for item in study.extra["findings"]}
        hedged = -1 in study.labels.values()
        present = [name for name, value in study.labels.items() if value == 1]
        for item in study.questions:
            answers[item.answer] += 1
            named = [name for name in NAMES if f"{name}?" in item.question or f"{name} " in item.question]
            match item.topic:
                case "plane":
                    assert item.answer == study.view
                case "abnormality":
                    assert not hedged
                    assert item.answer.replace(" and ", ", ").split(", ") == (present or ["none"])
                case "presence":
                    assert item.kind == "closed"
                    assert study.labels[named[0]] == {"yes": 1, "no": 0}[item.answer]
                case "position":
                    sides = {box.side for box in study.boxes if box.label == named[0]}
                    assert sides == ({"left", "right"} if item.answer == "both" else {item.answer})
                case "zone":
                    assert item.answer == drawn[named[0]]["zone"]
                case "severity":
                    grade = words[SPECS[named[0]].scale][drawn[named[0]]["severity"] - 1]
                    assert item.answer == grade
                case "device":
                    assert item.answer == drawn["support device"]["kind"]
                case "count":
                    bones = [entity for entity in study.entities if entity.observation == "fracture"]
                    assert item.answer == str(len(bones))
                case topic:
                    pytest.fail(topic)
            if item.topic not in ("plane", "abnormality") and item.answer != "no":
                assert study.labels[named[0] if named else "fracture"] == 1
    common = "yes no left right both none PA AP upper mid lower small mild moderate large severe pacemaker 2"
    assert min(answers[word] for word in common.split()) > 0


def test_of_every_finding_as_many_questions_expect_yes_as_no() -> None:
    """So that whoever sees the question alone is right half of the time."""
    source, counts = PhantomSource(6000, SIZE, 0), Counter[tuple[str, str]]()
    for i in range(len(source)):
        findings, _, view = source.plan(i)
        for item in ask(findings, view, generator(0, Stream.QUESTIONS, i)):
            if item.topic == "presence":
                (name,) = (name for name in NAMES if f" {name}" in item.question)
                counts[name, item.answer] += 1
    for name in NAMES:
        yes, no = counts[name, "yes"], counts[name, "no"]
        assert abs(yes - no) < 4 * np.sqrt(yes + no)
        assert yes + no > 1000


def test_a_finding_changes_the_pixels_of_its_box() -> None:
    """The box is where the image differs from the same study without the finding."""
    source = PhantomSource(300, SIZE, 11)
    seen = set()
    for i in range(300):
        findings, _, view = source.plan(i)
        if len(findings) != 1 or findings[0].name in seen or not findings[0].certain:
            continue
        seen.add(findings[0].name)
        anatomy = Anatomy.draw(generator(11, Stream.ANATOMY, i))
        with_it = render(anatomy, findings, view, SIZE, 11, i)
        without = render(anatomy, (), view, SIZE, 11, i)
        change = np.abs(with_it.image.astype(float) - without.image)
        inside = np.zeros((SIZE, SIZE), bool)
        for box in with_it.boxes:
            inside[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)] = True
        assert change[inside].mean() > 3 * change[~inside].mean(), findings[0].name
        assert without.boxes == []
    assert len(seen) >= 10


def test_sides_are_the_patients(studies: list[Study]) -> None:
    """The patient's left is the image's right."""
    sided = (
        "pneumothorax",
        "consolidation",
        "nodule",
        "mass",
        "atelectasis",
        "fracture",
        "pleural thickening",
    )
    checked = 0
    for study in studies:
        middle = {box.label: box.x + box.width / 2 for box in study.boxes}
        for finding in study.extra["findings"]:
            if finding["name"] in sided:
                checked += 1
                assert (middle[finding["name"]] > SIZE / 2) == (finding["side"] == "left")
                assert any(finding["side"] in sentence.lower() for sentence in study.sentences)
    assert checked > 60


def test_population() -> None:
    source = PhantomSource(3000, 64, 1)
    plans = [source.plan(i) for i in range(len(source))]
    share = {name: np.mean([any(f.name == name for f in plan[0]) for plan in plans]) for name in NAMES}
    assert len(NAMES) >= 12
    assert all(0.08 <= value <= 0.21 for value in share.values()), share
    assert 0.15 <= np.mean([not plan[0] for plan in plans]) <= 0.28
    assert 0.05 <= np.mean([not finding.certain for plan in plans for finding in plan[0]]) <= 0.15
    sides = [finding.side for plan in plans for finding in plan[0]]
    assert 0.9 < sides.count("left") / sides.count("right") < 1.1
    patients = [source.split_key(i) for i in range(len(source))]
    visits = np.unique(patients, return_counts=True)[1]
    assert 0.65 < np.mean(visits == 1) < 0.75
    assert visits.max() == 3
    together = np.mean([{"edema", "cardiomegaly"} <= {finding.name for finding in plan[0]} for plan in plans])
    assert together > 1.3 * share["edema"] * share["cardiomegaly"]


def test_a_patient_keeps_the_body_and_may_keep_findings() -> None:
    source = PhantomSource(400, 64, 2)
    kept = sum(
        finding.shape_seed in {old.shape_seed for old in prior}
        for findings, prior, _ in map(source.plan, range(400))
        if prior
        for finding in findings
    )
    assert kept > 30
    for i in range(1, 400):
        same_patient = source.split_key(i) == source.split_key(i - 1)
        assert (source.plan(i)[1] is not None) == same_patient
