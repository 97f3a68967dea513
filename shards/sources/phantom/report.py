"""Reports by a grammar: what is drawn, what is absent, what changed since the prior study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shards.sources.phantom import phrases
from shards.sources.phantom.findings import FINDINGS, SPECS, Finding
from shards.sources.phantom.phrases import pick, sentence
from shards.study import Entity

_NEGATED = 0.4  # share of absent findings the findings section negates
_LUNG = {spec.name for spec in FINDINGS if spec.site == "lung"}


@dataclass
class Report:
    """Sections by name, their sentences in report order, and the entities the sentences state.

    `statements`: sentences that say of drawn findings, and of nothing else, that they are there; with them.
    """

    sections: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    entities: list[Entity] = field(default_factory=list)
    statements: list[tuple[str, tuple[Finding, ...]]] = field(default_factory=list)

    def add_section(self, name: str, sentences: Sequence[str]) -> None:
        """Append a section."""
        written = [sentence(text) for text in sentences]
        self.sections[name] = " ".join(written)
        self.sentences.extend(written)


def write_report(
    findings: Sequence[Finding], prior: Sequence[Finding] | None, view: str, rng: np.random.Generator
) -> Report:
    """Write the report of a study.

    Args:
        findings: what is drawn; every finding is mentioned, in the findings section and mostly again in
            the impression.
        prior: findings of the patient's previous study, None for a first study.
        view: "PA" or "AP".
        rng: randomness of wording and order.
    """
    report = Report()
    absent = [spec.name for spec in FINDINGS if spec.name not in {finding.name for finding in findings}]
    body = [_positive(finding, prior, rng) for finding in findings]
    report.statements = [(sentence(text), (finding,)) for text, finding in zip(body, findings, strict=True)]
    for finding in findings:
        value = 1 if finding.certain else -1
        report.entities.extend(Entity(site, finding.name, value) for site in phrases.sites(finding))
    negated, sentences = _negatives(absent, prior, rng)
    body += sentences
    if set(absent) >= _LUNG and rng.random() < 0.5:
        body.append(pick(rng, phrases.CLEAR_LUNGS))
    if rng.random() < 0.3:
        body.append(pick(rng, phrases.ABNORMAL_ELSEWHERE))
    order = rng.permutation(len(body))
    report.add_section("comparison", ["none." if prior is None else "prior chest radiograph."])
    opening = [f"{view} view of the chest."] if rng.random() < 0.4 else []
    report.add_section("findings", opening + [body[i] for i in order])
    statements, denials = _impression(findings, absent, negated, rng)
    report.add_section("impression", [text for text, _ in statements] + denials)
    report.statements += [(sentence(text), about) for text, about in statements if about]
    report.entities.extend(Entity(SPECS[name].site, name, 0) for name in absent if name in negated)
    return report


def _change(finding: Finding, prior: Sequence[Finding]) -> str:
    before = {old.name: old for old in prior}.get(finding.name)
    if before is None or before.shape_seed != finding.shape_seed:
        return "new"
    if before.severity == finding.severity:
        return "unchanged"
    return "increased" if finding.severity > before.severity else "decreased"


def _positive(finding: Finding, prior: Sequence[Finding] | None, rng: np.random.Generator) -> str:
    """One sentence of the findings section about a drawn finding."""
    word = phrases.name_of(finding.name, rng)
    bare, phrase = phrases.noun(finding, word, rng, severity=rng.random() < 0.75)
    forms = phrases.PRESENT_MANY if phrases.many(finding) else phrases.PRESENT
    text = pick(rng, forms if finding.certain else phrases.HEDGED).format(a=phrase, bare=bare)
    if prior is not None and rng.random() < 0.7:
        text = f"{text[:-1]}, {pick(rng, phrases.CHANGES[_change(finding, prior)])}."
    return text


def _negatives(
    absent: Sequence[str], prior: Sequence[Finding] | None, rng: np.random.Generator
) -> tuple[set[str], list[str]]:
    """Sentences that deny absent findings, alone or in pairs; with the names of what they deny."""
    resolved = [old for old in prior or () if old.name in absent and rng.random() < 0.6]
    sentences = []
    for old in resolved:
        word = f"{old.side} {phrases.name_of(old.name, rng)}".strip()
        sentences.append(pick(rng, phrases.RESOLVED).format(word))
    done = {old.name for old in resolved}
    chosen = [name for name in absent if name not in done and rng.random() < _NEGATED]
    done.update(chosen)
    rest = []
    for name in chosen:
        if name == "cardiomegaly" and rng.random() < 0.4:
            sentences.append(pick(rng, phrases.NORMAL_HEART))
        elif name == "fracture" and rng.random() < 0.3:
            sentences.append(pick(rng, phrases.INTACT_BONES))
        else:
            rest.append(phrases.name_of(name, rng, canonical=0.85))
    rest = [rest[i] for i in rng.permutation(len(rest))]
    while rest:
        if len(rest) > 1 and rng.random() < 0.5:
            sentences.append(pick(rng, phrases.ABSENT_TWO).format(rest.pop(), rest.pop()))
        else:
            sentences.append(pick(rng, phrases.ABSENT).format(rest.pop()))
    return done, sentences


def _impression(
    findings: Sequence[Finding], absent: Sequence[str], negated: set[str], rng: np.random.Generator
) -> tuple[list[tuple[str, tuple[Finding, ...]]], list[str]]:
    """The impression: up to five findings by their canonical names, or that the chest is normal.

    Returns the sentences that state findings, with them, and those that deny. Absent findings it denies are
    added to `negated`.
    """
    shown = [findings[i] for i in rng.permutation(len(findings))][:5]
    shown.sort(key=lambda finding: not finding.certain)  # "possible a and b" would hedge b too
    texts = []
    for finding in shown:
        bare, _ = phrases.noun(finding, finding.name, rng, severity=rng.random() < 0.3)
        texts.append(bare if finding.certain else f"possible {bare}")
    if len(texts) > 1 and rng.random() < 0.4:
        groups = [shown[:2], *([finding] for finding in shown[2:])]
        texts = [phrases.listed(texts[:2]), *texts[2:]]
    else:
        groups = [[finding] for finding in shown]
    stated = [(f"{text}.", tuple(group)) for text, group in zip(texts, groups, strict=True)]
    if not findings:
        stated = [(pick(rng, phrases.NORMAL), ())]
    denials = []
    if rng.random() < 0.35:
        first, second = (absent[i] for i in rng.permutation(len(absent))[:2])
        denials.append(pick(rng, phrases.ABSENT_TWO).format(first, second))
        negated.update((first, second))
    return stated, denials
