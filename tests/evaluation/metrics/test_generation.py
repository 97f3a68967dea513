"""Scores of texts: sacrebleu, brute-force loops and pycocoevalcap's own corpus scores as yardsticks."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from pycocoevalcap.bleu.bleu import Bleu

from medvlp.evaluation.metrics.bootstrap import PatientBootstrap
from medvlp.evaluation.metrics.generation import (
    MetricMissingError,
    bleu_counts,
    cider_d,
    corpus_bleu,
    meteor,
    meteor_exact_stem,
    rouge_l,
    score_texts,
)

WORDS = ["no", "small", "large", "left", "right", "effusion", "nodule", ".", ","]
#: Whole texts of the reference's words in another order, empty ones, single words, and copies.
EDGES = [
    ("", "no effusion ."),
    ("effusion", "no effusion ."),
    ("no effusion .", "no effusion ."),
    (". effusion no", "no effusion ."),
    ("no no no no", "no effusion ."),
    ("no effusion . no effusion .", "no effusion ."),
]


def drawn(seed: int, count: int, longest: int = 12) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)

    def text(least: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(least, longest)))

    return [text(0) for _ in range(count)], [text(1) for _ in range(count)]


def sacre(hypotheses: list[str], references: list[str], order: int) -> float:
    scorer = sacrebleu.BLEU(
        tokenize="none", smooth_method="none", max_ngram_order=order, effective_order=False
    )
    return scorer.corpus_score(hypotheses, [references]).score / 100


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_sacrebleu(seed: int, count: int) -> None:
    hypotheses, references = drawn(seed, count)
    counts = bleu_counts(hypotheses, references)
    for order in (1, 2, 3, 4):
        ours = float(corpus_bleu(counts, order)[0])
        assert ours == pytest.approx(sacre(hypotheses, references, order), abs=1e-9)


def test_bleu_equals_pycocoevalcap_where_every_order_has_a_match() -> None:
    hypotheses, references = drawn(3, 60, 25)
    hypotheses[:20] = references[:20]
    score, _ = Bleu(4).compute_score(
        {i: [text] for i, text in enumerate(references)},
        {i: [text] for i, text in enumerate(hypotheses)},
        verbose=0,
    )
    ours = [float(corpus_bleu(bleu_counts(hypotheses, references), order)[0]) for order in (1, 2, 3, 4)]
    assert min(ours) > 0
    assert ours == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("hypothesis", "reference"), EDGES)
def test_bleu_of_one_pair_at_the_edges(hypothesis: str, reference: str) -> None:
    counts = bleu_counts([hypothesis], [reference])
    for order in (1, 2, 3, 4):
        assert float(corpus_bleu(counts, order)[0]) == pytest.approx(
            sacre([hypothesis], [reference], order), abs=1e-9
        )


def test_an_empty_text_lowers_bleu_only_through_the_length() -> None:
    alone = corpus_bleu(bleu_counts(["no effusion ."], ["no effusion ."]), 1)[0]
    joined = corpus_bleu(bleu_counts(["no effusion .", ""], ["no effusion .", "a nodule ."]), 1)[0]
    assert alone == 1
    assert joined == pytest.approx(math.exp(1 - 6 / 3))


def test_weights_are_repetitions() -> None:
    hypotheses, references = drawn(5, 12, 20)
    times = np.random.default_rng(0).integers(0, 4, (5, 12))
    repeated = [
        [
            float(
                corpus_bleu(
                    bleu_counts(
                        [text for text, n in zip(hypotheses, row, strict=True) for _ in range(n)],
                        [text for text, n in zip(references, row, strict=True) for _ in range(n)],
                    ),
                    order,
                )[0]
            )
            for row in times
        ]
        for order in (1, 4)
    ]
    counts = bleu_counts(hypotheses, references)
    weighted = [corpus_bleu(counts, order, times.astype(float)).tolist() for order in (1, 4)]
    assert np.allclose(weighted, repeated, atol=1e-12)


def longest_common(first: list[str], second: list[str]) -> int:
    """By trying every subsequence of the first."""
    for size in range(min(len(first), len(second)), 0, -1):
        for chosen in itertools.combinations(first, size):
            rest = iter(second)
            if all(word in rest for word in chosen):
                return size
    return 0


def test_rouge_equals_trying_every_subsequence() -> None:
    hypotheses, references = drawn(1, 30, 9)
    hypotheses += [a for a, _ in EDGES]
    references += [b for _, b in EDGES]
    for ours, hypothesis, reference in zip(
        rouge_l(hypotheses, references), hypotheses, references, strict=True
    ):
        common = longest_common(hypothesis.split(), reference.split())
        if not common:
            assert ours == 0
            continue
        precision, recall = common / len(hypothesis.split()), common / len(reference.split())
        assert ours == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def brute_cider(hypotheses: list[str], references: list[str]) -> list[float]:
    """CIDEr-D from its definition (Vedantam et al. 2015, section 7.2: clipping and a length penalty)."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        total = 0.0
        # As published code counts it: the length is the number of word pairs.
        apart = grams(hypothesis, 2).total() - grams(reference, 2).total()
        for n in (1, 2, 3, 4):
            seen = Counter(gram for text in references for gram in set(grams(text, n)))
            rare = {
                gram: math.log(len(references) / max(1, seen[gram]))
                for gram in grams(hypothesis, n) + grams(reference, n)
            }
            one = {gram: count * rare[gram] for gram, count in grams(hypothesis, n).items()}
            two = {gram: count * rare[gram] for gram, count in grams(reference, n).items()}
            lengths = math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in two.values()))
            common = sum(min(value, two.get(gram, 0.0)) * two.get(gram, 0.0) for gram, value in one.items())
            total += (common / lengths if lengths else 0.0) * math.exp(-(apart**2) / (2 * 6.0**2))
        scores.append(10 * total / 4)
    return scores


