"""Findings that are asked for and answered, as templates and tables of findings have them."""

from __future__ import annotations

import time

import pytest

from shards.entities.answers import statements
from shards.entities.extractor import extract


def values(text: str) -> dict[str, int]:
    """Observation -> value, of a findings section; a second, different value of one observation fails."""
    found: dict[str, int] = {}
    for entity in extract({"findings": text}):
        assert found.setdefault(entity.observation, entity.value) == entity.value
    return found


ABSENT = [
    "none.", "No.", "absent", "negative", "nil",
    "not seen", "None seen", "NONE", "no", "neg.", "none identified.",
    "None is seen.", "not present", "is not seen",
    "no evidence.", "nothing seen", "not visualized", "resolved",
    "none on this study.", "false", "0", "-", "- none", "(none)", "(-)", "= 0", "[none]", "N",
]  # fmt: skip


@pytest.mark.parametrize("answer", ABSENT)
@pytest.mark.parametrize("finding", ["Pneumothorax", "PNEUMOTHORAX", "- Left pneumothorax"])
def test_a_denied_finding_is_absent(finding: str, answer: str) -> None:
    mark = "" if answer[0] in "-([=" and len(answer) > 1 else ":"
    assert values(f"{finding}{mark} {answer}") == {"pneumothorax": 0}


@pytest.mark.parametrize(
    "text",
    [
        "Pneumothorax - no", "Pneumothorax – none", "Pneumothorax ..... absent", "Pneumothorax.....no",
        "Pneumothorax… none", "Pneumothorax     no",
        "Pneumothorax\tnone", "Pneumothorax | no |", "| Pneumothorax | absent |",
        "Pneumothorax none.", "Pneumothorax absent",
        "Pneumothorax, none.", "Pneumothorax? No.", "Pneumothorax? None seen.",
        "Pneumothorax. None.", "Pneumothorax:\nNone.",
        "Pneumothorax：no", "Pneumothorax -> no", "Pneumothorax := nil",
        "Pneumothorax on the left: none", "Pneumothorax (left): no", "Pneumothorax [ ] yes [x] no",
        "Pneumothorax: ☐ present ☒ absent", "Pneumothorax: ( ) Yes (x) No",
        "Absent pneumothorax.", "Nil pneumothorax.",
        "Pneumothorax | no | none", "Pneumothorax: none\r\n",
    ],
)  # fmt: skip
def test_every_mark_between_finding_and_answer(text: str) -> None:
    assert values(text) == {"pneumothorax": 0}


@pytest.mark.parametrize(
    "text",
    [
        "Effusion: yes, small", "Effusion: small", "Effusion: present.", "Effusion - yes", "Effusion | yes",
        "Effusion ..... present", "Effusion? Yes.", "Effusion [x] yes [ ] no", "[x] effusion", "Effusion (+)",
        "Effusion: no change", "Effusion: no significant interval change.", "Effusion: not resolved",
        "Effusion | none | small", "Effusion: unchanged",
        "Effusion: increased, no loculation.", "Small effusion.\n\nNone of the tubes moved.",
    ],
)  # fmt: skip
def test_an_affirmed_finding_is_present(text: str) -> None:
    assert values(text)["effusion"] == 1


@pytest.mark.parametrize(
    "text", ["Effusion: possible", "Effusion: cannot be excluded", "Effusion - suspected.", "Effusion: ?"]
)
def test_a_doubted_finding_is_uncertain(text: str) -> None:
    assert values(text) == {"effusion": -1}


@pytest.mark.parametrize(
    "text", ["Effusion: not assessed", "Effusion: n/a", "Effusion: unknown.", "[ ] effusion", "Effusion [ ]"]
)
def test_an_unanswered_finding_is_not_stated(text: str) -> None:
    assert values(text) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Effusion: none\nPneumothorax: no\nConsolidation: yes, small\n", (0, 0, 1)),
        ("Effusion: none Pneumothorax: no Consolidation: yes", (0, 0, 1)),
        ("Effusion: no Pneumothorax: no Consolidation: present", (0, 0, 1)),
        ("Effusion: no, pneumothorax: none, consolidation: small", (0, 0, 1)),
        ("Effusion or pneumothorax: none. Consolidation: left base.", (0, 0, 1)),
        ("Effusion / pneumothorax: none; consolidation in the left base", (0, 0, 1)),
        ("Pleural effusion, pneumothorax: absent. Consolidation.", (0, 0, 1)),
        ("|finding|seen|\n|---|---|\n|Effusion|no|\n|Pneumothorax|0|\n|Consolidation|yes|", (0, 0, 1)),
        ("Effusion ... yes\nPneumothorax ... yes\nConsolidation ... no", (1, 1, 0)),
    ],
)  # fmt: skip
def test_tables_of_findings(text: str, expected: tuple[int, int, int]) -> None:
    found = values(text)
    assert tuple(found.get(name) for name in ("effusion", "pneumothorax", "consolidation")) == expected


def test_a_quality_keeps_its_value_beside_an_answer() -> None:
    assert values("Heart size normal, effusion: none")["normal"] == 1
    assert values("Lungs: clear\nEffusion: none") == {"clear": 1, "effusion": 0}
    assert values("Heart: no cardiomegaly lungs: no effusion") == {"cardiomegaly": 0, "effusion": 0}


def test_prose_is_left_as_it_is() -> None:
    text = "The heart is normal.\nNo pneumothorax, see\nabove: stable. Seen by ___ on ___."
    assert statements(text) == [
        "The heart is normal.",
        "No pneumothorax, see above: stable.",
        "Seen by ___ on ___.",
    ]


@pytest.mark.parametrize(
    "piece", ["effusion: no ", "effusion, ", "word ", ": ", "[ ] ", "... ", "- ", "(", "\t", "|"]
)
def test_time_stays_bounded(piece: str) -> None:
    start = time.perf_counter()
    extract({"findings": "effusion" + piece * 400})
    assert time.perf_counter() - start < 5
