"""What `make gpu` runs on a GPU machine, at toy size on the CPU, so that it works when there is a GPU."""

from __future__ import annotations

import json
import subprocess
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medvlp.config import Config
from medvlp.training.device_memory import naming_memory
from tests.cuda import figures, ranks, runs, steps
from tests.cuda.figures import batches_per_second, busy_seconds, on_device
from tests.cuda.machine import environment
from tests.cuda.place import Place, free_memory
from tests.cuda.plan import CHECKS, FIGURES
from tests.cuda.ranks import of_ranks
from tests.cuda.runner import Check, run_checks
from tests.cuda.verdicts import verdicts
from tests.distributed_pool import Pools
from tests.methods.small import built, small_batch, small_config

REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds for the whole run, on a machine that is busy with other tests.
PATIENCE = 900


@pytest.fixture(scope="module")
def reports(phantom_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `make gpu DRY=1` leaves, by file; run once, because it takes half a minute of a core."""
    out = tmp_path_factory.mktemp("gpu") / "new"
    command = [str(REPOSITORY / "tests" / "cuda" / "run"), str(out), "--dry", "--data", str(phantom_data)]
    subprocess.run(command, cwd=out.parent, timeout=PATIENCE)
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("checks", "figures")}
    return found | {"log": (out / "checks.log").read_text()}


@pytest.mark.dist
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize(("name", "plan"), [("checks", CHECKS), ("figures", FIGURES)])
def test_a_dry_run_passes_and_its_reports_are_whole(
    reports: dict[str, Any], name: str, plan: tuple[Check, ...]
) -> None:
    report = reports[name]
    assert report["dry"]
    assert [check["name"] for check in report["checks"]] == [check.name for check in plan]
    failed = {check["name"]: check["error"] for check in report["checks"] if check["outcome"] != "passed"}
    assert not failed, f"{failed}\n{reports['log'][-3000:]}"
    silent = [check["name"] for check in report["checks"] if not check["figures"]]
    assert silent == (["group"] if name == "checks" else [])


@pytest.mark.dist
def test_two_ranks_tell_how_far_they_are_apart(reports: dict[str, Any]) -> None:
    [found] = [check["figures"] for check in reports["checks"]["checks"] if check["name"] == "two ranks"]
    collectives = found.pop("collectives")
    assert len(collectives) == 20
    assert set(collectives.values()) == {"exact"}
    assert len(found) == 8
    assert max(found.values()) < 1e-5


@pytest.mark.dist
def test_a_collective_that_gloo_lacks_is_named() -> None:
    good, lacking = {"sum, torch.int64": "exact"}, {"sum, torch.int64": "not implemented"}
    noted: dict[str, Any] = {}
    with pytest.raises(AssertionError, match=r"sum, torch\.int64 on rank 1': 'not implemented"):
        ranks.judge([good, lacking], noted.__setitem__)
    assert noted == {"collectives": good}


@pytest.mark.dist
def test_a_checkpoint_goes_from_one_device_to_the_other_and_back(reports: dict[str, Any]) -> None:
    [found] = [check["figures"] for check in reports["checks"]["checks"] if check["name"] == "resume"]
    assert {"from the cpu", "from the gpu"} <= set(found)
    assert all(of_kind["bit_equal"] for of_kind in found.values())  # here both are the CPU


@pytest.mark.dist
def test_the_loader_is_timed_beside_what_a_step_needs(reports: dict[str, Any]) -> None:
    [found] = [check["figures"] for check in reports["figures"]["checks"] if check["name"] == "loader"]
    assert found["batches"] == figures.DRY_BATCHES
    of_device = found["gigabytes_per_second"] / found["samples_per_second"]
    of_step = found["needed"]["gigabytes_per_second"] / found["needed"]["samples_per_second"]
    assert of_device == pytest.approx(of_step)
    assert found["gigabytes_per_second of a copy"] > 0


def test_make_starts_it() -> None:
    command = ["make", "--dry-run", "--no-print-directory", "gpu", "DRY=1", "GPU=there"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["tests/cuda/run", "there", "--dry"]


def test_published_networks_can_be_built() -> None:
    """A dry run has others."""
    with torch.device("meta"):
        of_figures = figures.networks(figures.published(dry=False))
        of_checkpoint = built(runs._large_config())
    for method, words in (of_figures, figures.VOCABULARY), (of_checkpoint, 314):
        sizes = {name: value.shape for name, value in method.named_parameters()}
        assert sizes["text_encoder.model.embeddings.word_embeddings.weight"] == (words, 768)
        assert len(method.get_submodule("image_encoder.backbone.blocks")) == 12  # type: ignore[arg-type]


def test_figures_are_judged() -> None:
    fast, slow = {"samples_per_second": 1600.0}, {"samples_per_second": 1400.0}
    kernels = [["nvjet_tst_128x256", 40.0, 9], ["pytorch_flash::flash_fwd_kernel", 20.0, 9], ["gelu", 5.0, 9]]
    good: dict[str, Any] = {
        "throughput": {"micro-batch 256": fast},
        "kernels": {"kernels": kernels, "step_milliseconds": 100.0},
        "variants": {"stage 1": fast, "stage 1, DeepSpeed's timers": slow},
        "loader": {"share": 0.97},
        "matrices": {"tflop_per_second": 700.0},
    }
    assert list(verdicts(good).values()) == ["go"] * 4
    bad: dict[str, Any] = {
        "throughput": {"micro-batch 256": slow},
        "kernels": {"kernels": [*kernels, ["copy", 10.5, 9]], "step_milliseconds": 100.0},
        "variants": {"stage 1": slow, "stage 1, DeepSpeed's timers": fast},
        "loader": {"share": 0.9},
    }
    assert list(verdicts(bad).values()) == ["no-go"] * 4
    missing = {"throughput": {"micro-batch 256": "out of memory"}, "loader": {}}
    assert list(verdicts(missing).values()) == ["unknown"] * 2


def test_names_that_are_judged_are_those_of_the_figures(reports: dict[str, Any]) -> None:
    found = {check["name"]: check["figures"] for check in reports["figures"]["checks"]}
    for name in ("variants", "kernels", "loader"):
        assert all(verdict != "unknown" for verdict in verdicts({name: found[name]}).values())
    assert "verdicts" not in reports["figures"]  # of toy sizes


def test_a_report_of_a_gpu_has_verdicts(tmp_path: Path) -> None:
    plans = {tmp_path / "figures.json": [Check("throughput", "tests.cuda.toy_checks:passes", 1.0)]}
    run_checks(plans, Place(False, str(tmp_path), ""), 20, lambda line: None)
    found = json.loads((tmp_path / "figures.json").read_text())["verdicts"]
    assert list(found.values()) == ["unknown"]


def test_a_speed_says_how_much_of_the_peak_it_is() -> None:
    told = figures.speeds(figures.Speed(0.1, 1, 2), rows=256, flop=167e9, peak=989.0)
    assert told["samples_per_second"] == pytest.approx(2560)
    assert told["mfu"] == pytest.approx(167e9 * 2560 / 989e12)
    assert "mfu" not in figures.speeds(figures.Speed(0.1, 1, 2), rows=256, flop=167e9)


def test_kernels_count_once_and_those_of_two_streams_together() -> None:
    def event(kind: str, start: float, end: float, annotation: bool = False) -> Any:
        return SimpleNamespace(
            device_type=getattr(torch.autograd.DeviceType, kind),
            is_user_annotation=annotation,
            time_range=SimpleNamespace(start=start, end=end),
        )

    launch, step = event("CPU", 0, 9e6), event("CUDA", 0, 8e6, annotation=True)
    kernels = [event("CUDA", 2e6, 4e6), event("CUDA", 1e6, 3e6), event("CUDA", 6e6, 7e6)]
    assert on_device([launch, step, *kernels], cuda=True) == kernels
    assert on_device([launch, step, *kernels], cuda=False) == [launch]
    assert busy_seconds(kernels) == pytest.approx(4.0)
    assert busy_seconds([]) == 0


def test_batches_that_were_made_before_the_clock_ran_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def fourteen_workers_of_a_second() -> Iterator[int]:
        nonlocal clock
        for number in count():
            clock = float(number // 14 + 1)
            yield number

    monkeypatch.setattr("tests.cuda.figures.time.perf_counter", lambda: clock)
    assert batches_per_second(fourteen_workers_of_a_second(), 14, 42) == pytest.approx(14)


def test_a_micro_batch_that_does_not_fit_is_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says it in an error of its own, with the keys that help."""

    def step(*given: Any) -> None:
        with naming_memory("forward pass", Config(), 512):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(figures, "train_once", step)
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    place = Place(True, "", "")
    assert figures._measure_if_it_fits(place, engine, figures.published(dry=True), 4) is None


def test_a_wait_is_whose_code_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever library it asked, and wherever the checkout with all installed packages lies."""

    def called_by(file: str, inner: Callable[[], Any] | None = None) -> None:
        def wait() -> None:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

        exec(compile("inner()", file, "exec"), {"inner": inner or wait})

    found: list[str] = []
    site = str(Path(steps.OURS).parent / ".venv" / "lib" / "python3" / "site-packages")
    ours, theirs = f"{steps.OURS}losses/matching.py", f"{steps.DEEPSPEED}runtime/engine.py"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = steps.noting(found)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing ones", stacklevel=1)
        called_by(ours)
        called_by(ours, lambda: called_by(f"{site}/torch/functional.py"))
        called_by(ours, lambda: called_by(theirs, lambda: called_by(f"{site}/torch/functional.py")))
        called_by(f"{site}/torch/functional.py")
    assert found == [f"{ours}:1", f"{ours}:1", f"{theirs}:1", "elsewhere"]
    assert [place.startswith(steps.OURS) for place in found] == [True, True, False, False]


def runs_of_both_devices(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """The runs that change devices make on a GPU, and on which device those in another process run.

    Args:
        code: what these end with.
    """
    commands, devices = list[list[str]](), list[tuple[str, str]]()

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]):
            commands.append(command)
            run = next(word for word in command if word.startswith("run.dir="))
            devices.append((Path(run.removeprefix("run.dir=")).name, env["DS_ACCELERATOR"]))

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *given: object) -> None:
            self.kill()

        def wait(self, seconds: float) -> int:
            return code

        def kill(self) -> None:
            pass

    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    monkeypatch.setattr(runs, "train", lambda overrides: commands.append(overrides) or 0)
    for name in ("_killed", "_compare"):
        monkeypatch.setattr(runs, name, lambda *given: None)
    runs._change_devices(Place(False, "", ""), lambda name, value: None, ["zero.stage=2"])
    return commands, devices


def test_what_is_compared_in_float32_is_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in TF32, the default: its ten bits of mantissa are what a thousandth allows."""
    made: list[bool] = []
    monkeypatch.setattr(steps, "Engine", lambda method, config, *rest: made.append(config.train.tf32))
    monkeypatch.setattr(Place, "join", lambda self: torch.device("cpu"))
    place = Place(True, "", "")
    for precision in ("fp32", "bf16"):
        with suppress(AttributeError):  # it has none of an engine's parts
            steps._engine(place, "mgca", precision, 0)
    assert made == [False, True]
    commands, told = runs_of_both_devices(monkeypatch, code=0)
    assert [[word for word in words if "tf32" in word] for words in commands] == [["train.tf32=false"]] * 4
    assert told == [("cpu", "cpu"), ("from-gpu", "cpu")]
    with pytest.raises(AssertionError):
        runs_of_both_devices(monkeypatch, code=3)


def test_ranks_share_the_gpu_that_was_given() -> None:
    assert of_ranks({"CUDA_VISIBLE_DEVICES": "3"})["CUDA_VISIBLE_DEVICES"] == "3"
    assert of_ranks({}) == {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
    assert of_ranks({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})["DS_ACCELERATOR"] == "cpu"


def test_any_faiss_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def with_that_for_gpus(name: str) -> str:
        return "1.15.1" if name == "faiss-gpu" else installed(name.replace("faiss-cpu", "faiss-absent"))

    monkeypatch.setattr(metadata, "version", with_that_for_gpus)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"faiss": ["faiss-gpu"]})
    noted: dict[str, Any] = {}
    environment(Place(True, "", ""), noted.__setitem__)
    assert noted["versions"]["faiss-gpu"] == "1.15.1"


