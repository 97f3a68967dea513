"""The `medvlp` command. Each group of commands is one file under `launcher/commands/`."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from launcher.commands import checkpoints, config, evaluate, export, pretrain, shards
from shards.errors import MedvlpError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-train medical vision-language models on image-report pairs.",
)
app.add_typer(shards.app, name="shards")
app.command("config")(config.config)
app.command("pretrain")(pretrain.pretrain)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(evaluate.compare)
app.command("export")(export.export)
app.command("checkpoints")(checkpoints.checkpoints)


def run() -> NoReturn:
    """Run the command; an error meant for the user becomes one line and its documented exit code."""
    try:
        app()
    except MedvlpError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    run()
