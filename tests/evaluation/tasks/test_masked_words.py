"""Hidden finding words: which words are hidden, what counts as right, and what another image is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvlp.data.batch import Text
from medvlp.data.text import Tokenizer
from medvlp.evaluation import evaluate as evaluation
from medvlp.evaluation.evaluate import EvaluationOptions, evaluate
from medvlp.evaluation.tasks.masked_words import MaskedWords, finding_named, other_patients
from medvlp.methods.mpma.method import MPMA
from tests.launcher.tiny_run import make_run, make_shards

MPMA_RUN = ["method.name=mpma", "method.fusion_heads=2", "method.fusion_hidden=16", "method.fusion_layers=1"]
MPMA_RUN += ["method.memory_slots=2", "method.memory_highest=1", "method.decoder_width=16"]
MPMA_RUN += [
    "method.decoder_layers=1",
    "method.decoder_heads=2",
    "method.embedding=8",
    "method.head_hidden=16",
]
#: Keys that MPMA does not have.
NOT_OF_MPMA = frozenset({"method.prototypes"})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    return make_run(shards, shards.parent / "run", *MPMA_RUN, without=NOT_OF_MPMA)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("Effusions", "effusion"),
        (" effusion.", "effusion"),
        ("clear", "clear"),
        ("dilated", "dilation"),
        ("heart", None),
        ("mild", None),
        ("unchanged", None),
        (".", None),
        ("air-space", None),
    ],
)
def test_words_that_name_an_observation(word: str, named: str | None) -> None:
    assert finding_named(word) == named


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_another_image_is_of_another_patient(numbers: list[int]) -> None:
    patients = np.array([f"p{number}" for number in numbers])
    partners = other_patients(patients)
    if len(set(numbers)) == 1:
        assert partners is None
    else:
        assert partners is not None
        assert (patients[partners] != patients).all()


class Watched:
    """Stands in for `MPMA.fill_words`: fills in the truth where the image is the report's own."""

    def __init__(self) -> None:
        self.own: dict[bytes, bytes] = {}
        self.hidden: list[tuple[Text, torch.Tensor]] = []

    def __call__(self, image: torch.Tensor, text: Text, hidden: torch.Tensor) -> torch.Tensor:
        self.hidden.append((text, hidden))
        filled = text.input_ids.clone()
        for row in range(len(image)):
            shown, said = image[row].numpy().tobytes(), text.input_ids[row].numpy().tobytes()
            # A report is first seen beside its own image.
            if self.own.setdefault(said, shown) != shown:
                filled[row][hidden[row]] = 0
        return filled


def test_only_finding_words_are_hidden_and_the_image_decides(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    monkeypatch.setattr(MPMA, "fill_words", lambda self, *of: watched(*of))
    session = evaluation._open(EvaluationOptions(run), lambda line: None)
    task = MaskedWords(session.config.evaluation.tasks["masked-words"])
    session.expect(task)
    (unit,) = task.units()
    most = task.fit(session.view(task, ("train", "selection"), None), unit)
    result = task.measure(session.view(task, ("evaluated",), None), unit, most)
    accuracy = {model: of["accuracy/words/pairs"].value for model, of in result.models.items()}
    # Two reports may be the same text, and the second is then taken for one beside another image.
    assert accuracy["trained"] > 0.8
    assert accuracy["other-image"] < 0.1
    gain = result.models["trained"]["gain/words/pairs"]
    assert gain.value == pytest.approx(accuracy["trained"] - accuracy["other-image"])
    assert 0 < accuracy["majority"] < 0.6
    tokenizer = Tokenizer.load(None, run)
    hidden = count = 0
    for text, mask in watched.hidden:
        for row, chosen in zip(text.input_ids, mask, strict=True):
            count += 1
            words = tokenizer.decode(row[chosen].tolist()).split()
            assert all(finding_named(word) for word in words), words
            left = tokenizer.decode(row[~chosen].tolist()).split()
            assert not any(finding_named(word) for word in left if "#" not in word), left
            hidden += len(words)
    assert hidden > count


def test_words_of_a_run(run: Path) -> None:
    """Through the command's function: the same numbers whatever the batch."""
    found = []
    for batch in (7, 64):
        options = EvaluationOptions(
            run, tasks=["masked-words"], fresh=True, overrides=[f"evaluation.batch={batch}"]
        )
        models = evaluate(options, lambda line: None).results["masked-words"]
        assert models.keys() == {"trained", "untrained", "other-image", "majority"}
        found.append(models)
    assert found[0] == found[1]


def test_a_method_without_words_says_so(shards: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(make_run(shards, tmp_path / "run"), tasks=["masked-words"])
    found = evaluate(options, lambda line: None)
    assert not found.results["masked-words"]
    assert "does not fill in words" in str(found.notes["masked-words"])