def of_other_rounding() -> list[float]:
    """Gradients of a method whose weights differ in their last bits, and of one with a wrong bias."""
    config, batch = small_config("mgca"), small_batch()
    _, expected = steps._gradients(built(config), batch)
    rounded, wrong = built(config), built(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=generator))
        wrong.get_parameter("alignment.image_head.linear1.weight")[0] *= 1.1
    return [steps.gradients_apart(steps._gradients(other, batch)[1], expected) for other in (rounded, wrong)]


def test_gradients_that_are_zero_but_for_rounding_are_not_compared_by_it() -> None:
    rounded, wrong = of_other_rounding()
    assert rounded < 3e-4
    assert wrong > 1e-2


def test_a_loss_that_jumps_has_fallen_all_the_same() -> None:
    """That of MPMA on the CPU, in bf16 at stage 2."""
    mpma = [18.2283, 18.8146, 17.1249, 15.9475, 14.3466, 12.2123, 14.2198, 14.7692]
    assert steps.has_fallen(mpma)
    assert not steps.has_fallen([18.2283, 18.8146, 17.1249, 17.9475, 17.3466, 12.2123, 17.2198, 17.7692])


def test_one_method_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def train(place: Place, note: Any, name: str, precision: str, stage: int) -> None:
        tried.append(name)
        assert name != "mpma", "mpma: the loss stays"

    monkeypatch.setattr(steps, "_train", train)
    with pytest.raises(AssertionError, match="mpma: the loss stays"):
        steps.methods(Place(False, "", ""), lambda name, value: None)
    assert sorted(set(tried)) == [name for name in steps.names() if name != "mgca"]


