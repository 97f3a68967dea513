"""Words of reports as they are scored: ours and R2Gen's published cleaning."""

import pytest

from medvlp.data.questions import asked, text_code
from medvlp.data.report import r2gen_words, scored_words


@pytest.mark.parametrize(
    ("text", "ours", "published"),
    [
        ("No effusion.", "no effusion .", "no effusion ."),
        ("A 2.5 cm nodule.", "a 2 . 5 cm nodule .", "a 25 cm nodule ."),
        ("Left/right: <clear>", "left right clear", "leftright clear ."),
        ("1. No edema. 2. Plate-like\ncollapse..", "1 . no edema . 2 . plate like collapse .",
         "no edema . plate-like collapse ."),
        ("___ year old 3. Mass", "year old 3 . mass", "year old . mass ."),
        ("", "", "."),
        (" ... ", "", "."),
    ],
)  # fmt: skip
def test_words(text: str, ours: str, published: str) -> None:
    assert " ".join(scored_words(text)) == ours
    assert " ".join(r2gen_words(text)) == published


def test_words_are_the_same_after_a_wordpiece_vocabulary_has_set_marks_apart() -> None:
    text = "Plate-like 2.5 cm opacity, unchanged."
    assert scored_words("plate - like 2 . 5 cm opacity , unchanged .") == scored_words(text)
    assert scored_words(" ".join(scored_words(text))) == scored_words(text)


def test_questions_in_other_languages_are_not_asked() -> None:
    metadata = {"questions": [{"question": "a", "language": "zh"}, {"question": "b", "language": "en"}]}
    assert [item["question"] for item in asked(metadata)] == ["b"]


def test_codes_tell_texts_apart_and_are_never_0() -> None:
    codes = {text_code(f"answer {number}") for number in range(10_000)}
    assert len(codes) == 10_000
    assert all(0 < code < 2**63 for code in codes)