@pytest.mark.parametrize("seed", range(3))
def test_cider_equals_its_definition(seed: int) -> None:
    hypotheses, references = drawn(seed, 15)
    assert cider_d(hypotheses, references) == pytest.approx(brute_cider(hypotheses, references), abs=1e-9)


def test_cider_of_one_pair_is_0_and_of_a_perfect_corpus_10() -> None:
    assert cider_d(["no effusion ."], ["no effusion ."]).tolist() == [0.0]
    texts = [
        "one two three four",
        "five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen",
    ]
    assert cider_d(texts, texts) == pytest.approx([10, 10, 10])


def test_all_scores_of_a_corpus_with_duplicates() -> None:
    references = ["no effusion .", "no effusion .", "a large nodule is seen .", "no nodule ."]
    hypotheses = ["no effusion .", "no effusion .", "no effusion .", ""]
    found = score_texts(hypotheses, references, PatientBootstrap(["a", "a", "b", "c"], 50, 0))
    assert found["distinct"].value == 0.5
    assert found["commonest"].value == 0.75
    assert found["length"].value == 9 / 4
    assert found["reference-length"].value == 15 / 4
    assert found["bleu-1"].low is not None
    assert found["bleu-1"].low <= found["bleu-1"].value <= (found["bleu-1"].high or 0)
    assert found["rouge-l"].value == pytest.approx(rouge_l(hypotheses, references).mean())


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no texts"):
        score_texts([], [], PatientBootstrap([], 10, 0))
    with pytest.raises(ValueError, match="1 of 2 references have no word"):
        score_texts(["a", "b"], ["a", " "], PatientBootstrap(["p", "q"], 10, 0))
    with pytest.raises(ValueError, match="2 generated texts and 1"):
        score_texts(["a", "b"], ["a"], PatientBootstrap(["p", "q"], 10, 0))


def test_without_java_there_is_no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MetricMissingError, match="no java in PATH"):
        meteor({"trained": ["a"]}, ["a"])


def test_a_java_that_dies_gives_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(MetricMissingError, match="java ended with code 3"):
        meteor({"trained": ["no effusion ."]}, ["no effusion ."])


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR 1.5 needs a java in PATH")
def test_meteor_is_of_the_pooled_statistics_and_another_metric_than_exact_stem() -> None:
    references = ["there is a large effusion .", "heart normal in size", "no effusion or nodule ||| ."]
    hypotheses = ["there is a small effusion .", "", "no effusion or nodule ."]
    found = meteor({"same": references, "other": hypotheses, "none": ["", "", ""]}, references)
    assert found["same"] == pytest.approx(1, abs=0.02)
    assert 0.2 < found["other"] < 0.6
    assert found["none"] == 0
    light = meteor_exact_stem(hypotheses, references)
    assert light[0] > 0.75  # METEOR 1.5 gives this pair 0.4
    assert light[1] == 0