def test_a_step_that_overflows_after_a_refused_one_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([False, False, True])
    engine: Any = SimpleNamespace(applied=False)
    undone: list[int] = []
    guard: Any = SimpleNamespace(undo=lambda: undone.append(1))
    monkeypatch.setattr(steps, "_step", lambda *given: setattr(engine, "applied", next(made)))
    steps._step_that_counts(engine, guard, [])
    assert undone == [1, 1]
    monkeypatch.setattr(steps, "_step", lambda *given: setattr(engine, "applied", False))
    with pytest.raises(AssertionError, match="none of 14 steps"):
        steps._step_that_counts(engine, guard, [])


def is_held() -> bool:
    """Whether an engine's networks are still there when the next one is made."""
    place = Place(True, "", "")
    engine, _ = figures.make_engine(place, "bf16", 1, 4)
    networks = weakref.ref(engine.objective)
    engine.close()
    del engine
    free_memory(place.device)
    return networks() is not None


@pytest.mark.dist
def test_an_engine_does_not_count_for_the_memory_of_the_next(gloo_pool: Pools) -> None:
    assert gloo_pool(1).run(is_held) == [False]


def test_the_memory_of_each_engine_is_counted_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    free_memory(torch.device("cuda"))
    assert called == ["empty_cache", "reset_peak_memory_stats"]
    for module in (figures, steps):
        monkeypatch.setattr(module, "free_memory", lambda device: called.append("freed"))
        monkeypatch.setattr(module, "Engine", lambda *given: called.append("made"))
    monkeypatch.setattr(Place, "join", lambda self: torch.device("cpu"))
    place: Any = Place(True, "", "")
    for make in (
        lambda: figures.make_engine(place, "bf16", 1, 4), lambda: steps._engine(place, "mgca", "fp32", 0)
    ):  # fmt: skip
        called.clear()
        with suppress(AttributeError):  # it has none of an engine's parts
            make()
        assert called == ["freed", "made"]
