"""What a run folder from elsewhere names is neither executed, fetched, sent to nor looked up."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from typer.testing import CliRunner, Result

from launcher.main import app
from medvlp import config_files, trust
from medvlp.config import Config, ImageConfig
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder
from medvlp.methods.registry import schemas
from medvlp.serving.client import connection_of
from medvlp.trust import TrustError
from shards.errors import DataError, MedvlpError
from shards.format import Index
from tests.drawn_once import phantoms
from tests.training.runs import TINY, train


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing has been said yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def command(*words: object) -> Result:
    """Run `medvlp WORDS`; an error for the user becomes its code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, MedvlpError):
        result.exit_code = result.exception.exit_code
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms(tmp_path_factory.mktemp("trust") / "data", studies=60, image_size=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, gloo_pool: Callable[[int], Any], data: Path) -> Path:
    """A run of two steps with prototypes."""
    folder = tmp_path_factory.mktemp("trust") / "run"
    assert gloo_pool(1).run(train, [*TINY, f"data.root={data}", f"run.dir={folder}", "train.steps=2"]) == [0]
    assert command("prototypes", "build", folder, "--device", "cpu").exit_code == 0
    return folder


@pytest.fixture
def stranger(run: Path, tmp_path: Path) -> Callable[..., Path]:
    """`stranger({"section.key": value})` -> a copy of the run whose stored config says so."""

    def make(changes: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(run, tmp_path / "stranger"))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["run"]["dir"] = str(folder)
        for key, value in changes.items():
            *sections, name = key.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[name] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make


