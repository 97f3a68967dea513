"""Prompts of zero-shot classification and grounding: sentences that state and that deny a finding.

A prompt file is YAML with two optional sections:

    templates:                      # "{finding}" stands for the finding's name and each synonym
      positive: ["{finding}", ...]
      negative: ["no {finding}", ...]   # or statements of a normal study, without "{finding}"
    findings:
      pleural effusion:             # a label of the dataset, also "Pleural_Effusion" or "PleuralEffusion"
        synonyms: [effusion]        # fill the templates like the name itself
        positive: [...]             # whole sentences instead of the filled templates
        negative: [...]             # [] for methods that score a finding without denying it (MeDSLIP)

Without sentences of its own a label that is a normal study ("No Finding", "Normal") is stated and denied by
`NORMAL` and `ABNORMAL`; one that denies a finding ("No Effusion") has the sentences of that finding with the
sides exchanged; one that names none ("Other", "sex=M") has no prompts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import DataError, MedvlpError
from shards.strict_yaml import load_yaml_text

POSITIVE_TEMPLATES = (
    "{finding}",
    "there is {finding}",
    "{finding} is present",
    "findings consistent with {finding}",
    "evidence of {finding}",
)
NEGATIVE_TEMPLATES = (
    "no {finding}",
    "there is no {finding}",
    "{finding} is absent",
    "without evidence of {finding}",
    "no evidence of {finding}",
)
#: What a study without a finding says, and what every other one might.
NORMAL = (
    "normal chest radiograph",
    "the lungs are clear",
    "the heart is normal in size",
    "no acute cardiopulmonary abnormality",
    "no focal consolidation, pleural effusion or pneumothorax",
)
ABNORMAL = (
    "abnormal chest radiograph",
    "there is an abnormality in the lungs",
    "the heart is enlarged",
    "acute cardiopulmonary abnormality",
    "focal consolidation, pleural effusion or pneumothorax",
)

_NORMAL_LABEL = re.compile(
    r"(?:no|without|negative for) (?:(?:acute|active|significant|relevant|cardiopulmonary|pulmonary|lung|"
    r"other|radiographic|any|abnormal) )*"
    r"(?:findings?|abnormalit(?:y|ies)|diseases?|process(?:es)?|patholog(?:y|ies))"
    r"|(?:a )?(?:normal|healthy|unremarkable|negative)"
    r"(?: (?:study|chest|exam(?:ination)?|film|radiograph|image|x ray|cxr|lungs?|patient|control|subject))?"
    r"|none"
)
_DENIAL = re.compile(
    r"(?:no|without|absent|absence of|negative for|free of)(?: evidence of)? (?P<finding>.+)"
)
_NO_FINDING_NAMED = re.compile(
    r"(?:.* )?(?:others?|unknown|unspecified|uncertain|miscellaneous|other findings?)"
)
#: Labels of CheXpert whose words are not those of a report, and what its labeller counts for them.
_WORDS = {"pleural other": ("pleural thickening", "pleural scarring", "fibrothorax")}
# "-is", "-us" and "-ss" are singular: "atelectasis", "situs inversus", "mass".
_PLURAL = re.compile(r".*[^isu]s")
_VERB = re.compile(r"(?<=\bthere )is(?= (?:no )?\{finding\})|(?<=\{finding\} )is\b")


class PromptError(MedvlpError):
    """A prompt file is wrong; the message names the file and the key."""

    exit_code = 2


@dataclass(frozen=True)
class Prompts:
    """The sentences of one finding; `negative` may be empty."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class PromptBook:
    """Templates and what a prompt file says about single findings (by normalised name)."""

    positive: tuple[str, ...] = POSITIVE_TEMPLATES
    negative: tuple[str, ...] = NEGATIVE_TEMPLATES
    findings: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def prompts(self, label: str) -> Prompts | None:
        """The sentences for a label; None for one that names no finding ("sex=M", "Other") and has none."""
        own = self.findings.get(normalise(label), {})
        sentences = self._filled(normalise(label), own.get("synonyms", ()))
        if "=" in label or sentences is None:
            return (
                Prompts(own["positive"], own["negative"]) if {"positive", "negative"} <= own.keys() else None
            )
        return Prompts(own.get("positive", sentences.positive), own.get("negative", sentences.negative))

    def _filled(self, name: str, synonyms: Sequence[str]) -> Prompts | None:
        """The sentences of a normalised name by templates; None where it names no finding."""
        denied = _DENIAL.fullmatch(name)
        if _NORMAL_LABEL.fullmatch(name):
            return Prompts((*NORMAL, *synonyms), ABNORMAL)
        if denied:
            of_finding = self._filled(denied["finding"], ())
            return of_finding and Prompts((*of_finding.negative, *synonyms), of_finding.positive)
        if _NO_FINDING_NAMED.fullmatch(name) and name not in _WORDS and not synonyms:
            return None
        names = (*_WORDS.get(name, () if _NO_FINDING_NAMED.fullmatch(name) else (name,)), *synonyms)
        return Prompts(tuple(_fill(self.positive, names)), tuple(_fill(self.negative, names)))

    def unused(self, labels: Sequence[str]) -> list[str]:
        """Findings of the file that are no label of the dataset (shown: it may be a typing error)."""
        return sorted(set(self.findings) - {normalise(label) for label in labels})


