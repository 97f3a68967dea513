"""The report decoder: its search against one written out by hand and against trying everything; its cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from medvlp.evaluation.heads.report_decoder import ReportDecoder

PAD, BOS, EOS = 0, 1, 2


def small(beams: int, max_words: int, vocabulary: int = 6, seed: int = 0) -> ReportDecoder:
    """Weights so large that words are more than equally likely, and that short reports do not always win."""
    torch.manual_seed(seed)
    decoder = ReportDecoder(5, 4, vocabulary, PAD, BOS, EOS, max_words, 16, 1, 2, 16, 0.0, beams).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.7)
        decoder.words.bias[EOS] = -1.0
    return decoder


def log_probabilities(decoder: ReportDecoder, patches: Tensor, words: list[int]) -> Tensor:
    """[len(words) + 1, V] of the word after each beginning, `pad` and `bos` impossible; without a cache."""
    logits = decoder(patches, torch.tensor([[BOS, *words]])).logits[0]
    found = torch.log_softmax(logits, dim=-1)
    found[:, [PAD, BOS]] = -torch.inf
    return found


def score(decoder: ReportDecoder, patches: Tensor, words: list[int]) -> float:
    """Sum of log-probabilities of a report with what ends it, or of one cut at the longest length."""
    found = log_probabilities(decoder, patches, words[:-1])
    return float(sum(found[place, word] for place, word in enumerate(words)))


def by_hand(decoder: ReportDecoder, patches: Tensor, beams: int, most: int) -> list[int]:
    """Beam search to the greatest length; beams that are alive there count as finished."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for _ in range(most):
        grown = [
            (value + float(step), [*words, word])
            for value, words in alive
            for word, step in enumerate(log_probabilities(decoder, patches, words)[-1])
        ]
        grown.sort(key=lambda item: -item[0])
        finished += [item for item in grown[:beams] if item[1][-1] == EOS]
        alive = [item for item in grown if item[1][-1] != EOS][:beams]
    return max(finished + alive, key=lambda item: item[0])[1]


def written(decoder: ReportDecoder, patches: Tensor) -> list[int]:
    words = decoder.write(patches)[0].tolist()
    return words[: words.index(PAD)] if PAD in words else words


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("beams", [1, 3])
def test_the_search_is_the_one_written_out_by_hand(seed: int, beams: int) -> None:
    decoder, patches = small(beams, 7, seed=seed), torch.randn(1, 4, 5)
    assert written(decoder, patches) == by_hand(decoder, patches, beams, 7)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_with_enough_beams_nothing_is_more_probable(seed: int) -> None:
    decoder, patches = small(60, 3, vocabulary=5, seed=seed), torch.randn(1, 4, 5)
    words = [word for word in range(5) if word not in (PAD, BOS)]
    every = [
        list(report)
        for length in (1, 2, 3)
        for report in itertools.product(words, repeat=length)
        if EOS not in report[:-1] and (report[-1] == EOS or length == 3)
    ]
    best = max(every, key=lambda report: score(decoder, patches, report))
    assert written(decoder, patches) == best


@torch.no_grad()
def test_dividing_by_the_length_gives_other_reports() -> None:
    """The default of `generate`, which prefers longer reports than the sum of log-probabilities."""
    summed, divided = [], []
    for seed in range(8):
        decoder, patches = small(3, 7, seed=seed), torch.randn(1, 4, 5)
        summed.append(len(written(decoder, patches)))
        decoder.generation_config.length_penalty = 1.0
        divided.append(len(written(decoder, patches)))
    assert sum(divided) > sum(summed)


@torch.no_grad()
def test_reports_of_a_batch_are_those_of_each_image_alone() -> None:
    decoder, patches = small(3, 7, seed=4), torch.randn(5, 4, 5)
    together = decoder.write(patches)
    assert together.shape == (5, 7)
    assert torch.equal(together, torch.cat([decoder.write(one[None]) for one in patches]))


@torch.no_grad()
def test_the_cache_changes_nothing() -> None:
    decoder, patches = small(3, 9, seed=1), torch.randn(3, 4, 5)
    with_cache = decoder.write(patches)
    decoder.generation_config.use_cache = False
    assert torch.equal(decoder.write(patches), with_cache)


def test_every_weight_learns_and_a_report_can_be_learned_by_heart() -> None:
    torch.manual_seed(0)
    decoder = ReportDecoder(5, 4, 8, PAD, BOS, EOS, 6, 32, 2, 4, 32, 0.0)
    patches = torch.randn(2, 4, 5)
    reports = torch.tensor([[3, 4, 5, EOS], [6, 7, EOS, PAD]])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    given = torch.cat([torch.full((2, 1), BOS), reports[:, :-1]], dim=1)
    for _ in range(120):
        logits = decoder(patches, given).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), reports, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    decoder.eval()
    assert decoder.write(patches).tolist() == [[*report, PAD, PAD] for report in reports.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 128, 512])
def test_a_newly_drawn_decoder_sees_the_image_at_any_width(width: int) -> None:
    """Drawn with BART's deviation of 0.02, words at width 32 differ between images by less than 0.001."""
    torch.manual_seed(0)
    decoder = ReportDecoder(48, 16, 60, PAD, BOS, EOS, 9, width, 2, 4, width, 0.0).eval()
    given = torch.full((8, 5), 3)
    given[:, 0] = BOS
    logits = decoder(torch.randn(8, 16, 48), given).logits[:, -1]
    assert (logits.std(dim=0).mean() / logits.std()) > 0.1
