"""`medvlp resume`: submit a run again, as it was submitted before or with changes."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.run_state import CONFIG, SLURM_FOLDER
from medvlp.runs.errors import RunFolderError

#: Options of an earlier submission that say nothing about the next one.
_ONCE = ("dependency", "dry_run", "arguments")

#: For `app.command`: what follows the run folder is for `medvlp submit pretrain`.
SETTINGS = {"ignore_unknown_options": True}


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE|OPTION", help="changes: overrides, and any option of `medvlp submit pretrain`"
        ),
    ] = None,
) -> None:
    """Submit a run again; it goes on from its newest good checkpoint, on any number of nodes.

    Options stand as in the newest submission where they are not given again: `medvlp resume RUN --nodes 8`.
    A run that was never submitted, but started by `medvlp pretrain`, is taken up too.
    """
    from launcher import command_words
    from launcher.command_words import split_arguments
    from launcher.commands import submit
    from medvlp import config_files, trust
    from medvlp.methods.registry import schemas

    config = next((path for path in (run / SLURM_FOLDER / CONFIG, run / CONFIG) if path.is_file()), None)
    if config is None:
        raise RunFolderError(f"{run} is no run folder: it has neither {CONFIG} nor {SLURM_FOLDER}/{CONFIG}")
    # The folder is the one named here, wherever it was when its config was written.
    own = [str(config), f"run.dir={json.dumps(trust.escaped(str(run.absolute())))}"]
    changes = command_words.parse(submit.app, ["pretrain", *own, *(words or [])])
    files, overrides = split_arguments(changes.values["arguments"])
    config_files.load([config_files.RunFile(file, run) for file in files], overrides, schemas())
    values: dict[str, Any] = {}
    earlier = _earlier_submission(run)
    if earlier is not None:
        stored = command_words.parse(submit.app, earlier)
        values = {name: stored.values[name] for name in stored.given}
    values |= {name: changes.values[name] for name in changes.given}
    once = {name: changes.values[name] for name in changes.given if name in _ONCE}
    values = {name: value for name, value in values.items() if name not in _ONCE} | once
    options = command_words.option_words(changes.command, values)
    submit.app(["pretrain", *options, *changes.values["arguments"]], standalone_mode=False)


def _earlier_submission(run: Path) -> list[str] | None:
    """The words behind `medvlp submit` of the newest training job of a run.

    Raises:
        TrustError: the user has not given them: options such as --cluster run what a file says.
    """
    from launcher.slurm.run_jobs import TRAINING, submissions
    from medvlp import trust

    for line in submissions(run):
        words = line.get("arguments")
        if line.get("kind") == TRAINING and isinstance(words, list) and words[:1] == ["submit"]:
            if not trust.is_said("submission", words):
                raise trust.TrustError(
                    f"{run}/{SLURM_FOLDER} says it was submitted with options that you have not given here. "
                    f"If they are meant, give them: medvlp submit pretrain {shlex.quote(str(run / CONFIG))} "
                    f"run.dir={shlex.quote(str(run.absolute()))} "
                    f"{shlex.join(str(word) for word in words[1:] if str(word).startswith('--'))}"
                )
            return [str(word) for word in words[1:]]
    return None