def is_normal_label(label: str) -> bool:
    """Whether a label says that an image shows no finding ("No Finding", "normal")."""
    return _NORMAL_LABEL.fullmatch(normalise(label)) is not None


def normalise(label: str) -> str:
    """A label's name as words: "Pleural_Thickening" and "PleuralThickening" -> "pleural thickening"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", label)
    return " ".join(words.replace("_", " ").replace("-", " ").lower().split())


def _fill(templates: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Each template with each name, once; "there are" and "are present" where the name is plural."""
    seen = set()
    for name in names:
        for template in templates:
            agreeing = _VERB.sub("are", template) if _PLURAL.fullmatch(name) else template
            sentence = agreeing.format(finding=name)
            if sentence not in seen:
                seen.add(sentence)
                yield sentence


def read(file: Path | str | None, task: str = "zero-shot") -> PromptBook:
    """The prompts of a YAML file (see the module), or the default templates for None; `task` has the key.

    Raises:
        PromptError: the file cannot be read, has an unknown key, or a template without "{finding}".
    """
    if file is None:
        return PromptBook()
    try:
        content = load_yaml_text(Path(file))
    except DataError as error:
        raise PromptError(f"evaluation.tasks.{task}.prompts={file}: {error}") from error
    content = _section(content, str(file), {"templates", "findings"})
    templates = _sides(content.get("templates"), f"{file}: templates", {"positive", "negative"})
    for side, sentences in templates.items():
        for template in sentences:
            if template.replace("{finding}", "").count("{"):
                raise PromptError(f"{file}: template {template!r} may hold no placeholder but {{finding}}")
            if side == "positive" and "{finding}" not in template:
                raise PromptError(f"{file}: positive template {template!r} needs {{finding}}")
    findings = {}
    for label, section in _section(content.get("findings"), f"{file}: findings", None).items():
        place = f"{file}: findings.{label}"
        if normalise(label) in findings:
            raise PromptError(f"{place}: {normalise(label)!r} is given twice")
        findings[normalise(label)] = _sides(section, place, {"synonyms", "positive", "negative"})
    return PromptBook(
        templates.get("positive", POSITIVE_TEMPLATES), templates.get("negative", NEGATIVE_TEMPLATES), findings
    )


def _section(value: Any, place: str, keys: set[str] | None) -> dict[str, Any]:
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise PromptError(f"{place}: expected a mapping, found {type(value).__name__}")
    unknown = set(value) - keys if keys is not None else set()
    if unknown:
        raise PromptError(
            f"{place}: unknown key {sorted(unknown, key=str)[0]!r}; there are {', '.join(sorted(keys or ()))}"
        )
    return value


def _sides(value: Any, place: str, keys: set[str]) -> dict[str, tuple[str, ...]]:
    sides = {}
    for key, sentences in _section(value, place, keys).items():
        valid = isinstance(sentences, list) and (sentences or key == "negative")
        if not valid or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise PromptError(f"{place}.{key}: expected a list of sentences")
        sides[key] = tuple(sentences)
    return sides
