"""Prompts of zero-shot classification: sentences that state a finding and sentences that deny it.

A prompt file is YAML with two optional sections:

    templates:                      # "{finding}" stands for the finding's name and each synonym
      positive: ["{finding}", ...]
      negative: ["no {finding}", ...]   # or statements of a normal study, without "{finding}"
    findings:
      pleural effusion:             # a label of the dataset; case, "_" and "-" do not matter
        synonyms: [effusion]        # fill the templates like the name itself
        positive: [...]             # whole sentences instead of the filled templates
        negative: [...]             # [] for methods that score a finding without denying it (MeDSLIP)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shards.errors import MedvlpError

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
        """The sentences for a label; None for a class-valued label ("sex=M") without sentences of its own."""
        own = self.findings.get(normalise(label), {})
        if "=" in label and not {"positive", "negative"} <= own.keys():
            return None
        names = (normalise(label), *own.get("synonyms", ()))
        sides = {"positive": self.positive, "negative": self.negative}
        sentences = {
            side: own[side]
            if side in own
            else tuple(dict.fromkeys(t.format(finding=name) for name in names for t in templates))
            for side, templates in sides.items()
        }
        return Prompts(**sentences)

    def unused(self, labels: Sequence[str]) -> list[str]:
        """Findings of the file that are no label of the dataset (shown: it may be a typing error)."""
        return sorted(set(self.findings) - {normalise(label) for label in labels})


def normalise(label: str) -> str:
    """A label's name as words: "Pleural_Thickening" -> "pleural thickening"."""
    return " ".join(label.replace("_", " ").replace("-", " ").lower().split())


def read(file: Path | str | None) -> PromptBook:
    """The prompts of a YAML file (see the module), or the default templates for None.

    Raises:
        PromptError: the file cannot be read, has an unknown key, or a template without "{finding}".
    """
    if file is None:
        return PromptBook()
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"evaluation.prompts={file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptError(
            f"evaluation.prompts={file}: not valid YAML: {' '.join(str(error).split())}"
        ) from error
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
        findings[normalise(str(label))] = _sides(section, place, {"synonyms", "positive", "negative"})
    return PromptBook(
        templates.get("positive", POSITIVE_TEMPLATES), templates.get("negative", NEGATIVE_TEMPLATES), findings
    )


def _section(value: Any, place: str, keys: set[str] | None) -> dict[str, Any]:
    if value is None:
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
