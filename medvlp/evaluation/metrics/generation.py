"""Scores of generated texts against one reference each: BLEU, ROUGE-L, CIDEr-D, METEOR, and their variety.

Counts and scores of single texts come from pycocoevalcap (the extra `evaluate`), which R2Gen and those after
it use. A text is words joined by spaces, punctuation marks being words ("no effusion ."); nothing is
lower-cased or cut here. A hypothesis may be empty: it scores 0, and its length counts in BLEU's brevity
penalty. A reference may not: there would be nothing to compare with.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medvlp.evaluation.metrics.bootstrap import Estimate, PatientBootstrap
from medvlp.evaluation.metrics.pairs import weighted_mean

Floats = NDArray[np.float64]

#: Longest n-gram of BLEU.
ORDERS = 4


class MetricMissingError(Exception):
    """A metric cannot be computed on this machine; the message says why and what to install."""


def score_texts(
    hypotheses: Sequence[str], references: Sequence[str], bootstrap: PatientBootstrap
) -> dict[str, Estimate]:
    """Every metric that needs no Java.

    Args:
        hypotheses: N generated texts. references: N texts, none of them empty.
        bootstrap: resamples of the patients of the N samples.

    Returns:
        "bleu-1" to "bleu-4": of the whole corpus, from pooled counts, in [0, 1]. "rouge-l": mean over
        samples, in [0, 1]. "cider": mean over samples, in [0, 10]; how rare an n-gram is comes from the
        references themselves, so it depends on which and how many they are, and is 0 for a single pair. In
        the resamples of its interval rareness stays that of the whole split. "length" and
        "reference-length": mean words. "distinct": share of different texts. "commonest": share of the most
        frequent one. The last two have no interval, for a resample repeats samples.

    Raises:
        ValueError: no samples, other numbers of hypotheses than of references, or an empty reference.
        MetricMissingError: the extra `evaluate` is not installed.
    """
    _check(hypotheses, references)
    counts = bleu_counts(hypotheses, references)
    found = {
        f"bleu-{order}": bootstrap.estimate(partial(corpus_bleu, counts, order))
        for order in range(1, ORDERS + 1)
    }
    for name, values in (
        ("rouge-l", rouge_l(hypotheses, references)),
        ("cider", cider_d(hypotheses, references)),
        ("length", np.array([len(text.split()) for text in hypotheses], dtype=np.float64)),
        ("reference-length", np.array([len(text.split()) for text in references], dtype=np.float64)),
    ):
        found[name] = bootstrap.estimate(partial(weighted_mean, values))
    commonest = Counter(hypotheses).most_common(1)[0][1]
    found["distinct"] = Estimate(len(set(hypotheses)) / len(hypotheses))
    found["commonest"] = Estimate(commonest / len(hypotheses))
    return found


def bleu_counts(hypotheses: Sequence[str], references: Sequence[str]) -> Floats:
    """[N, 2 + 2 * ORDERS] words of hypothesis and reference, then n-grams matched, then all, n = 1 to 4."""
    try:
        from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
    except ImportError as error:
        raise _not_installed() from error
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        cooked = cook_test(hypothesis, cook_refs([reference], n=ORDERS), n=ORDERS)
        rows.append([cooked["testlen"], cooked["reflen"][0], *cooked["correct"], *cooked["guess"]])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 + 2 * ORDERS)


def corpus_bleu(counts: Floats, order: int, weights: Floats | None = None) -> Floats:
    """BLEU of corpora that hold each sample as often as their row of weights says.

    Args:
        counts: [N, 2 + 2 * ORDERS] of `bleu_counts`. order: longest n-gram, 1 to 4.
        weights: [R, N]; default: one row of ones.

    Returns:
        [R] values in [0, 1]; 0 where an order has no match. pycocoevalcap adds 1e-15 to matches and 1e-9 to
        n-grams there, so that texts without any 4-gram score up to 0.03; elsewhere it agrees (as
        does `sacrebleu` with tokenize="none", smooth_method="none").
    """
    pooled = counts.sum(axis=0, keepdims=True) if weights is None else weights @ counts
    matched, possible = pooled[:, 2 : 2 + order], pooled[:, 2 + ORDERS : 2 + ORDERS + order]
    precision = np.divide(matched, possible, out=np.zeros_like(matched), where=possible > 0)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precision).mean(axis=1))
        brevity = np.exp(
            np.minimum(0.0, 1.0 - pooled[:, 1] / np.where(pooled[:, 0] > 0, pooled[:, 0], 1e-300))
        )
    result: Floats = mean * brevity
    return result


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> Floats:
    """[N] F of the longest common subsequence with recall weighted by 1.2 squared (pycocoevalcap `Rouge`)."""
    try:
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise _not_installed() from error
    scorer = Rouge()
    # It splits at single spaces, where an empty text is one empty word.
    return np.array(
        [
            scorer.calc_score([_spaced(hypothesis)], [_spaced(reference)]) if hypothesis.split() else 0.0
            for hypothesis, reference in zip(hypotheses, references, strict=True)
        ],
        dtype=np.float64,
    )


def cider_d(hypotheses: Sequence[str], references: Sequence[str]) -> Floats:
    """[N] CIDEr-D (sigma 6, times 10); rareness of n-grams from these references (pycocoevalcap `Cider`)."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise _not_installed() from error
    truth = {number: [text] for number, text in enumerate(references)}
    result = {number: [text] for number, text in enumerate(hypotheses)}
    _, scores = Cider().compute_score(truth, result)
    return np.asarray(scores, dtype=np.float64)


