"""`medvlp config`: the resolved tree of a run, or the reference of every key."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.arguments import split_arguments


def config(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files, then overrides"),
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="print every key with its meaning")] = False,
) -> None:
    """Print the config that these files and overrides give, or the reference of all keys."""
    from medvlp import config_files
    from medvlp.methods.registry import schemas

    if reference:
        typer.echo(config_files.reference(schemas()), nl=False)
        return
    files, overrides = split_arguments(arguments or [])
    tree = config_files.merge(files, overrides, schemas())
    if not config_files.missing(tree):
        config_files.load(files, overrides, schemas())
    typer.echo(config_files.to_yaml(tree), nl=False)
