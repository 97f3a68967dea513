"""`medvlp finetune`: train the head of a downstream task on the network of a run, as a run of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.command_words import split_arguments
from shards.errors import UsageError


def finetune(
    run: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="the pre-training")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG|KEY=VALUE", help="YAML files, then overrides; task=NAME, run.dir=FOLDER"
        ),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="the same as task=NAME")] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            "--fraction", min=1e-6, max=1, help="share of the training patients: finetune.fraction, else all"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="of draw, head and order: train.seed, else 0")
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="the baseline: begin with the weights before the pre-training")
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="ranks on this machine; default: one per GPU, else one"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="refuse a run folder that is not empty")] = False,
    show: Annotated[
        bool, typer.Option("--print", help="print the config and train nothing; `medvlp submit` takes it")
    ] = False,
) -> None:
    """Train a downstream task on a run's image encoder; an existing run folder is resumed.

    The config is the network of RUN, below the task's protocol, below what is given here. The checkpoint with
    the best validation is kept. Exit codes as of `medvlp pretrain`.
    """
    from launcher.commands.pretrain import train_config
    from medvlp import config_files, trust
    from medvlp.evaluation.supervised import finetuning_config

    files, overrides = split_arguments(arguments or [])
    named = [task] if task else [word.removeprefix("task=") for word in overrides if word.startswith("task=")]
    if len(set(named)) != 1:
        raise UsageError("name the task that is trained: task=NAME (medvlp evaluate --help lists them)")
    overrides = [word for word in overrides if not word.startswith("task=")]
    for option, key, is_given in (
        ("--fraction", "finetune.fraction", fraction is not None),
        ("--seed", "train.seed", seed is not None),
        ("--untrained", "finetune.start", untrained),
    ):
        if is_given and any(word.startswith(f"{key}=") for word in overrides):
            raise UsageError(f"{option} and {key} say the same: leave one of them out")
    config = finetuning_config(run, named[0], fraction, seed, untrained, files, overrides)
    if show:
        typer.echo(config_files.to_yaml(config), nl=False)
        return
    trust.remember_config(config)
    raise typer.Exit(train_config(config, nproc, fresh))
