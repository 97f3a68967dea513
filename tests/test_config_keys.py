"""Keys of a config that are more than name and value: moved, of files, of networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medvlp import config_files, config_keys
from medvlp.config_files import ConfigError
from medvlp.evaluation import task
from medvlp.methods.registry import schemas
from tests.test_config_files import COMPLETE, SCHEMAS, TASKS, load


def test_files_beside_a_config_file_are_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("templates: {}\n")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "evaluation: {tasks: {a-task: {prompts: prompts.yaml}}}\nimage: {weights: elsewhere.pth}\n"
    )
    config = config_files.load([file], COMPLETE, SCHEMAS, tasks=TASKS)
    assert config.evaluation.tasks["a-task"].prompts == str((tmp_path / "prompts.yaml").resolve())
    assert config.image.weights == "elsewhere.pth"


def test_a_folder_beside_a_config_file_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the working directory holds another one of that name, training began with its weights."""
    for folder in ("mine/base", "elsewhere/base"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "mine" / "c.yaml"
    file.write_text("train: {start: base}\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(files=(file,)).train.start == str((tmp_path / "mine" / "base").resolve())
    file.write_text("image: {weights: ''}\n")
    with pytest.raises(ConfigError, match=r"image\.weights is empty"):
        load(files=(file,))
    file.write_text(f"train: {{start: {'a' * 3000}}}\n")
    assert load(files=(file,)).train.start == "a" * 3000


def test_a_path_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands `~` behind `run.dir=`: a folder of that name was made where the command ran."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("data: {root: ~/shards, cache_dir: ~/cache, tokenizer: ~/bert}\nfinetune: {run: ~/x}\n")
    words = ["run.dir=~/runs/x", "train.start=~/base", "image.weights=~/w", "text.name=~/bert", "task=a-task"]
    words += ["evaluation.tasks.a-task.prompts=~/p.yaml"]
    config = config_files.load([file], words, SCHEMAS, tasks=TASKS)
    found = [
        config.run.dir,
        config.data.root,
        config.data.cache_dir,
        config.data.tokenizer,
        config.finetune.run,
    ]
    found += [config.train.start, config.image.weights, config.text.name]
    found += [config.evaluation.tasks["a-task"].prompts]
    expected = ["runs/x", "shards", "cache", "bert", "x", "base", "w", "bert", "p.yaml"]
    assert found == [str(tmp_path / name) for name in expected]
    assert load("data.root=pipe:cat ~/{}", "run.dir=a~b").data.root == "pipe:cat ~/{}"


def test_nothing_takes_the_options_of_earlier_files_away(tmp_path: Path) -> None:
    """Merged, the options of one network would be given to another."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "image: {name: resnet18, options: {stem_type: deep, layers: [1, 1]}}\ntext: {dropout: 0.2}\n"
    )
    second.write_text("image: {options: {}}\ntext: {}\n")
    words = ["image.options.depth=2"]
    for files, more, expected in (
        ([first], words, {"stem_type": "deep", "layers": [1, 1], "depth": 2}),
        ([first, second], words, {"depth": 2}),
        ([first], ["image.options={}", *words], {"depth": 2}),
    ):
        config = config_files.load(files, [*COMPLETE, *more], SCHEMAS)
        assert config.image.options == expected
        assert (config.image.name, config.text.dropout) == ("resnet18", 0.2), "a section has keys of its own"


MODELS = Path(__file__).parents[1] / "configs" / "models"
#: What makes a network; the rest of a section says how a method uses and trains it.
MADE_OF = {
    "image": ("name", "pretrained", "weights", "options", "in_channels", "resize_to", "local_stage"),
    "text": ("name", "model_type", "options", "layers"),
}


@pytest.mark.parametrize("model", sorted(file.stem for file in MODELS.glob("*.yaml")))
def test_a_model_is_the_same_behind_every_config(model: str) -> None:
    """Those of the network before made another one of it, under its name."""
    file = MODELS / f"{model}.yaml"
    section = "text" if "text" in yaml.safe_load(file.read_text()) else "image"
    official = [MODELS.parent / "methods" / f"{name}.yaml" for name in ("mgca-resnet50", "mgca-official")]
    alone, behind = (
        getattr(config_files.load([*files, file], COMPLETE, schemas()), section)
        for files in ([], [MODELS / "resnet_cpu.yaml", *official, MODELS.parent / "demo.yaml"])
    )
    assert [getattr(behind, name) for name in MADE_OF[section]] == [
        getattr(alone, name) for name in MADE_OF[section]
    ]


def test_options_are_those_of_the_network_named_with_them(tmp_path: Path) -> None:
    named, unnamed, other = (tmp_path / f"{name}.yaml" for name in ("named", "unnamed", "other"))
    named.write_text("image: {name: a, options: {depth: 1}}\ntext: {options: {hidden_size: 8}}\n")
    unnamed.write_text("image: {options: {width: 2}}\n")
    other.write_text("image: {name: b, options: {groups: 3}}\n")
    for files, overrides, expected in (
        ((named, unnamed), (), {"depth": 1, "width": 2}),
        ((named, unnamed, other), (), {"groups": 3}),
        ((named, unnamed), ("image.name=a", "image.options.width=4"), {"depth": 1, "width": 4}),
        ((named, unnamed), ("image.options.width=4", "image.name=b"), {"width": 4}),
    ):
        config = load(*overrides, files=files)
        assert (config.image.options, config.text.options) == (expected, {"hidden_size": 8})
    assert load("text.model_type=roberta", files=(named,)).text.options == {}
    assert load("text.model_type=bert", "text.name=null", files=(named,)).text.options == {"hidden_size": 8}


def test_an_override_leaves_the_options_of_a_run(tmp_path: Path) -> None:
    """A folder of a text model that has moved is named anew, and is the same network."""
    stored = tmp_path / "run" / "config.yaml"
    (stored.parent / "checkpoints").mkdir(parents=True)
    (tmp_path / "moved").mkdir()
    stored.write_text(config_files.to_yaml(load("text.options.hidden_size=8", f"run.dir={stored.parent}")))
    config = config_files.load([stored], [f"text.name={tmp_path / 'moved'}"], SCHEMAS)
    assert config.text.options == {"hidden_size": 8}


def test_moved_keys_are_read_in_stored_configs_and_named_in_those_of_a_user(tmp_path: Path) -> None:
    stored, mine = tmp_path / "run" / "config.yaml", tmp_path / "mine.yaml"
    (stored.parent / "checkpoints").mkdir(parents=True)
    tree = yaml.safe_load(config_files.to_yaml(load()))
    del tree["evaluation"]["tasks"]
    tree["run"]["dir"] = str(stored.parent)
    tree["evaluation"] |= {"fractions": [0.5], "prompts": None}
    stored.write_text(yaml.safe_dump(tree))
    tasks = task.schemas()
    found = config_files.load([stored], ["evaluation.seed=4"], SCHEMAS, tasks=tasks).evaluation
    assert found.tasks["linear-probe"].fractions == [0.5]
    assert found.seed == 4
    assert config_files.load([stored], [], SCHEMAS).evaluation.tasks["linear-probe"] == {"fractions": [0.5]}
    mine.write_text("evaluation: {fractions: [0.5]}\n")
    name = "its name is evaluation.tasks.linear-probe.fractions"
    here = f"run.dir={stored.parent}"
    for files, overrides in (([mine], []), ([], ["evaluation.fractions=[0.5]"]), ([stored, mine], [here])):
        for known in (tasks, None):
            with pytest.raises(ConfigError, match=name):
                config_files.load(files, [*COMPLETE, *overrides], SCHEMAS, tasks=known)


def test_every_moved_key_has_its_new_place() -> None:
    defaults = config_files.load([], COMPLETE, SCHEMAS, tasks=task.schemas())
    for new in config_keys.MOVED.values():
        value: object = defaults
        for part in new:
            known = value if isinstance(value, dict) else vars(value)
            assert part in known, f"{'.'.join(new)} is no key"
            value = known[part]
