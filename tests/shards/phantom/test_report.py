"""The report grammar: it says what the image shows, in many ways, and nothing else."""

from __future__ import annotations

import re

import pytest

from shards.sources.phantom import FINDINGS, PhantomSource
from shards.sources.phantom.phrases import article, listed
from shards.sources.phantom.report import Report, write_report
from shards.sources.phantom.seeds import Stream, generator

NAMES = [spec.name for spec in FINDINGS]
WORDS = {spec.name: (spec.name, *spec.synonyms) for spec in FINDINGS}
NEGATIVE = re.compile(r"\b(no|negative for|neither|has resolved|no longer)\b")
HEDGE = re.compile(r"\b(possible|questionable|cannot be excluded|may represent|suspected)\b")


@pytest.fixture(scope="module")
def reports() -> list[tuple[dict[str, int], Report]]:
    source = PhantomSource(600, 64, 4)
    written = []
    for i in range(len(source)):
        findings, prior, view = source.plan(i)
        labels = dict.fromkeys(NAMES, 0) | {f.name: 1 if f.certain else -1 for f in findings}
        written.append((labels, write_report(findings, prior, view, generator(4, Stream.REPORT, i))))
    return written


def mentions(sentence: str) -> set[str]:
    """Findings a sentence names, by canonical name or synonym."""
    return {
        name
        for name, words in WORDS.items()
        if any(re.search(rf"\b{word}s?\b", sentence.lower()) for word in words)
    }


def test_synonyms_name_one_finding_only() -> None:
    words = [word for group in WORDS.values() for word in group]
    assert len(words) == len(set(words))
    assert all(mentions(word) == {name} for name, group in WORDS.items() for word in group)


def test_every_statement_is_true(reports: list[tuple[dict[str, int], Report]]) -> None:
    for labels, report in reports:
        told = set()
        for sentence in report.sentences:
            text = sentence.lower()
            for name in mentions(sentence):
                if NEGATIVE.search(text):
                    assert labels[name] == 0, sentence
                else:
                    assert labels[name] != 0, sentence
                    told.add(name)
                    if labels[name] == -1:
                        assert HEDGE.search(text), sentence
        assert told == {name for name, value in labels.items() if value}


def test_certain_findings_are_not_hedged(reports: list[tuple[dict[str, int], Report]]) -> None:
    """Where one sentence joins a certain and a hedged finding, the certain one comes before the hedge."""
    for labels, report in reports:
        for sentence in report.sentences:
            hedge = HEDGE.search(sentence.lower())
            certain = {name for name in mentions(sentence) if labels[name] == 1}
            if hedge and certain:
                assert certain <= mentions(sentence[: hedge.start()]), sentence


def test_sections_hold_the_sentences(reports: list[tuple[dict[str, int], Report]]) -> None:
    for _, report in reports:
        assert list(report.sections) == ["comparison", "findings", "impression"]
        assert all(report.sections.values())
        assert " ".join(report.sections.values()) == " ".join(report.sentences)
        assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in report.sentences)
        assert not any("  " in sentence or "{" in sentence for sentence in report.sentences)


def test_negative_entities_are_what_the_text_denies(reports: list[tuple[dict[str, int], Report]]) -> None:
    implied = {"cardiomegaly", "fracture"}  # "heart size is normal", "the bones are intact"
    for _, report in reports:
        denied = {entity.observation for entity in report.entities if entity.value == 0}
        named = {name for s in report.sentences if NEGATIVE.search(s.lower()) for name in mentions(s)}
        assert named <= denied
        assert denied - named <= implied


def test_reports_vary(reports: list[tuple[dict[str, int], Report]]) -> None:
    texts = [" ".join(report.sentences) for _, report in reports]
    assert len(set(texts)) > 0.97 * len(texts)
    words = {word for text in texts for word in re.findall(r"[a-z-]+", text.lower())}
    assert 120 < len(words) <= 400
    whole = " ".join(texts).lower()
    for name in NAMES:
        assert f"no {name}" in whole
        assert all(synonym in whole for synonym in WORDS[name])
    for phrase in (
        "unchanged from prior",
        "new since the prior study",
        "has resolved",
        "improved since",
        "worse",
    ):
        assert phrase in whole


def test_prior_remarks_need_a_prior() -> None:
    source = PhantomSource(300, 64, 9)
    for i in range(300):
        findings, prior, view = source.plan(i)
        text = " ".join(write_report(findings, prior, view, generator(9, Stream.REPORT, i)).sentences)
        if prior is None:
            assert "rior" not in text
        else:
            assert "Prior chest radiograph." in text


def test_words() -> None:
    assert article("enlarged heart") == "an enlarged heart"
    assert article("mass") == "a mass"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
