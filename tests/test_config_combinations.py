"""Keys of a config that stand above others, whatever the order in which they are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvlp.config import ConfigError
from tests.test_config_files import load


@pytest.mark.parametrize(
    ("ignored", "above"),
    [
        ("train.epochs=5", "train.steps=2"),
        ("optimizer.warmup=0.1", "optimizer.warmup_steps=9"),
        ("optimizer.lr=0.5", "optimizer.phases=[{epochs: 1, lr: 1}]"),
    ],
)
def test_two_overrides_that_contradict_each_other_are_refused_in_any_order(
    tmp_path: Path, ignored: str, above: str
) -> None:
    """In one of the orders the first was passed over without a word."""
    file = tmp_path / "mine.yaml"
    key, _, value = ignored.partition("=")
    section, _, name = key.partition(".")
    file.write_text(f"{section}: {{{name}: {value}}}\n")
    load(above, files=(file,))  # over a file that says the other
    for words in ((ignored, above), (above, ignored), (ignored, above, above)):
        with pytest.raises(ConfigError) as caught:
            load(*words)
        assert f"override '{ignored}': {key} changes nothing" in str(caught.value)
        assert f"(of override {above!r})" in str(caught.value)
