"""Training and evaluation read datasets of format version 1, and say what these lack."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvlp.config import Config, TransformConfig
from medvlp.data.loader import build_loader, evaluation_loader
from medvlp.data.text import Tokenizer
from shards.errors import DataError
from shards.reader import ShardReader
from tests.shards.version_one import LABELS, MASK, SIZE, write_version_one

ConfigFactory = Callable[..., Config]


@pytest.fixture
def old(tmp_path: Path, dataset: Path) -> Path:
    return write_version_one(tmp_path / "old", (dataset / "tokenizer.json").read_bytes())


def test_batches_of_training_and_evaluation(
    old: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(root=str(old), image_size=SIZE, transform=TransformConfig(crop="none"))
    config.train.global_batch = 4
    reader = ShardReader(old)
    with caplog.at_level(logging.WARNING):
        training = next(iter(build_loader(config, reader, tokenizer, 0, 1, 4, fields=["boxes", "masks"])))
    assert "format version 1: where findings overlap" in caplog.text
    assert "build the dataset again" in caplog.text
    testing = next(iter(evaluation_loader(config, reader, tokenizer, "test", 4, fields=["boxes", "masks"])))
    for batch, split in ((training, "train"), (testing, "test")):
        assert batch.text.input_ids.shape[1] > 4
        for masks, boxes, position in zip(
            batch.fields["masks"].numpy(), batch.fields["boxes"], batch.sample.tolist(), strict=True
        ):
            if split == "train" and position == 1:
                assert (masks == 255).all()
                continue
            for number, mask in enumerate(masks, start=1):
                np.testing.assert_array_equal(mask, number == MASK if number != 2 else 255)
            assert boxes[0].tolist() == [LABELS.index("mass"), 6.0, 4.0, 12.0, 20.0]


def test_what_version_1_lacks_is_named_with_the_remedy(
    tmp_path: Path, dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    root = write_version_one(tmp_path / "bare", (dataset / "tokenizer.json").read_bytes(), masks=False)
    config = make_config(root=str(root), image_size=SIZE)
    config.train.global_batch = 4
    with pytest.raises(DataError, match=r"format version 1 .* build the dataset again with medvlp shards"):
        build_loader(config, ShardReader(root), tokenizer, 0, 1, 4, fields=["masks"])
