"""Hidden finding words: how many a method fills in, with the image of the report and with another one.

All words of a report that name an observation ("effusion", "clear"; the named classes of `shards.entities`)
are hidden at once, and the method fills them in from the other words and an image. A word is right where
every piece of it is. What the other words alone give away, the row `other-image` has too: the same network
and reports, each beside the image of another patient. `gain` is the difference, paired by word.
Our protocol: MPMA's paper reports no such number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.pairs import PairTable
from medvlp.evaluation.task import (
    EvaluationError,
    Facts,
    Needs,
    Reading,
    Role,
    Task,
    TaskResult,
    Unit,
    register,
)
from shards.entities.observations import observation_class
from shards.entities.vocabulary import EXCLUDED, TAIL

if TYPE_CHECKING:
    from torch import Tensor

    from medvlp.data.batch import Batch, Text
    from medvlp.evaluation.session import View
    from medvlp.evaluation.splits import Split
    from medvlp.methods.base import Method

OTHER_IMAGE = "other-image"
GROUP = "words"
_LETTERS = re.compile(r"[a-z]+")


def finding_named(word: str) -> str | None:
    """The class of observations that a single word names; None: none. Marks around it do not count."""
    letters = _LETTERS.findall(word.lower())
    if len(letters) != 1:
        return None
    named = observation_class(letters[0])
    return None if named in (TAIL, EXCLUDED) else named


@dataclass
class Hidden:
    """The finding words of a batch of reports.

    Attributes:
        mask: [B, L] bool, their tokens.
        words: of each: its report in the batch, its tokens, its text, and the class it names.
    """

    mask: Tensor
    words: list[tuple[int, NDArray[np.int64], str, str]]


@dataclass
class _Vocabulary:
    """Decodes every word of a split's reports once."""

    view: View
    _known: dict[tuple[int, ...], tuple[str, str | None]] = field(default_factory=dict)

    def hide(self, text: Text) -> Hidden:
        """The words of reports that name an observation."""
        import torch

        ids, index = text.input_ids.numpy(), text.word_index.numpy()
        mask = np.zeros(ids.shape, dtype=bool)
        words = []
        # Neither [CLS], [SEP] nor padding is in a sentence.
        said = (text.sentence_index.numpy() >= 0) & (text.attention_mask.numpy() > 0)
        for row in range(len(ids)):
            places = np.flatnonzero(said[row])
            cuts = np.flatnonzero(np.diff(index[row, places])) + 1
            for tokens in np.split(places, cuts) if len(places) else ():
                word, named = self._read(tuple(ids[row, tokens].tolist()))
                if named is not None:
                    mask[row, tokens] = True
                    words.append((row, tokens, word, named))
        return Hidden(torch.from_numpy(mask), words)

    def _read(self, pieces: tuple[int, ...]) -> tuple[str, str | None]:
        if pieces not in self._known:
            word = self.view.decoded(pieces)
            self._known[pieces] = "".join(_LETTERS.findall(word.lower())), finding_named(word)
        return self._known[pieces]


def _remarks(notes: Mapping[str, Any]) -> list[str]:
    if "words" not in notes:
        return []
    counts = notes["words"]
    return [f"{counts['pairs']} hidden words of {counts['images']} reports and {counts['patients']} patients"]


