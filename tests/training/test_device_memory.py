"""What a user is told when a step does not fit the GPU."""

import pytest
import torch

from medvlp.config import Config
from medvlp.training.device_memory import DeviceMemoryError, naming_memory


def test_the_keys_that_help_are_named() -> None:
    config = Config()
    config.text.gradient_checkpointing = True
    with pytest.raises(DeviceMemoryError) as raised, naming_memory("backward pass", config, 64):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    text = str(raised.value)
    assert text.startswith("rank 0: the GPU is out of memory in the backward pass")
    assert "lower train.micro_batch (it is 64" in text
    assert "image.gradient_checkpointing=true" in text
    assert "text.gradient_checkpointing" not in text
    assert raised.value.exit_code == 2


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="another"), naming_memory("forward pass", Config(), 1):
        raise RuntimeError("another")
