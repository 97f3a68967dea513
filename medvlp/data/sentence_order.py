"""Another order of a report's sentences at every access, as PRIOR trains (its section on data)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medvlp.data.text import TokenRows


def shuffle_sentences(
    rows: TokenRows, selection: NDArray[np.int64], draw: Callable[[int, int], NDArray[np.uint64]]
) -> TokenRows:
    """The selected reports with their sentences in an order of chance; tokens keep theirs inside a sentence.

    Reports are shuffled whole, so that cutting them afterwards drops other sentences each time.
    With a byte-level tokenizer the space before a sentence travels with it.

    Args:
        rows: stored reports.
        selection: [B] which reports.
        draw: (report, n) -> [n] uniform 64-bit words of this report.

    Returns:
        The B reports, sentences renumbered from 0 in their new order.
    """
    ids, sentences, lengths = [], [], []
    for report in selection.tolist():
        tokens = slice(rows.offsets[report], rows.offsets[report + 1])
        numbers = np.asarray(rows.sentences[tokens])
        count = int(numbers.max(initial=-1)) + 1
        place = np.argsort(np.argsort(draw(report, count), kind="stable"), kind="stable")[numbers]
        order = np.argsort(place, kind="stable")
        ids.append(np.asarray(rows.ids[tokens])[order])
        sentences.append(place[order])
        lengths.append(len(numbers))
    nothing = np.zeros(0, dtype=np.int64)
    return TokenRows(
        np.concatenate([nothing, *ids]),
        np.concatenate([nothing, *sentences]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    )
