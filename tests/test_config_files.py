"""Config files: merging, and the message of every way to get them wrong."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launcher.slurm.cluster_config import load_cluster
from medvlp import config_files
from medvlp.config import Config, MethodConfig, TaskConfig, key
from medvlp.config_files import ConfigError
from medvlp.config_reference import reference
from medvlp.evaluation import task
from medvlp.methods.registry import schemas


@dataclass
class OtherConfig(MethodConfig):
    temperature: float = 0.07


@dataclass
class ATaskConfig(TaskConfig):
    count: int = key(1, "a number", 1, 9)
    prompts: str | None = key(None, "a file", file=True)

    def check(self, config: Config) -> None:
        if self.count == 7:
            raise ConfigError("evaluation.tasks.a-task.count=7: not on a Sunday")


TASKS = {"a-task": ATaskConfig, "plain": TaskConfig}
SCHEMAS = {"mgca": MethodConfig, "other": OtherConfig}
COMPLETE = ["run.dir=run", "data.root=data"]


def load(*overrides: str, files: tuple[Path, ...] = ()) -> Config:
    return config_files.load(files, [*COMPLETE, *overrides], SCHEMAS)


def test_later_sources_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {seed: 1, steps: 10}\nimage: {options: {depth: 2}}\n")
    second.write_text("train: {seed: 2}\nimage: {options: {embed_dim: 8}}\n")
    config = load("train.steps=30", files=(first, second))
    assert (config.train.seed, config.train.steps) == (2, 30)
    assert config.image.options == {"depth": 2, "embed_dim": 8}


def test_a_template_leaves_what_others_have_said(tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("data:\n  root: ???\ntrain:\n  seed: ???\n")
    site = tmp_path / "site.yaml"
    site.write_text("train: {seed: 4}\n")
    for files in ([site, template], [template, site]):
        config = config_files.load(files, COMPLETE, SCHEMAS)
        assert (config.data.root, config.train.seed) == ("data", 4)
    with pytest.raises(ConfigError, match=r"no value for data\.root"):
        config_files.load([template], COMPLETE[:1], SCHEMAS)


def test_the_method_brings_its_own_keys() -> None:
    config = load("method.name=other", "method.temperature=0.5")
    assert isinstance(config.method, OtherConfig)
    assert config.method.temperature == 0.5


def test_a_stored_config_reads_back(tmp_path: Path) -> None:
    config = load("method.name=other", "deepspeed.zero_optimization.overlap_comm=true", "text.dropout=0")
    stored = tmp_path / "config.yaml"
    stored.write_text(config_files.to_yaml(config))
    assert config_files.load([stored], [], SCHEMAS) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.rot=x", ["'data.rot'", "'data.root'"]),
        ("trian.steps=3", ["'trian'", "'train'"]),
        ("method.temperature=1", ["'method.temperature'"]),
        ("method.name=mgcaa", ["'mgcaa'", "'mgca'"]),
        ("train.steps=abc", ["train.steps", "abc"]),
        ("train.steps=1.5", ["train.steps"]),
        ("precision=fp8", ["precision", "fp8", "bf16"]),
        ("zero.stage=4", ["zero.stage=4", "3"]),
        ("train=3", ["train is a section"]),
        ("data.transform.flip=1.5", ["data.transform.flip=1.5"]),
        ("data.transform.reduced_decoding=true", ["data.transform.crop=random", "crop=area or none"]),
        ("optimizer.lr=nan", ["optimizer.lr"]),
        ("justaword", ["section.key=value"]),
        ("zero.offload_parameters=true", ["zero.stage=3"]),
        ("train.micro_batch=7", ["train.micro_batch=7", "train.global_batch=144"]),
        ("optimizer.phases={epochs: 1}", ["optimizer.phases is a list of sections"]),
        ("optimizer.phases=[{epochs: 1, lr: 1, rate: 2}]", ["unknown key 'optimizer.phases[0].rate'"]),
        ("optimizer.phases=[{epochs: 1, lr: fast}]", ["optimizer.phases[0].lr", "'fast'"]),
        ("optimizer.phases=[{epochs: 1}]", ["no value for optimizer.phases[0].lr"]),
        ("image.mean=[0.4, 0.5]", ["image.mean", "2 numbers", "image.in_channels is 3"]),
        ("image.mean=gray", ["image.mean=gray", "one number"]),
        ("image.mean=true", ["image.mean=True", "one number"]),
        ("image.std=[.inf, 1, 1]", ["image.std[0]=inf is out of range"]),
        ("image.std=[0.2, 0, 0.2]", ["image.std", "out of range"]),
        ("image.std=0", ["image.std=0 is out of range"]),
        ("image.std=null", ["image.std=None", "one number"]),
        ("optimizer.phases=[{epochs: 1, lr: -1}]", ["optimizer.phases[0].lr=-1.0 is out of range"]),
        ("optimizer.phases=[{epochs: 0, lr: 1}]", ["optimizer.phases[0]: epochs=0.0 must be above 0"]),
    ],
)
def test_a_wrong_override_is_named(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_phases_are_read_from_a_file_and_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(
        "optimizer:\n  phases:\n  - {epochs: 1, lr: 1e-5, warmup_epochs: 0.5}\n  - {epochs: 2, lr: 1}\n"
    )
    config = load(files=(file,))
    assert [phase.lr for phase in config.optimizer.phases] == [1e-5, 1.0]
    again = tmp_path / "again.yaml"
    again.write_text(config_files.to_yaml(config))
    assert config_files.load([again], [], SCHEMAS) == config
    assert len(load("optimizer.phases=[{epochs: 3, lr: 2}]", files=(file,)).optimizer.phases) == 1
    with pytest.raises(ConfigError, match=r"optimizer\.phases and train\.steps"):
        load("train.steps=5", files=(file,))
    with pytest.raises(ConfigError, match=r"optimizer\.schedule=cosine, not epoch_cosine"):
        load("optimizer.schedule=epoch_cosine", files=(file,))


@pytest.mark.parametrize(
    ("file", "override", "parts"),
    [
        ("methods/prior", "train.epochs=1", ["train.epochs", "optimizer.phases (of", "prior.yaml)"]),
        ("methods/prior", "optimizer.lr=0.5", ["optimizer.lr", "optimizer.phases=[]"]),
        ("methods/prior", "method.stage=1", ["method.stage", "optimizer.phases"]),
        ("benchmarks/methods", "train.epochs=1", ["train.epochs", "train.steps=null"]),
        ("demo", "optimizer.warmup=0.3", ["optimizer.warmup", "optimizer.warmup_steps=null"]),
        ("demo", "finetune.fraction=0.01", ["finetune.fraction", "medvlp finetune RUN --task"]),
    ],
)
def test_what_would_change_nothing_is_refused(
    repository: Path, tmp_path: Path, file: str, override: str, parts: list[str]
) -> None:
    path = repository / "configs" / f"{file}.yaml"
    with pytest.raises(ConfigError) as caught:
        config_files.load([path], [*COMPLETE, override], schemas())
    assert all(part in str(caught.value) for part in [f"override '{override}'", *parts]), str(caught.value)
    before = config_files.load([path], COMPLETE, schemas())
    whole = tmp_path / "whole.yaml"
    whole.write_text(config_files.to_yaml(before))
    assert config_files.load([whole], [], schemas()) == before, "what one file says of all keys is no wish"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimizer: {lr: 1, phases: [{epochs: 1, lr: 1}]}", ["optimizer.lr changes", "optimizer.phases=[]"]),
        ("train: {epochs: 3}\noptimizer: {phases: [{epochs: 1, lr: 1}]}", ["train.epochs changes nothing"]),
        ("train: {epochs: 3, steps: 9}", ["train.epochs changes nothing", "train.steps=null"]),
        ("optimizer: {warmup: 0.1, warmup_steps: 9}", ["optimizer.warmup changes nothing"]),
    ],
)
def test_one_file_that_says_both_is_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(files=(file,))
    assert all(part in str(caught.value) for part in ["mine.yaml: ", *parts]), str(caught.value)


def test_no_file_of_configs_says_what_nothing_reads(repository: Path) -> None:
    folder = repository / "configs"
    runs = [[folder / "demo.yaml"], [folder / "tasks" / "pretrain-small.yaml"]]
    for file in sorted((folder / "methods").glob("*.yaml")):
        base = file.with_stem(file.stem.removesuffix("-official"))
        runs.append([base] if base == file else [base, file])
    on_top = [folder / "benchmarks" / "phantom.yaml", folder / "benchmarks" / "methods.yaml"]
    first = {name: folder / "benchmarks" / f"{name}.yaml" for name in schemas()}
    for file in sorted((folder / "benchmarks").glob("*.yaml")):
        name, _, kind = file.stem.partition("-")
        if name == "prototypes":
            runs.append([on_top[0], first["mgca"], file])
        elif name in first:
            compared = folder / "benchmarks" / f"{name}-compared.yaml"
            between = [compared] if compared.exists() and kind not in ("", "compared") else []
            runs.append([*on_top, first[name], *between, *([file] if kind else [])])
    assert len(runs) > 25
    for files in runs:
        config_files.load(files, COMPLETE, schemas(), tasks=task.schemas())


def test_what_is_said_in_place_of_what_stood_above_is_taken(repository: Path) -> None:
    prior = repository / "configs" / "methods" / "prior.yaml"
    words = ["optimizer.lr=0.5", "train.epochs=2", "optimizer.phases=[]"]
    config = config_files.load([prior], [*COMPLETE, *words], schemas())
    assert (config.optimizer.lr, config.train.epochs) == (0.5, 2)
    again = ["train.min_steps=5", "train.steps=1", "train.min_steps=0", "train.steps=2"]
    assert config_files.load([], [*COMPLETE, *again], schemas()).train.steps == 2
    task = load("finetune.fraction=0.1", "task=fine-tuning").finetune
    assert task.fraction == 0.1


def test_what_asks_for_nothing_may_stand_beside_any_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 40, min_steps: 0}\n")
    assert config_files.load([file], COMPLETE, schemas()).train.steps == 40
    file.write_text("train: {steps: 40, min_steps: 9}\n")
    with pytest.raises(ConfigError, match=r"train\.min_steps changes nothing"):
        config_files.load([file], COMPLETE, schemas())


def test_a_later_word_on_the_training_of_a_task_stands_above_an_earlier_one(tmp_path: Path) -> None:
    """Merged, they were two keys of one source, and no word took the earlier one away."""
    file, name = tmp_path / "mine.yaml", "evaluation.tasks.fine-tuning.training"
    file.write_text(
        "evaluation: {tasks: {fine-tuning: {training: {train: {epochs: 3}}},"
        " segmentation: {training: {train: {epochs: 4}}}}}\n"
    )

    def said(*overrides: str) -> list[object]:
        words = [*COMPLETE, *(f"{name}.{override}" for override in overrides)]
        known = config_files.load([file], words, SCHEMAS, tasks=task.schemas()).evaluation.tasks
        return [known[of].training["train"] for of in ("fine-tuning", "segmentation")]

    assert said() == [{"epochs": 3}, {"epochs": 4}]
    assert said("train.steps=9") == [{"steps": 9}, {"epochs": 4}]
    for words in (["train.steps=9", "train.epochs=2"], ["train.epochs=2", "train.steps=9"]):
        assert said(*words)[0] == {"steps": 9, "epochs": 2}, "is refused as a source"
    assert said("train.steps=9", "train.steps=null")[0] == {"steps": None, "epochs": 3}
    assert said("optimizer.phases=[]", "optimizer.warmup_steps=5")[0] == {"epochs": 3}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "monitor.every_steps=1",
            "'checkpoint.every_steps', 'validation.every_steps' or 'monitor.log_every'?)",
        ),
        ("train.lr=1", "(did you mean 'optimizer.lr'?)"),
        ("lr=1", "(did you mean 'optimizer.lr'?)"),
        ("train.step=1", "(did you mean 'train.steps'?)"),
        ("zero.sharding=1", "; there are stage, offload_optimizer, offload_parameters"),
        (
            "optimizer.phases=[{epochs: 1, lr: 1, rate: 2}]",
            "; there are epochs, lr, start_lr, min_lr, warmup_",
        ),
        ("image.options=5", "image.options is a mapping: write {name: value, ...}, or {} for none"),
        ("deepspeed=[1]", "deepspeed is a mapping"),
    ],
)
def test_a_wrong_key_or_mapping_says_what_may_be_meant(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert said in str(caught.value)


def test_a_wrong_key_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("checkpoint: {every_step: 5}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key 'checkpoint\.every_step'.*every_steps"):
        load(files=(file,))


@pytest.mark.parametrize(
    "text",
    [
        'train: {seed: "\\e]0;PWNED\\a\\e[2J"}',
        'optimizer: {phases: [{epochs: "\\e[2J", lr: 1}]}',
        'image: {options: {"\\e[2J": "\\e[2J"}}',
        'method: {name: "\\e[2J"}',
        '"\\e[2J": 1',
        "train: {seed: ${oc.env:\u202e}}",
    ],
)
def test_an_exception_repeats_no_control_characters(tmp_path: Path, text: str) -> None:
    """Who calls the library has no console that takes them out; tracebacks show causes as well."""
    file = tmp_path / "evil\x1b[31m.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(files=(file,))
    shown = "".join(traceback.format_exception(caught.value, limit=0))
    assert "evil[31m.yaml" in str(caught.value) or "[2J" in str(caught.value)
    assert not any(character in shown for character in "\x1b\x07\u202e"), shown


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load(files=(file,))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load(files=(Path("nowhere.yaml"),))


def test_missing_values_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"data\.root, run\.dir"):
        config_files.load([], [], SCHEMAS)


def test_the_reference_is_yaml_with_every_key() -> None:
    text = reference(SCHEMAS)
    tree = yaml.safe_load(text)
    assert tree["train"]["global_batch"] == 144
    assert "temperature: 0.07" in text


def test_a_task_brings_its_own_keys(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("evaluation:\n  tasks:\n    a-task: {count: 3}\n")
    config = config_files.load([file], [*COMPLETE, "evaluation.tasks.a-task.prompts=x"], SCHEMAS, tasks=TASKS)
    assert config.evaluation.tasks == {"a-task": ATaskConfig(3, "x"), "plain": TaskConfig()}
    stored = tmp_path / "config.yaml"
    stored.write_text(config_files.to_yaml(config))
    assert config_files.load([stored], [], SCHEMAS, tasks=TASKS) == config
    raw = config_files.load([stored], [], SCHEMAS).evaluation.tasks
    assert raw == {"a-task": {"count": 3, "prompts": "x"}, "plain": {}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.tasks.a-task.cuont=2", "did you mean 'evaluation.tasks.a-task.count'?"),
        ("evaluation.tasks.b-task.count=2", "did you mean 'evaluation.tasks.a-task'?"),
        ("evaluation.tasks.a-task=2", "evaluation.tasks.a-task is a section"),
        ("evaluation.tasks=2", "evaluation.tasks is a section"),
        ("evaluation.tasks.a-task.count=x", "evaluation.tasks.a-task.count"),
        ("evaluation.tasks.a-task.count=10", "evaluation.tasks.a-task.count=10 is out of range"),
        ("evaluation.tasks.a-task.count=7", "evaluation.tasks.a-task.count=7: not on a Sunday"),
    ],
)
def test_a_wrong_key_of_a_task_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_files.load([], [*COMPLETE, override], SCHEMAS, tasks=TASKS)
    assert message in str(caught.value)


@pytest.mark.parametrize("written", ["0123", "1_000", "1e5", "24:00:00", "0x1f", "on", "No", "1.10", "007"])
def test_a_text_is_what_was_written(tmp_path: Path, written: str) -> None:
    """YAML would read 83, 1000, 100000.0, 86400, 31, true, false, 1.1 and 7."""
    file = tmp_path / "a.yaml"
    file.write_text(f"run: {{dir: d, name: {written}}}\nmonitor: {{tags: [{written}]}}\ndata: {{root: r}}\n")
    read = config_files.load([file], [], schemas())
    assert (read.run.name, read.monitor.tags) == (written, [written])
    overrides = ["data.root=r", "run.dir=d", f"run.name={written}", f"monitor.tags=[{written}]"]
    said = config_files.load([], overrides, schemas())
    assert (said.run.name, said.monitor.tags) == (written, [written])


def test_texts_of_a_cluster_file_are_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("sbatch: {account: 0123, time: 24:00:00}\nenvironment: {MASK: 0777, NCCL_IB: no}\n")
    site = load_cluster(file)
    assert (site.sbatch.account, site.sbatch.time) == ("0123", "24:00:00")
    assert site.environment == {"MASK": "0777", "NCCL_IB": "no"}


def test_numbers_and_nothing_stay_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {dir: d, name: null}\ndata: {root: r}\ntrain: {steps: 10}\nmethod: {name: mgca}\n")
    read = config_files.load([file], ["train.seed=3", "text.options={hidden_size: 8}"], schemas())
    assert (read.run.name, read.train.steps, read.train.seed) == (None, 10, 3)
    assert read.text.options == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((method, "") for method in ("combination", "medslip", "mgca", "mpma", "place", "prior")),
        *((method, "-ablation") for method in ("medslip", "mgca", "mpma", "place", "prior")),
        *(("mpma", part) for part in ("-no-alignment", "-no-memory", "-separate")),
    ],
)
def test_the_configs_of_the_comparison_go_on_top_of_each_other(
    repository: Path, method: str, kind: str
) -> None:
    """In the order of `make bench-methods`."""
    folder = repository / "configs" / "benchmarks"
    encoder = repository / "configs" / "models" / f"{'hybrid' if method == 'mpma' else 'resnet'}_phantom.yaml"
    chain = [folder / "phantom.yaml", folder / "methods.yaml", encoder, folder / f"{method}.yaml"]
    chain += [file for file in [folder / f"{method}-compared.yaml"] if file.exists()]
    if kind:
        chain.append(folder / f"{method}{kind}.yaml")
    config = config_files.load(chain, ["data.root=d", "run.dir=r"], schemas(), tasks=task.schemas())
    assert config.method.name == method
