"""Whose word a value is: the user's, or only that of a run folder, which may come from a stranger.

The user's word is what stands on the command line: overrides, `--data`, and config files outside of run
folders. What the config of a run folder names is not executed, fetched, sent to or written to on its own
word. Users are not asked twice: values they have given when they started or submitted a run are remembered
(as hashes) in a file of their home directory, never in the run folder.
"""

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from shards.errors import MedvlpError
from shards.format import is_remote

logger = logging.getLogger(__name__)

#: What tells a run folder (or an export of one): files that no folder of hand-written configs has.
_MARKS = (
    "checkpoints", "environment.json", "identity.json", "events.jsonl", "metrics.jsonl", "heads.safetensors",
)  # fmt: skip
#: The same for its folder of Slurm jobs, which holds a config too.
_JOB_MARKS = ("job.sbatch", "jobs.jsonl", "attempts.jsonl")
_SHOWN = 200
_ABSENT = object()


class TrustError(MedvlpError):
    """A run folder names something that only the user may; says what, and how to say it."""

    exit_code = 2


@dataclass(frozen=True)
class Guard:
    """A config key that can reach out of the run.

    Attributes:
        key: dotted.
        acts: (value, run folder) -> whether this value does.
        what: what it does, for the message.
    """

    key: str
    acts: Callable[[Any, Path], bool]
    what: str


def _of_hub(value: Any, folder: Path) -> bool:
    return value is not None and not str(value).startswith((".", "/", "~")) and not Path(value).exists()


def _is_given(value: Any, folder: Path) -> bool:
    return bool(value)


GUARDS = (
    Guard("data.root", lambda value, folder: is_remote(value), "it is fetched, and after pipe: executed"),
    Guard("data.tokenizer", _of_hub, "it is fetched from the hub"),
    Guard("data.cache_dir", _is_given, "files are written there"),
    Guard("image.name", lambda value, folder: ":" in value, "it is fetched from the hub"),
    Guard("image.pretrained", _is_given, "weights are fetched from the hub"),
    Guard("text.name", _of_hub, "it is fetched from the hub"),
    Guard("deepspeed", _is_given, "DeepSpeed writes, sends and compiles as it says"),
    Guard("monitor.entity", _is_given, "metrics are sent there"),
    Guard("monitor.share_samples", _is_given, "report text may leave the run folder"),
    Guard(
        "run.dir",
        lambda value, folder: Path(value).resolve() != folder.resolve(),
        "the run is written there, not into its own folder",
    ),
)
KEYS = frozenset(guard.key for guard in GUARDS)


def run_folder_of(file: Path) -> Path | None:
    """The run folder that a config file belongs to; None for the user's own file."""
    folder = file.resolve().parent
    if any((folder / mark).exists() for mark in _MARKS):
        return folder
    if folder.name == "slurm" and any((folder / mark).exists() for mark in _JOB_MARKS):
        return folder.parent
    return None


def unsaid(
    config: Any, sources: Sequence[tuple[Mapping[str, Any], Path | None]]
) -> list[tuple[Guard, Any, Path]]:
    """Values of a run folder that reach out of it and that the user has never given.

    Args:
        config: the merged config.
        sources: (values, run folder they come from; None: the user), earliest first.

    Returns:
        (guard, value, run folder) of each.
    """
    found = []
    for guard in GUARDS:
        value = _at(config, guard.key)
        setting = [(_value(values, guard.key), folder) for values, folder in sources]
        setting = [(given, folder) for given, folder in setting if given is not _ABSENT]
        # Sections are merged key by key, so that any source may have put something into one.
        deciding = setting if isinstance(value, Mapping) else setting[-1:]
        folder = next((folder for _, folder in deciding if folder is not None), None)
        if folder is None or not guard.acts(value, folder) or is_said(guard.key, value):
            continue
        if not any(folder is None and given == value for given, folder in setting):
            found.append((guard, value, folder))
    return found


def refuse(problems: Sequence[tuple[Guard, Any, Path]]) -> None:
    """Raise TrustError for what `unsaid` found, if it found anything."""
    if not problems:
        return
    named = "; ".join(f"{guard.key} ({guard.what})" for guard, _, _ in problems)
    words = " ".join(_shown(guard.key, value) for guard, value, _ in problems)
    more = ", or other data with --data where the command has it" if problems[0][0].key == "data.root" else ""
    raise TrustError(
        f"the config in {problems[0][2]} names {named}, and a run folder's word is not enough for that. If "
        f"it is meant, say it on the command line: {words}{more}"
    )


def words(config: Any) -> list[str]:
    """Overrides that say on a command line every value that reaches out, for a job script."""
    return [f"{key}={json.dumps(escaped(_plain(value)))}" for key, value in _reaching(config)]


def remember_config(config: Any) -> None:
    """Remember every value of a config that reaches out: the user has just given all of it."""
    # A folder may be gone one day, and what was its name then looks like one of the hub.
    folders = [(key, _at(config, key)) for key in ("data.tokenizer", "text.name")]
    for key, value in _reaching(config) + folders:
        if value is not None:
            remember(key, value)


def _reaching(config: Any) -> list[tuple[str, Any]]:
    """(key, value) of what a config names outside its run folder."""
    values = [(guard, _at(config, guard.key)) for guard in GUARDS]
    return [(guard.key, value) for guard, value in values if guard.acts(value, Path(config.run.dir))]


def escaped(value: Any) -> Any:
    """The value as OmegaConf reads it back: `${` in a text is written `\\${`, or it would be looked up."""
    if isinstance(value, Mapping):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    # A backslash before `${` would escape ours.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def look_ups(values: Any, prefix: str = "") -> list[str]:
    """Dotted keys of values (or keys) in which OmegaConf would look something up."""
    if isinstance(values, Mapping):
        inner = [look_ups(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
        return [key for found in inner for key in found]
    if isinstance(values, list):
        return [key for number, value in enumerate(values) for key in look_ups(value, f"{prefix}[{number}]")]
    # Two backslashes are one of the text, and leave `${` what it is.
    return [prefix] if isinstance(values, str) and re.search(r"(?<!\\)(\\\\)*\$\{", values) else []


def is_said(key: str, value: Any) -> bool:
    """Whether the user has given exactly this value in an earlier command."""
    try:
        return _line(key, value) in _file().read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError, RuntimeError):
        return False


def remember(key: str, value: Any) -> None:
    """Note that the user has given this value; where there is no home to write to, it is asked for again."""
    if is_said(key, value):
        return
    try:
        path = _file()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(f"{_line(key, value)}\n".encode())  # one write: lines of two processes do not mix
    except (OSError, RuntimeError) as error:
        logger.info("%s is not remembered (%s): later commands ask for it again", key, error)


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "medvlp" / "said"


def _line(key: str, value: Any) -> str:
    """A hash, because a value may hold a secret (a signed URL)."""
    return hashlib.sha256(f"{key}\0{json.dumps(_plain(value), sort_keys=True)}".encode()).hexdigest()


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return _ABSENT
        values = values[name]
    return values


def _shown(key: str, value: Any) -> str:
    text = f"{key}={json.dumps(escaped(_plain(value)))}"
    return shlex.quote(text) if len(text) <= _SHOWN else f"{key}=..."
