"""The run folder: identity, config, environment, and the rule that a fresh run needs an empty one."""

import dataclasses
import functools
import json
import logging
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash
import yaml

from medvlp import distributed
from medvlp.config import Config
from medvlp.config_files import to_yaml
from medvlp.data.text import Tokenizer
from medvlp.runs.errors import RunFolderError
from medvlp.runs.identity import RunIdentity
from medvlp.runs.run_lock import LOCK, RunLock
from shards.atomic import atomic_write
from shards.errors import DataError

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
#: Packages whose versions can change results or formats.
PACKAGES = (
    "medvlp", "torch", "torchvision", "deepspeed", "transformers", "tokenizers", "timm", "numpy",
    "safetensors", "opencv-python-headless", "simplejpeg", "faiss-cpu", "faiss-gpu", "omegaconf", "wandb",
)  # fmt: skip


def open_run_folder(folder: Path, fresh: bool, lock: RunLock) -> None:
    """Make the run folder and lock it; all ranks call this together, rank 0 acts.

    Raises:
        RunFolderError: it cannot be made or written, another run holds it, or `fresh` and it holds something.
    """
    problem = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            if fresh and any(path.name != LOCK for path in folder.iterdir()):
                problem = f"{folder} is not empty and --fresh asks for a new run: choose another run.dir"
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except RunFolderError as error:
            problem = str(error)
        except OSError as error:
            problem = f"run.dir={folder} cannot be used: {error.strerror}; choose another run.dir"
    problem = distributed.broadcast_object(problem)
    if problem:
        raise RunFolderError(problem)


def describe_run(config: Config, world_size: int, identity: RunIdentity, tokenizer: Tokenizer) -> None:
    """Write what the run is (rank 0); name config keys changed since the last start.

    That is `identity.json` with `tokenizer.json`, `config.yaml` and `environment.json`.

    All ranks call this together.

    Raises:
        RunFolderError: they cannot be written.
    """
    problem = None
    if distributed.is_main():
        try:
            identity.write(Path(config.run.dir), tokenizer)
            _write_description(config, world_size)
        except (DataError, OSError) as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise RunFolderError(problem)


def _from_anywhere(config: Config) -> Config:
    """The config with absolute paths of what training began with, which an evaluation reads again."""
    start, weights = (
        path and str(Path(path).absolute()) for path in (config.train.start, config.image.weights)
    )
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, start=start),
        image=dataclasses.replace(config.image, weights=weights),
    )


def _write_description(config: Config, world_size: int) -> None:
    folder = Path(config.run.dir)
    text = to_yaml(_from_anywhere(config))
    if (folder / CONFIG).exists():
        changed = changed_keys((folder / CONFIG).read_text(encoding="utf-8", errors="replace"), text)
        if changed:
            logger.warning("config differs from the last start in %s: %s", folder, ", ".join(changed))
    atomic_write(folder / CONFIG, text.encode())
    environment = {
        "command": sys.argv,
        "git": git_revision(),
        "packages": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "world_size": world_size,
    }
    atomic_write(folder / ENVIRONMENT, (json.dumps(environment, indent=2) + "\n").encode())


def config_hash(config: Config) -> str:
    """xxh3-128 of the resolved config."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def changed_keys(before: str, after: str) -> list[str]:
    """Dotted keys whose values differ between two YAML texts; everything, if `before` is no config at all."""
    try:
        earlier = yaml.safe_load(before)
    except yaml.YAMLError:
        earlier = None
    if not isinstance(earlier, dict):
        return ["everything (the stored config cannot be read)"]
    first, second = _flat(earlier), _flat(yaml.safe_load(after))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def library_versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`."""
    return dict(_versions())


@functools.cache  # of a process they do not change, and reading them takes as long as a small config
def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> dict[str, Any] | None:
    """Commit of this code and whether tracked files differ from it; None outside a git checkout."""
    where = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*where, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*where, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "modified": bool(status.stdout.strip())}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
