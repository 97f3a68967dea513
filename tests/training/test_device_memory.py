"""What a user is told when a step does not fit the GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medvlp.config import Config
from medvlp.training import validation
from medvlp.training.device_memory import DeviceMemoryError, naming_memory
from medvlp.training.validation import Validation


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


def test_of_a_validation_the_batch_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller micro-batches of the training, or activations made again, would not help."""
    config = Config()
    config.validation.batch = 128

    def forward(*given: Any) -> None:
        with naming_memory("forward pass", config, 64):
            raise torch.OutOfMemoryError("CUDA out of memory")

    measuring: Any = Validation.__new__(Validation)
    measuring.engine = SimpleNamespace(forward=forward, objective=None, device=None)
    measuring.recipe = SimpleNamespace(config=config, examination=lambda *given: None)
    measuring.clusters, measuring.learned = lambda: None, None
    measuring.dataset = measuring.positions = None
    monkeypatch.setattr(validation, "predict", lambda objective, examine, *rest: examine(None))
    with pytest.raises(DeviceMemoryError) as raised:
        measuring._measure(100)
    assert str(raised.value) == (
        "rank 0: the GPU is out of memory in the validation; lower validation.batch (it is 128)"
    )
