"""Which samples are trained on, by the rules of the papers (`data.views`, `min_sentences`, `min_tokens`)."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvlp.config import DataConfig

_WORD = re.compile(r"\w+")

#: What is true of the samples that each rule excludes; 0 is no rule. The first that applies counts.
RULES = ("", "no text in {sections}", "a view that is none of {views}", "fewer sentences than {sentences}",
         "fewer words than {tokens}")  # fmt: skip


def excluding_rule(view: str, report: Sequence[str], config: DataConfig) -> int:
    """Number in `RULES` of the rule that keeps a sample from being trained on; 0: none.

    Args:
        view: projection as the dataset names it; "" (not known) is none of `data.views`.
        report: sentences of the chosen sections after cleaning.
        config: the `data` section.
    """
    if not report:
        return 1
    if config.views and view not in config.views:
        return 2
    if len(report) < config.min_sentences:
        return 3
    return 4 if sum(len(_WORD.findall(sentence)) for sentence in report) < config.min_tokens else 0


def told(excluded: NDArray[np.uint8], config: DataConfig) -> str:
    """How many samples each rule excludes, as "20 have no text in ..., 3 have ..."; "" where none does."""
    named = {
        "sections": f"the sections {', '.join(config.sections)}",
        "views": f"data.views=[{', '.join(config.views)}]",
        "sentences": f"data.min_sentences={config.min_sentences}",
        "tokens": f"data.min_tokens={config.min_tokens}",
    }
    counts = np.bincount(excluded, minlength=len(RULES))
    return ", ".join(
        f"{count} have {RULES[rule].format(**named)}" for rule, count in enumerate(counts) if rule and count
    )
