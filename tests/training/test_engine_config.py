"""DeepSpeed's JSON and the parameter groups, without starting an engine."""

from pathlib import Path

import pytest
import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.config import DeepSpeedConfig

from medvlp.config import Config, OptimizerConfig
from medvlp.config_files import ConfigError
from medvlp.data.batch_sizes import divide_batch
from medvlp.methods.base import Method
from medvlp.training.deepspeed_config import check_device, deepspeed_json, parameter_groups
from medvlp.training.engine import choose_kernels
from tests.training.tiny import TinyMethod


def test_our_keys_reach_deepspeed_and_its_own_stand_above() -> None:
    config = Config()
    config.train.global_batch, config.train.micro_batch, config.train.gradient_clip = 16, 2, 0.5
    config.zero.stage, config.precision = 3, "bf16"
    config.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1000}, "gradient_clipping": 0.25}
    made = deepspeed_json(config, divide_batch(config, 2), "cpu")
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4
    assert made["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000}
    assert made["gradient_clipping"] == 0.25
    assert made["bf16"]["enabled"]
    assert not made["fp16"]["enabled"]
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["optimizer"]["params"]["torch_adam"]


@pytest.mark.parametrize("change", [("precision", "fp16"), ("zero", "offload_optimizer")])
def test_what_a_cpu_cannot_do_is_refused(change: tuple[str, str]) -> None:
    config = Config()
    if change[0] == "precision":
        config.precision = "fp16"
    else:
        config.zero.offload_optimizer = True
    with pytest.raises(ConfigError, match="CUDA device"):
        check_device(config, "cpu")
    check_device(config, "cuda")


def test_offload_needs_a_compiler_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.zero.offload_optimizer = True
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler here.* and no ninja here: add"):
        check_device(config, "cuda")
    check_device(config, "cuda", here=False)
    for name in ("c++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    check_device(config, "cuda")
    (tmp_path / "ninja").unlink()
    with pytest.raises(ConfigError, match=r"there is no ninja here"):
        check_device(config, "cuda")
    monkeypatch.setitem(installed_ops, "cpu_adam", True)
    check_device(config, "cuda")


def names_by_group(method: Method, config: OptimizerConfig) -> list[tuple[float, float, set[str]]]:
    groups, scales = parameter_groups(method, config)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return [
        (group["weight_decay"], scale, {names[id(p)] for p in group["params"]})
        for group, scale in zip(groups, scales, strict=True)
    ]


def test_biases_norms_and_exempt_names_do_not_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    method = TinyMethod()
    monkeypatch.setattr(method, "parameters_without_decay", lambda: {"head.weight"})
    groups = names_by_group(method, OptimizerConfig(image_lr_scale=0.1, text_lr_scale=0.5))
    decayed = set().union(*(names for decay, _, names in groups if decay))
    free = set().union(*(names for decay, _, names in groups if not decay))
    assert "head.weight" in free
    assert "head.bias" in free
    assert "log_scale" in free
    assert "image_encoder.blocks.0.norm1.weight" in free
    assert "image_encoder.blocks.0.attn.qkv.weight" in decayed
    assert decayed | free == {name for name, _ in method.named_parameters()}
    for _, scale, names in groups:
        for name in names:
            expected = {"image_encoder": 0.1, "text_encoder": 0.5}.get(name.split(".")[0], 1.0)
            assert scale == expected


def test_decay_all_keeps_the_methods_own_exemptions_and_frozen_parameters_are_in_no_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = TinyMethod()
    monkeypatch.setattr(method, "parameters_without_decay", lambda: {"head.weight"})
    method.text_encoder.requires_grad_(False)
    groups = names_by_group(method, OptimizerConfig(decay_all=True))
    free = set().union(*(names for decay, _, names in groups if not decay))
    assert free == {"head.weight"}
    assert not any(name.startswith("text_encoder") for _, _, names in groups for name in names)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_travel_during_backward_and_nothing_waits_to_take_the_time(stage: int) -> None:
    config = Config()
    config.zero.stage = stage
    made = deepspeed_json(config, divide_batch(config, 1), "cuda")
    assert not DeepSpeedConfig(made).timers_config.enabled
    zero = made["zero_optimization"]
    assert zero.get("overlap_comm") is (True if stage in (1, 2) else None)  # DeepSpeed's own at stage 3
    assert ("reduce_bucket_size" in zero) == (stage in (1, 2))
    config.deepspeed = {"zero_optimization": {"overlap_comm": False}}
    if stage in (1, 2):
        above = deepspeed_json(config, divide_batch(config, 1), "cuda")["zero_optimization"]
        assert above == {**zero, "overlap_comm": False}


@pytest.mark.parametrize("tf32", [True, False])
def test_kernels_of_a_gpu(tf32: bool) -> None:
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    try:
        choose_kernels(tf32)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]
