"""`medvlp import`: published checkpoints and single backbones as run folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from launcher.command_words import CommandGroup
from launcher.console import Console, echo

#: The default, written out because importing it would import torch.
CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Make a run folder of published weights. No code in a file is run; every key is used or listed.",
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="the published checkpoint, as downloaded")]
Out = Annotated[Path, typer.Option("--out", metavar="RUN", help="new or empty folder")]
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", metavar="NAME|DIR", help="the text encoder's tokenizer")
]
AllowUnknown = Annotated[
    bool, typer.Option("--allow-unknown", help="list keys that the model does not have, go on without them")
]


@app.command("mgca")
def mgca(
    file: File,
    out: Out,
    tokenizer: TokenizerOption = CLINICAL_BERT,
    allow_unknown: AllowUnknown = False,
) -> None:
    """MGCA's vit_base.ckpt or resnet_50.ckpt."""
    _import("mgca", file, out, tokenizer=tokenizer, allow_unknown=allow_unknown)


@app.command("prior")
def prior(
    file: File,
    out: Out,
    tokenizer: TokenizerOption = CLINICAL_BERT,
    allow_unknown: AllowUnknown = False,
) -> None:
    """PRIOR: the whole model, or prior_resnet50.pt.

    The latter is the image encoder alone, for linear probes.
    """
    _import("prior", file, out, tokenizer=tokenizer, allow_unknown=allow_unknown)


@app.command("medslip")
def medslip(
    file: File,
    out: Out,
    book: Annotated[
        Path | None,
        typer.Option("--book", metavar="JSON", help="the authors' observation explanation.json"),
    ] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="NAME|DIR", help="the frozen text model")
    ] = CLINICAL_BERT,
    tokenizer: TokenizerOption = CLINICAL_BERT,
    allow_unknown: AllowUnknown = False,
) -> None:
    """MeDSLIP_resnet50.pth of MeDSLIP.

    Its text model and the descriptions of its book are not in the file.
    """
    _import("medslip", file, out, book=book, text=text, tokenizer=tokenizer, allow_unknown=allow_unknown)


@app.command("timm")
def timm(
    named: Annotated[str, typer.Argument(metavar="NAME|DIR", help="timm name, hf-hub:NAME, or folder")],
    out: Out,
) -> None:
    """An image backbone alone, for probes and as a start."""
    from medvlp.published.backbones import import_timm

    echo(str(import_timm(named, out, _say())))


@app.command("huggingface")
def huggingface(
    named: Annotated[str, typer.Argument(metavar="NAME|DIR", help="hub name or folder of a text model")],
    out: Out,
) -> None:
    """A text model of transformers alone, as a start."""
    from medvlp.published.backbones import import_huggingface

    echo(str(import_huggingface(named, out, _say())))


def _import(kind: str, file: Path, out: Path, **sources: object) -> None:
    from medvlp.published.run import Sources, import_checkpoint

    echo(str(import_checkpoint(kind, file, out, Sources(**sources), _say())))  # type: ignore[arg-type]


def _say() -> Callable[[str], None]:
    console = Console(stderr=True)
    return lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
