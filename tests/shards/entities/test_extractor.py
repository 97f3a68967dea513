"""The rules on sentences as reports have them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.entities.extractor import StatedWords, extract, extract_sentence, stated_words
from shards.entities.landmarks import landmark
from shards.entities.observations import observation_class

Triples = set[tuple[str, str, int]]


def triples(sentence: str) -> Triples:
    return {
        (landmark(entity.anatomy), observation_class(entity.observation), entity.value)
        for entity in extract_sentence(sentence)
    }


NO_EFFUSION, NO_PNEUMOTHORAX = ("pleural_unspec", "effusion", 0), ("pleural_unspec", "pneumothorax", 0)
NO_CONSOLIDATION = ("lung_volumes", "consolidation", 0)
NORMAL_HEART = {("heart_size", "normal", 1), ("heart_size", "cardiomegaly", 0)}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("No pleural effusion or pneumothorax.", {NO_EFFUSION, NO_PNEUMOTHORAX}),
        (
            "No focal consolidation, pleural effusion, or pneumothorax identified.",
            {NO_CONSOLIDATION, NO_EFFUSION, NO_PNEUMOTHORAX},
        ),
        ("Lungs are clear without focal consolidation.", {("lung_volumes", "clear", 1), NO_CONSOLIDATION}),
        ("NEITHER CONSOLIDATION NOR PNEUMOTHORAX IS SEEN.", {NO_CONSOLIDATION, NO_PNEUMOTHORAX}),
        ("Pleural effusion and pneumothorax are not seen.", {NO_EFFUSION, NO_PNEUMOTHORAX}),
        ("No pneumothorax, small left effusion.", {NO_PNEUMOTHORAX, ("left_pleural", "effusion", 1)}),
        (
            "No effusion but persistent left basilar opacity.",
            {NO_EFFUSION, ("left_lower_lung", "opacity", 1)},
        ),
        ("No pneumothorax and the heart is normal.", {NO_PNEUMOTHORAX, *NORMAL_HEART}),
        ("Heart size is normal.", NORMAL_HEART),
        (
            "Heart size and mediastinal contours are within normal limits.",
            {*NORMAL_HEART, ("mediastinal", "normal", 1)},
        ),
        (
            "The heart is normal in size and the lungs are clear.",
            {*NORMAL_HEART, ("lung_volumes", "clear", 1)},
        ),
        ("Stable cardiomegaly.", {("heart_size", "cardiomegaly", 1)}),
        (
            "The cardiac silhouette is enlarged.",
            {("heart_size", "enlarge", 1), ("heart_size", "cardiomegaly", 1)},
        ),
        (
            "Opacity may represent atelectasis.",
            {("lung_volumes", "opacity", 1), ("lung_volumes", "atelectasis", -1)},
        ),
        ("Cannot exclude small left pneumothorax.", {("left_pleural", "pneumothorax", -1)}),
        ("Pneumonia cannot be excluded.", {("lung_volumes", "pneumonia", -1)}),
        ("Possible right pleural effusion.", {("right_pleural", "effusion", -1)}),
        (
            "Atelectasis versus pneumonia.",
            {("lung_volumes", "atelectasis", -1), ("lung_volumes", "pneumonia", -1)},
        ),
        (
            "No opacity to suggest pneumonia.",
            {("lung_volumes", "opacity", 0), ("lung_volumes", "pneumonia", 0)},
        ),
        ("The lungs are not without opacity.", {("lung_volumes", "opacity", 1)}),
        ("The left effusion has not resolved.", {("left_pleural", "effusion", 1)}),
        ("No change in left pleural effusion.", {("left_pleural", "effusion", 1)}),
        ("Previously seen left effusion has resolved.", {("left_pleural", "effusion", 0)}),
        ("The pneumothorax of the prior study is no longer seen.", {NO_PNEUMOTHORAX}),
        ("History of pneumonia.", set()),
        ("Evaluate for pneumothorax.", set()),
        (
            "Right upper and left lower lobe opacities.",
            {("upper_right_lobe", "opacity", 1), ("lower_left_lobe", "opacity", 1)},
        ),
        (
            "Opacity in the right middle and lower lobes.",
            {("middle_right_lobe", "opacity", 1), ("lower_right_lobe", "opacity", 1)},
        ),
        ("Bilateral pleural effusions.", {("left_pleural", "effusion", 1), ("right_pleural", "effusion", 1)}),
        (
            "Low lung volumes with bibasilar atelectasis.",
            {("lung_volumes", "low", 1), ("lung_bases", "atelectasis", 1)},
        ),
        ("Blunting of the right costophrenic angle.", {("right_costophrenic", "blunt", 1)}),
        ("Elevated right hemidiaphragm.", {("right_diaphragm", "elevation", 1)}),
        ("Left chest tube as medical device.", {("left_pleural", "tube", 1), ("left_pleural", "device", 1)}),
        ("Tip of the PICC line in the SVC.", {("svc", "tip", 1), ("svc", "picc", 1)}),
        ("No acute findings.", {("unspecified", "finding", 0)}),
        ("Findings as above.", set()),
        ("PA and lateral views of the chest.", set()),
        ("", set()),
    ],
)
def test_sentence(sentence: str, expected: Triples) -> None:
    assert triples(sentence) == expected


LUNG, LEFT_LUNG, PLEURA = "lung_volumes", "left_lung_unspec", "pleural_unspec"
BOTH_EFFUSIONS = {("left_pleural", "effusion", 1), ("right_pleural", "effusion", 1)}
ONE_EFFUSION = {("left_pleural", "effusion", 1), ("right_pleural", "effusion", 0)}
TUBE, NO_TUBE = {("right_pleural", "tube", 1)}, {("right_pleural", "tube", 0)}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        # What is not displaced, or calcified, is there.
        ("Non-displaced rib fracture.", {("rib", "fracture", 1)}),
        ("Non-specific opacity in the left lower lobe.", {("lower_left_lobe", "opacity", 1)}),
        ("Non calcified nodule.", {(LUNG, "nodule", 1), (LUNG, "calcification", 0)}),
        ("Non-visualization of the pneumothorax.", {NO_PNEUMOTHORAX}),
        # What is gone in part is there.
        ("Pneumothorax has partially resolved.", {(PLEURA, "pneumothorax", 1)}),
        ("Pneumothorax has almost completely resolved.", {(PLEURA, "pneumothorax", 1)}),
        ("Effusion has largely cleared.", {(PLEURA, "effusion", 1)}),
        ("Effusion is mostly resolved.", {(PLEURA, "effusion", 1)}),
        ("Incomplete resolution of the effusion.", {(PLEURA, "effusion", 1)}),
        ("Near-complete clearing of the opacity.", {(LUNG, "opacity", 1)}),
        ("Pneumothorax has completely resolved.", {NO_PNEUMOTHORAX}),
        ("Complete resolution of the effusion.", {NO_EFFUSION}),
        ("Right pneumothorax, now resolved.", {("right_pleural", "pneumothorax", 0)}),
        ("Effusion, now resolved pneumothorax.", {(PLEURA, "effusion", 1), NO_PNEUMOTHORAX}),
        # How far "no" reaches.
        ("No worsening of the opacity.", {(LUNG, "opacity", 1)}),
        (
            "No enlargement of the pneumothorax.",
            {("unspecified", "enlarge", 0), (PLEURA, "pneumothorax", 1)},
        ),
        ("No enlargement of the heart.", {("heart_size", "enlarge", 0), ("heart_size", "cardiomegaly", 0)}),
        (
            "No pneumothorax following placement of right chest tube.",
            {NO_PNEUMOTHORAX, ("right_pleural", "tube", 1)},
        ),
        (
            "No pneumothorax after removal of left chest tube.",
            {NO_PNEUMOTHORAX, ("left_pleural", "tube", 0)},
        ),
        ("No effusion (pneumothorax present).", {NO_EFFUSION, (PLEURA, "pneumothorax", 1)}),
        ("No pneumothorax and moderate cardiomegaly.", {NO_PNEUMOTHORAX, ("heart_size", "cardiomegaly", 1)}),
        ("No pneumothorax and large effusion.", {NO_PNEUMOTHORAX, (PLEURA, "effusion", 1)}),
        ("No pneumothorax or large effusion.", {NO_PNEUMOTHORAX, NO_EFFUSION}),
        ("No right effusion, and only a tiny left effusion.", ONE_EFFUSION),
        ("No right effusion, only a tiny left effusion.", ONE_EFFUSION),
        ("No right effusion and minimal residual left effusion.", ONE_EFFUSION),
        (
            "Possible pneumonia and small left effusion.",
            {(LUNG, "pneumonia", -1), ("left_pleural", "effusion", -1)},
        ),
        (
            "The heart is not enlarged and mediastinal contours are normal.",
            {("heart_size", "enlarge", 0), ("heart_size", "cardiomegaly", 0), ("mediastinal", "normal", 1)},
        ),
        # What is seen behind the last comma of a denied list is denied too, where the list goes on to it.
        (
            "No consolidation, effusion, and pneumothorax are seen.",
            {NO_CONSOLIDATION, (PLEURA, "effusion", 0), NO_PNEUMOTHORAX},
        ),
        (
            "No consolidation, no effusion, and cardiomegaly is seen.",
            {NO_CONSOLIDATION, (PLEURA, "effusion", 0), ("heart_size", "cardiomegaly", 1)},
        ),
        (
            "No effusion, consolidation, and the heart is normal.",
            {(PLEURA, "effusion", 0), NO_CONSOLIDATION, *NORMAL_HEART},
        ),
        (
            "Consolidation, effusion, and pneumothorax are absent.",
            {NO_CONSOLIDATION, NO_EFFUSION, NO_PNEUMOTHORAX},
        ),
        (
            "Atelectasis, mass, and edema of the left lung was resolved.",
            {(LEFT_LUNG, "atelectasis", 1), (LEFT_LUNG, "mass", 1), (LEFT_LUNG, "edema", 0)},
        ),
        (
            "Consolidation, effusion, and pneumothorax has resolved.",
            {(LUNG, "consolidation", 1), (PLEURA, "effusion", 1), NO_PNEUMOTHORAX},
        ),
        (
            "Consolidation, effusion, and pneumothorax is not seen.",
            {NO_CONSOLIDATION, NO_EFFUSION, NO_PNEUMOTHORAX},
        ),
        # Wires are no bones.
        ("Leads are intact.", {("other", "lead", 1), ("unspecified", "intact", 1)}),
        ("Sternotomy sutures are intact.", {("unspecified", "intact", 1)}),
        ("Bones are intact.", {("other", "intact", 1), ("other", "fracture", 0)}),
        # What was taken out is gone; what stands beside it is not.
        ("Interval removal of the right chest tube.", NO_TUBE),
        ("Right chest tube has been removed.", NO_TUBE),
        ("No pneumothorax, right chest tube removed.", {NO_PNEUMOTHORAX, *NO_TUBE}),
        ("Pneumothorax after the right chest tube was removed.", {(PLEURA, "pneumothorax", 1), *NO_TUBE}),
        ("Pneumothorax, chest tube removed.", {(PLEURA, "pneumothorax", 1), (PLEURA, "tube", 0)}),
        ("The right chest tube has not been removed.", TUBE),
        ("The right chest tube should be removed.", TUBE),
        ("Consider removal of the right chest tube.", TUBE),
        (
            "Removal of the right chest tube and placement of left pigtail catheter.",
            {*NO_TUBE, ("left_pleural", "tube", 1)},
        ),
        # Doubt and denial in other words.
        ("Unlikely pneumonia.", {(LUNG, "pneumonia", -1)}),
        ("Doubt pneumonia.", {(LUNG, "pneumonia", -1)}),
        ("Pneumonia is unlikely.", {(LUNG, "pneumonia", -1)}),
        ("Findings are inconsistent with pneumonia.", {(LUNG, "pneumonia", 0)}),
        ("Findings are consistent with pneumonia.", {(LUNG, "pneumonia", 1)}),
        ("R/o pneumonia.", set()),
        ("Pneumothorax cannot be identified.", {NO_PNEUMOTHORAX}),
        ("Opacity cannot be well seen on the lateral view.", {(LUNG, "opacity", 1)}),
        ("Opacity on the frontal view, not seen on the lateral view.", {(LUNG, "opacity", 1)}),
        ("Opacity is not well-seen.", {(LUNG, "opacity", 0)}),
        ("Opacity is not as well seen as before.", {(LUNG, "opacity", 1)}),
        ("Fractures may not be demonstrated.", {("other", "fracture", -1)}),
        # Sides.
        ("Effusion: none; small heart.", {NO_EFFUSION}),
        ("Effusion: none on the right; small heart.", {(PLEURA, "effusion", 0)}),
        (
            "Effusion: none on the right; left lung clear.",
            {(PLEURA, "effusion", 0), (LEFT_LUNG, "clear", 1)},
        ),
        ("Effusion: small on the right; moderate on the left.", BOTH_EFFUSIONS),
        ("Effusion: loculated on the right; small and layering on the left.", BOTH_EFFUSIONS),
        ("Effusion: none on the right; obscured on the left.", {NO_EFFUSION, ("unspecified", "obscure", 1)}),
        ("Small right, no left apex and effusion.", {NO_EFFUSION}),  # nothing of the sides is theirs
        ("Small right and moderate left pleural effusions.", BOTH_EFFUSIONS),
        ("Small right and moderate left effusions.", BOTH_EFFUSIONS),
        ("Left greater than right pleural effusions.", BOTH_EFFUSIONS),
        (
            "Left greater than right hilar opacity.",
            {("left_hilar", "opacity", 1), ("right_hilar", "opacity", 1)},
        ),
        ("Effusions on the right and left.", BOTH_EFFUSIONS),
        ("New right and stable left pleural effusions.", BOTH_EFFUSIONS),
        ("Pleural effusion on the left.", {("left_pleural", "effusion", 1)}),
        ("No pleural effusion on the right, small effusion on the left.", ONE_EFFUSION),
        (
            "Pleural effusion on the left and right lower lobe opacity.",
            {("left_pleural", "effusion", 1), ("lower_right_lobe", "opacity", 1)},
        ),
        (
            "No consolidation on the right, left lower lobe consolidation is present.",
            {("right_lung_unspec", "consolidation", 0), ("lower_left_lobe", "consolidation", 1)},
        ),
        ("No effusion on the right and small left pleural effusion.", ONE_EFFUSION),
        ("RLL pneumonia.", {("lower_right_lobe", "pneumonia", 1)}),
        ("LUL opacity.", {("upper_left_lobe", "opacity", 1)}),
        ("RML opacity.", {("middle_right_lobe", "opacity", 1)}),
        ("Rt effusion.", {("right_pleural", "effusion", 1)}),
        ("Lt pleural effusion.", {("left_pleural", "effusion", 1)}),
    ],
)
def test_phrases_that_turn_a_finding_over_or_name_its_side(sentence: str, expected: Triples) -> None:
    assert {
        (landmark(entity.anatomy), observation_class(entity.observation), entity.value)
        for entity in extract({"findings": sentence})
    } == expected


@pytest.mark.parametrize(
    "sentence",
    [
        "No right and small left effusion.",
        "No right and small to moderate left pleural effusion.",
        "No right-sided and a stable small left-sided effusion.",
        "No right, small left pleural effusion.",
        "Small left and no right effusion.",
        "Trace left, but no right pleural effusion.",
        "No significant right and small left effusion.",
        "No evidence of a right, but small left effusion.",
        "No right effusion and small left effusion.",
        "No right effusion and new moderate left effusion is seen.",
        "No right-sided and only a small left-sided effusion.",
        "No effusion on the right and small effusion on the left.",
        "Effusion: none on the right; small on the left.",
        "Pleural effusion: none on the right, trace on the left.",
        "Effusion: present on the left; none on the right.",
        "Effusion: none on the right; loculated on the left.",
        "Effusion: small left, none right.",
        "Effusion: right none, left small.",
    ],
)
def test_a_finding_on_one_side_that_is_denied_on_the_other(sentence: str) -> None:
    assert {
        (landmark(entity.anatomy), observation_class(entity.observation), entity.value)
        for entity in extract({"findings": sentence})
    } == ONE_EFFUSION


@pytest.mark.parametrize(
    "sentence",
    ["No right and small left effusion or pneumothorax.", "Small left, no right effusion or pneumothorax."],
)
def test_what_goes_on_with_or_is_denied_as_well(sentence: str) -> None:
    assert NO_PNEUMOTHORAX in triples(sentence)


@pytest.mark.parametrize(
    ("sentence", "right", "left"),
    [
        ("Possible right and small left effusion.", -1, 1),
        ("Large right, possible left pleural effusion.", 1, -1),
        ("Effusion: possible on the left, none on the right.", 0, -1),
        ("Possible right and left effusions.", -1, -1),
    ],
)
def test_a_finding_that_is_doubted_on_one_side(sentence: str, right: int, left: int) -> None:
    assert triples(sentence) == {("right_pleural", "effusion", right), ("left_pleural", "effusion", left)}


@pytest.mark.parametrize("sentence", ["No right or left effusion.", "No right and no left effusion."])
def test_a_finding_that_is_denied_on_both_sides(sentence: str) -> None:
    assert triples(sentence) == {("right_pleural", "effusion", 0), ("left_pleural", "effusion", 0)}


def test_only_sections_about_this_study_are_read() -> None:
    sections = {
        "indication": "Pneumonia.",
        "history": "Left effusion.",
        "comparison": "Pneumothorax.",
        "findings": "No effusion. No effusion.",
        "impression": "Cardiomegaly.",
    }
    assert [(entity.observation, entity.value) for entity in extract(sections)] == [
        ("effusion", 0),
        ("cardiomegaly", 1),
    ]


WORDS = (
    *(
        "no",
        "left",
        "right",
        "lower",
        "lobe",
        "opacity",
        ",",
        "and",
        "or",
        ".",
        "the",
        "is",
        "effusion",
        "in",
    ),
    *("possible", "without", "but", "seen", "5th", "rib"),
)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(WORDS), max_size=40), st.text(max_size=40))
def test_any_text_gives_well_formed_entities_once(words: list[str], text: str) -> None:
    for report in (" ".join(words), text):
        entities = extract({"findings": report})
        assert len(set(entities)) == len(entities)
        assert all(e.value in (-1, 0, 1) and e.anatomy and e.observation for e in entities)


@pytest.mark.parametrize(
    "word", ["diffuse ", "left ", "no ", "in ", "fifth and ", "upper, ", "opacity ", "a", " ", ","]
)
def test_time_stays_bounded_on_a_sentence_without_end(word: str) -> None:
    start = time.perf_counter()
    extract_sentence("mild " + word * 400 + "effusion")
    assert time.perf_counter() - start < 5


def test_the_words_that_state_something_have_their_place() -> None:
    shown, found = stated_words("No  effusion.\nPossible LEFT edema. Stable mild cardiomegaly.")
    assert shown == "no effusion. possible left edema. stable mild cardiomegaly."
    assert [(shown[of.start : of.end], of.value) for of in found] == [
        ("effusion", 0), ("edema", -1), ("cardiomegaly", 1),
    ]  # fmt: skip
    assert found[0] == StatedWords(3, 11, ("effusion",), 0)
    # A question and its answer are put together anew: there is no place to mark.
    assert stated_words("Effusion?\nNone.")[1] == []
    assert len(stated_words("Small right and moderate left effusion.")[1]) == 1
    # One word that is there and not there: whichever value it had would contradict the entities.
    assert stated_words("Small left and no right effusion.")[1] == []