def _truth(data: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    return {"data.sections": sorted(data.get("sections", [])), "hidden words": notes.get("words")}


@register
class MaskedWords(Task):
    """See the module."""

    name = "masked-words"
    summary = "hidden words of findings, filled in beside the image of the report and beside another"
    reading = Reading(
        names={"accuracy": "words right", "gain": "gain over another image", "pairs": "all words"},
        summary=lambda metric: metric.endswith(("/macro", "/pairs")),
        by_finding="accuracy",
        remarks=_remarks,
        truth=_truth,
    )

    def needs(self, facts: Facts) -> Mapping[Role, Needs]:
        return {"train": Needs(), "evaluated": Needs()}

    def unavailable_with(self, method: Method) -> str | None:
        return None if method.fills_words else "does not fill in words"

    def fit(self, view: View, unit: Unit) -> str | None:
        """The finding word that most training reports' words are; None without training reports."""
        train = view.split("train")
        said = Counter(
            word
            for sentence in (
                sentence for of in (train.sentences if train is not None else ()) for sentence in of
            )
            for word in _LETTERS.findall(sentence.lower())
            if finding_named(word) is not None
        )
        # Of words that are said equally often the first in the alphabet.
        return min(said, key=lambda word: (-said[word], word)) if said else None

    def measure(self, view: View, unit: Unit, fitted: str | None) -> TaskResult:
        """Share of the hidden words that are right, by network, and by the most frequent word."""
        split = view.split("evaluated")
        assert split is not None
        table, vocabulary = PairTable(), _Vocabulary(view)
        for batch, others, rows in self._batches(view, split):
            hidden = vocabulary.hide(batch.text)
            if not hidden.words:
                continue
            right = {model: _right(view, model, batch.image, batch.text, hidden) for model in view.models}
            elsewhere = {model: _right(view, model, others, batch.text, hidden) for model in view.models}
            for number, (row, _, word, named) in enumerate(hidden.words):
                scores = {
                    model: {"accuracy": of[number], "gain": of[number] - elsewhere[model][number]}
                    for model, of in right.items()
                }
                scores[OTHER_IMAGE] = {"accuracy": elsewhere["trained"][number]}
                if fitted is not None:
                    scores["majority"] = {"accuracy": float(word == fitted)}
                table.add(rows[row], named, scores)
        if table.empty:
            raise EvaluationError(
                f"{self.name}: no report of {split.name} has a word that names an observation"
            )
        result = TaskResult(table.metrics(GROUP, view.bootstrap(split.patients)))
        result.notes = {
            "words": table.counts(split.patients),
            "most_frequent": fitted,
            "not_evaluable": [
                {"finding": name, "reason": f"in {count} report of {split.name}, needs 2"}
                for name, count in table.few().items()
            ],
        }
        return result

    def _batches(self, view: View, split: Split) -> Iterator[tuple[Batch, Tensor, list[int]]]:
        """Batches, for each sample the image of another patient, and their rows in the split."""
        positions = split.arrays.sample
        partners = other_patients(split.patients)
        if partners is None:
            raise EvaluationError(f"{self.name}: split {split.name} has a single patient, so no other image")
        known = {int(position): row for row, position in enumerate(positions)}
        dataset = view.dataset("evaluated")
        for batch in view.batches("evaluated"):
            rows = [known[position] for position in batch.sample.tolist()]
            others = dataset[positions[partners[rows]].tolist()]
            if len(others.image) != len(rows):
                raise EvaluationError(f"{self.name}: {'; '.join(others.faults)}")
            yield batch, others.image, rows


def other_patients(patients: NDArray[Any]) -> NDArray[np.int64] | None:
    """[N] rows: for each of N samples one of another patient, half the split away; None: one patient."""
    count = len(patients)
    partners = (np.arange(count) + count // 2) % max(count, 1)
    for _ in range(count):
        same = patients[partners] == patients
        if not same.any():
            return partners
        partners[same] = (partners[same] + 1) % count
    return None


def _right(view: View, model: str, image: Tensor, text: Text, hidden: Hidden) -> Sequence[float]:
    """1.0 for each hidden word whose every token a network fills in beside an image, else 0.0."""
    import torch

    device = view.device
    with torch.no_grad():
        filled = (
            view.models[model].fill_words(image.to(device), text.to(device), hidden.mask.to(device)).cpu()
        )
    same = (filled == text.input_ids).numpy()
    return [float(same[row, tokens].all()) for row, tokens, _, _ in hidden.words]