def meteor(models: Mapping[str, Sequence[str]], references: Sequence[str]) -> dict[str, float]:
    """METEOR 1.5 of the texts of each model, in [0, 1]: of the corpus, from pooled statistics.

    By pycocoevalcap's program. One Java process serves all models: it takes half a minute to start, and 2 GB.

    Raises:
        MetricMissingError: there is no `java` in PATH, or it ends before it has answered.
        ValueError: as for `score_texts`.
    """
    for hypotheses in models.values():
        _check(hypotheses, references)
    if shutil.which("java") is None:
        raise MetricMissingError("METEOR 1.5 is a Java program, and there is no java in PATH")
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise _not_installed() from error
    scorer = Meteor()
    truth = {number: [_one_line(text)] for number, text in enumerate(references)}
    found = {}
    for model, hypotheses in models.items():
        result = {number: [_one_line(text)] for number, text in enumerate(hypotheses)}
        try:
            value, _ = scorer.compute_score(truth, result)
        except (OSError, ValueError) as error:  # a closed pipe, or an empty line in place of a number
            scorer.lock.release()  # it keeps the lock, for which its own end would wait for ever
            raise MetricMissingError(f"METEOR 1.5: {_java_end(scorer.meteor_p)}") from error
        found[model] = float(value)
    return found


def meteor_exact_stem(hypotheses: Sequence[str], references: Sequence[str]) -> Floats:
    """[N] METEOR of nltk with exact and stem matches only: another metric, higher than METEOR 1.5.

    nltk's own has synonyms of WordNet too, which it loads only when a word finds no other match: without the
    data it fails on some texts and not on others. Here no word has a synonym.

    Raises:
        MetricMissingError: nltk is not installed.
    """
    try:
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise MetricMissingError("meteor_exact_stem needs nltk (pip install nltk)") from error
    pairs = zip(hypotheses, references, strict=True)
    return np.array(
        [single_meteor_score(r.split(), h.split(), wordnet=_NoSynonyms()) for h, r in pairs], dtype=np.float64
    )


class _NoSynonyms:
    """What nltk asks for synonyms of a word: there are none."""

    def synsets(self, word: str) -> list[object]:
        return []


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} generated texts and {len(references)} references")
    if not references:
        raise ValueError("no texts to score")
    if empty := sum(not text.split() for text in references):
        raise ValueError(f"{empty} of {len(references)} references have no word")


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _one_line(text: str) -> str:
    """The text as a field of METEOR's line protocol, whose fields "|||" parts."""
    return _spaced(text.replace("|||", " "))


def _not_installed() -> MetricMissingError:
    return MetricMissingError("scores of texts need pycocoevalcap: pip install medvlp[evaluate]")


def _java_end(process: subprocess.Popen[bytes]) -> str:
    try:
        return f"java ended with code {process.wait(timeout=5)}"
    except subprocess.TimeoutExpired:
        return "java gave no number"