COMMANDS = {
    "evaluate": ["evaluate", "RUN"],
    "build": ["prototypes", "build", "RUN"],
    "gallery": ["prototypes", "gallery", "RUN"],
    "pretrain": ["pretrain", "RUN/config.yaml"],
    "submit": ["submit", "RUN/config.yaml", "--dry-run"],
    "resume": ["resume", "RUN", "--dry-run"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_strangers_pipe_is_never_executed(stranger: Callable[..., Path], tmp_path: Path, name: str) -> None:
    mark = tmp_path / "executed"
    folder = stranger({"data.root": f"pipe:touch {mark}; cat {{}}"})
    result = command(*[word.replace("RUN", str(folder)) for word in COMMANDS[name]])
    assert isinstance(result.exception, TrustError), result.output
    assert result.exit_code == 2
    assert "data.root" in str(result.exception)
    assert not mark.exists()


def test_what_needs_no_data_goes_on_with_a_strangers_run(
    stranger: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    folder = stranger(
        {"data.root": f"pipe:touch {mark}; cat {{}}", "data.cache_dir": str(tmp_path / "cache")}
    )
    assert command("export", folder, "--out", tmp_path / "out").exit_code == 0
    nearest = command("prototypes", "nearest", "--run", folder, "--offline", "--text", "pleural effusion")
    assert nearest.exit_code == 0, nearest.exception
    assert command("checkpoints", folder, "--prune").exit_code == 0
    few = ("--task", "retrieval", "evaluation.bootstrap=2")
    assert command("evaluate", folder, "--data", data, *few).exit_code == 0
    assert command("evaluate", folder, f"data.root={data}", *few).exit_code == 0
    assert command("prototypes", "build", folder, "--data", data).exit_code == 0
    assert not mark.exists()
    assert not (tmp_path / "cache").exists()


def test_trainings_of_tasks_take_nothing_over_on_a_strangers_word(
    stranger: Callable[..., Path], tmp_path: Path
) -> None:
    """They use their machine and report as the pre-training did."""
    said = {key: REACHING[key] for key in ("deepspeed", "monitor.entity", "monitor.share_samples")}
    folder = stranger(said)
    finetune = ("finetune", folder, "task=fine-tuning", f"run.dir={tmp_path / 'tuned'}", "--print")
    for words in (finetune, ("evaluate", folder, "--task", "fine-tuning")):
        result = command(*words)
        assert isinstance(result.exception, TrustError), result.output
        assert all(key in str(result.exception) for key in said)
    words = [f"{key}={json.dumps(value)}" for key, value in said.items()]
    result = command(*finetune, *words)
    assert result.exit_code == 0, result.exception
    assert yaml.safe_load(result.stdout)["monitor"]["entity"] == "somebody"


def test_nothing_is_looked_up_for_a_strangers_config(
    stranger: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_WORD", "xyzzy")
    folder = stranger({"run.name": "${oc.env:SECRET_WORD}"})
    for words in (
        ["evaluate", folder, "--data", data], ["export", folder, "--out", folder / "out"],
        ["config", folder / "config.yaml"], ["pretrain", folder / "config.yaml"],
        ["resume", folder, "--dry-run"], ["checkpoints", folder, "--prune"],
    ):  # fmt: skip
        result = command(*words)
        assert isinstance(result.exception, TrustError)
        assert "run.name" in str(result.exception)
        assert "xyzzy" not in str(result.exception) + result.output


def test_the_users_own_file_may_look_up_and_the_stored_config_reads_back(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(data))
    own = tmp_path / "own.yaml"
    own.write_text("data: {root: '${oc.env:PLACE}'}\nrun: {dir: r, name: '\\${PLACE}'}\n")
    config = config_files.load([own], [], schemas())
    assert (config.data.root, config.run.name) == (str(data), "${PLACE}")
    (tmp_path / "config.yaml").write_text(config_files.to_yaml(config))
    again = config_files.load([tmp_path / "config.yaml"], [f"run.dir={tmp_path}"], schemas())
    assert again.run.name == "${PLACE}"


REACHING = {
    "data.root": "s3://bucket/shards",
    "data.tokenizer": "somebody/tokenizer",
    "data.cache_dir": "/home/user/.ssh",
    "image.name": "hf-hub:somebody/model",
    "image.pretrained": True,
    "text.name": "somebody/model",
    "deepspeed": {"tensorboard": {"enabled": True, "output_path": "/home/user"}},
    "monitor.entity": "somebody",
    "monitor.share_samples": True,
    "run.dir": "/home/user/.config",
}


def test_every_guard_is_tried() -> None:
    assert REACHING.keys() == trust.KEYS


@pytest.mark.parametrize("key", REACHING)
def test_a_run_folders_word_is_not_enough_and_the_users_is(
    stranger: Callable[..., Path], key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = stranger({key: REACHING[key]})
    file = folder / "config.yaml"
    with pytest.raises(TrustError, match=key.replace(".", r"\.")) as refused:
        config_files.load([file], [], schemas())
    # What the message asks for is enough, and the same value in the user's own file is too.
    said = shlex.split(str(refused.value).split("on the command line: ")[1].split(", or other")[0])
    config = config_files.load([file], said, schemas())
    own = Path(shutil.copy(file, tmp_path / "own.yaml"))
    assert config_files.load([own], [], schemas()) == config
    # Having started it, the user is not asked again; other values still are, and so are other users.
    trust.remember_config(config)
    if key != "run.dir":
        assert config_files.load([file], [], schemas()) == config
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with pytest.raises(TrustError):
        config_files.load([file], [], schemas())


def test_a_job_script_repeats_the_users_word(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["data.root=s3://bucket/it's here", f"run.dir={run}", "train.global_batch=8", "precision=fp32"]
    result = command("submit", *words, "--dry-run")
    assert result.exit_code == 0, result.exception
    (line,) = [line for line in result.output.splitlines() if "pretrain /" in line]
    given = shlex.split(line.split(" pretrain ")[1].split(" --nproc")[0])
    config = config_files.load([], words, schemas())
    copy = Path(given[0])
    assert copy.parent == run / "slurm"
    copy.parent.mkdir(parents=True)
    copy.write_text(config_files.to_yaml(config))
    (run / "slurm" / "job.sbatch").touch()
    assert config_files.load([given[0]], given[1:], schemas()) == config
    with pytest.raises(TrustError):
        config_files.load([given[0]], [], schemas())


def test_what_was_said_is_not_readable_and_not_lost(home: Path) -> None:
    trust.remember("data.root", "https://host/?signature=secret")
    trust.remember("data.root", "https://host/?signature=secret")
    file = home / "medvlp" / "said"
    assert "secret" not in file.read_text()
    assert len(file.read_text().splitlines()) == 1
    assert file.stat().st_mode & 0o077 == 0
    assert trust.is_said("data.root", "https://host/?signature=secret")
    assert not trust.is_said("data.cache_dir", "https://host/?signature=secret")


def test_a_strangers_submission_gives_no_options(stranger: Callable[..., Path], tmp_path: Path) -> None:
    """A cluster file holds lines of shell, and `resume` takes over the options of the last submission."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("setup: ['touch executed']\n")
    folder = stranger({})
    (folder / "slurm").mkdir()
    words = ["submit", "pretrain", "a.yaml", f"--cluster={cluster}"]
    line = {"job_id": 1, "kind": "pretrain", "arguments": words}
    (folder / "slurm" / "jobs.jsonl").write_text(json.dumps(line) + "\n")
    result = command("resume", folder, "--dry-run")
    assert isinstance(result.exception, TrustError)
    assert str(cluster) in str(result.exception)
    assert "touch executed" not in result.output
    trust.remember("submission", words)
    assert "touch executed" in command("resume", folder, "--dry-run").output


def test_a_resume_goes_on_in_the_folder_that_was_named(stranger: Callable[..., Path], tmp_path: Path) -> None:
    """A copied or moved run says where it was; going on there would begin anew, or write elsewhere."""
    folder = stranger({"run.dir": str(tmp_path / "before")})
    result = command("resume", folder, "--dry-run")
    assert f"run_dir={folder}" in result.output
    assert str(tmp_path / "before") not in result.output


@pytest.mark.parametrize("address", ["evil.example:443", "10.0.0.7:50051"])
def test_questions_are_not_sent_where_a_stranger_says(tmp_path: Path, address: str) -> None:
    folder = tmp_path / "prototypes"
    folder.mkdir()
    (folder / "server.json").write_text(json.dumps({"address": address, "tls": False}))
    (folder / "token").write_text("t" * 40)
    (folder / "token").chmod(0o600)
    with pytest.raises(TrustError, match="--server"):
        connection_of(tmp_path)
    trust.remember("server", [address, True])
    with pytest.raises(TrustError, match="--server"):
        connection_of(tmp_path)  # nor does the folder take TLS away
    trust.remember("server", [address, False])
    assert connection_of(tmp_path).address == address


@pytest.mark.parametrize(
    "name",
    ["../a.tar", "/a.tar", "..", ".", "pipe:touch x", "a\\b.tar", "http://h/a.tar", "a\nb.tar", "", "a\0"],
)
def test_names_of_shards_stay_in_their_folder(data: Path, name: str) -> None:
    index = json.loads((data / "index.json").read_text())
    index["shards"][0]["file"] = name
    with pytest.raises(DataError):
        Index.from_json(json.dumps(index).encode(), "index.json")


def test_options_of_a_backbone_bring_no_weights() -> None:
    for name, value in {"checkpoint_path": "evil.pth", "pretrained_cfg": {"url": "http://h"}}.items():
        with pytest.raises(EncoderError, match=name):
            ImageEncoder(ImageConfig("test_vit", options={name: value}), 32)


def test_prototypes_are_not_mixed_with_a_later_training(run: Path, tmp_path: Path) -> None:
    """Another training in the same folder has checkpoints of the same names."""
    folder = Path(shutil.copytree(run, tmp_path / "again"))
    for manifest in (folder / "checkpoints").glob("*/manifest.json"):
        _change_weights(manifest)
    result = command("prototypes", "nearest", "--run", folder, "--offline", "--text", "effusion")
    assert "other weights" in str(result.exception)


def _change_weights(path: Path) -> None:
    import safetensors.torch

    from medvlp.runs.manifest import Manifest
    from medvlp.runs.state_files import checksum

    file = path.parent / "weights.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: value + 1 for name, value in weights.items()}, file)
    manifest = Manifest.read(path.parent)
    manifest.files[file.name] = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
    path.write_text(manifest.to_json())


def test_defaults_reach_nothing() -> None:
    config = Config()
    config.run.dir, config.data.root = "run", "data"
    assert trust.words(config) == []


@pytest.mark.parametrize(
    ("text", "looked_up"),
    [
        ("${x}", True),
        ("\\${x}", False),
        ("\\\\${x}", True),
        ("\\\\\\${x}", False),
        ("$x", False),
        ("\\", False),
    ],
)
def test_a_look_up_is_seen_behind_backslashes_and_escaped_text_reads_back(text: str, looked_up: bool) -> None:
    assert bool(trust.look_ups({"a": text})) == looked_up
    written = trust.escaped({"a": text})
    assert trust.look_ups(written) == []
    assert OmegaConf.to_container(OmegaConf.create(written), resolve=True) == {"a": text}
