"""What a user is told when a step does not fit the GPU."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch_sizes import divide_batch
from medvlp.training import validation
from medvlp.training.device_memory import DeviceMemoryError, naming_memory
from medvlp.training.engine import Engine
from medvlp.training.validation import Validation
from tests.training.tiny import TinyMethod


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


#: As CUDA's libraries say it: NCCL 2.21 and 2.27 through torch, torch itself, cuBLAS, cuDNN.
NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled cuda error (run with"
OF_LIBRARIES = [
    f"{NCCL}, NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Failed to CUDA calloc async 608 bytes",
    f"{NCCL}, NCCL version 2.27.3\nLast error:\nCuda failure 2 'out of memory'",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
]


@pytest.mark.parametrize("words", OF_LIBRARIES)
def test_a_library_of_cuda_without_memory_is_named_like_torch(words: str) -> None:
    named = pytest.raises(DeviceMemoryError, match=r"lower train.micro_batch")
    with named, naming_memory("backward pass", Config(), 64):
        raise RuntimeError(words)


@pytest.mark.parametrize(("free", "spare"), [(10 << 20, 0), (10 << 30, 0), (10 << 20, 20 << 30)])
def test_an_error_that_nccl_does_not_explain_is_of_memory_on_a_full_gpu_only(
    free: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps for its own later use is not used."""
    full = free + spare < 1 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: spare + (1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1 << 30)
    told = pytest.raises(DeviceMemoryError if full else RuntimeError)
    with told as raised, naming_memory("backward pass", Config(), 64):
        raise RuntimeError(NCCL)
    assert ("80.0 of 80.0 GiB in use" in str(raised.value)) == full


@pytest.mark.parametrize(
    ("words", "named"),
    [(NCCL, r"unhandled cuda error"), (OF_LIBRARIES[2], r"out of memory in the backward pass\.")],
)
def test_a_gpu_that_answers_nothing_any_more_keeps_its_error(
    words: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mock.Mock(side_effect=RuntimeError("device-side assert")))
    told = pytest.raises((RuntimeError, DeviceMemoryError), match=named)
    with told, naming_memory("backward pass", Config(), 64):
        raise RuntimeError(words)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(OF_LIBRARIES[1])]
)
@pytest.mark.parametrize("offloaded", [False, True])
def test_weights_and_optimiser_that_do_not_fit_are_told_what_makes_them_smaller(
    error: RuntimeError, offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller micro-batch would change nothing there."""

    def initialize(**_: Any) -> None:
        raise error

    config = Config()
    config.zero.stage, config.zero.offload_optimizer, config.precision = 2, offloaded, "fp32"
    config.train.accumulate = "plain"
    monkeypatch.setattr("deepspeed.initialize", initialize)
    distributed.initialize()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(DeviceMemoryError) as raised:
        Engine(TinyMethod(), config, divide_batch(config, 2), torch.device("cpu"))
    offload = "" if offloaded else "; set zero.offload_optimizer=true"
    assert str(raised.value) == (
        "rank 0: the GPU is out of memory in the set-up of weights and optimiser. See with nvidia-smi "
        f"whether another process holds memory of it; raise zero.stage to 3 (it is 2){offload}"
    )
    assert raised.value.exit_code == 2


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
