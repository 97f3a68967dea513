"""`medvlp predict` and `medvlp embed`: findings of images as a table, embeddings of a dataset as Parquet."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import echo
from medvlp.ranks import detect
from shards.errors import MedvlpError, UsageError

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run, checkpoint or exported folder")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="JPEG, PNG, TIFF or DICOM files")],
    out: Annotated[Path, typer.Option("--out", metavar="CSV", help="table to write")],
    findings: Annotated[
        str, typer.Option("--findings", metavar="A,B", help="names of findings, separated by commas")
    ] = "",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="YAML", help="prompts of one's own; its findings")
    ] = None,
    overlays: Annotated[
        Path | None,
        typer.Option("--overlays", metavar="DIR", help="where each finding is seen, as PNG files"),
    ] = None,
    device: Device = "auto",
    window: Annotated[
        str | None,
        typer.Option(
            "--window", help="DICOM values to grey levels: auto, max or equalize; default: as in training"
        ),
    ] = None,
) -> None:
    """Score findings in images: a row an image, a column a finding. Higher is likelier; no probabilities.

    For research, not for clinical use. Scores order images by one finding; compare them inside a column.
    """
    import medvlp
    from medvlp.evaluation.prompts import read
    from medvlp.library.overlays import write_overlays
    from shards.atomic import atomic_write

    names = [name.strip() for name in findings.split(",") if name.strip()]
    names = names or (list(read(prompts).findings) if prompts is not None else [])
    if not names:
        raise UsageError(
            "no finding is named: --findings effusion,pneumothorax, or --prompts FILE with findings"
        )
    if overlays is not None and overlays.exists() and not (overlays.is_dir() and not any(overlays.iterdir())):
        raise UsageError(f"--overlays {overlays} is not an empty folder: choose another, or remove it first")
    model = medvlp.load(run, device, window)
    table = model.zero_shot(images, names, prompts)
    if overlays is not None:
        write_overlays(model, images, names, overlays)
    # A name that is not UTF-8 stands in the table as the bytes it has on the disk.
    atomic_write(out, table.to_csv(float_format="%.6f").encode(errors="surrogateescape"))
    echo(str(out))


def embed(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run or checkpoint folder")],
    data: Annotated[str, typer.Option("--data", help="dataset folder or URL prefix")],
    out: Annotated[Path, typer.Option("--out", metavar="PARQUET", help="file to write")],
    split: Annotated[str | None, typer.Option("--split", help="one split; default: all")] = None,
    features: Annotated[
        bool, typer.Option("--features", help="features of the backbone, before any projection, as well")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="ranks here; default: one per GPU, else one")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="images of one forward pass")] = 64,
) -> None:
    """Embed a dataset's images and reports into one Parquet file, on one rank or several.

    Columns: split, key, position, patient_id, study_id, image, report (lists of float32; null where the
    method embeds none, and for samples without a report), and features. Works inside torchrun and srun too.
    """
    place = detect()
    if place.launcher != "none":
        raise typer.Exit(_embed_rank(run, data, out, split, features, batch))
    from launcher import local

    ranks, has_cuda = local.ranks_here(nproc)
    if ranks == 1:
        os.environ |= local.library_environment(1, has_cuda, os.environ)
        code = _embed_rank(run, data, out, split, features, batch)
    else:
        words = ["embed", str(run), "--data", data, "--out", str(out), "--batch", str(batch)]
        words += (["--split", split] if split else []) + (["--features"] if features else [])
        code = local.launch(words, ranks, has_cuda)
    if code:
        raise typer.Exit(code)
    echo(str(out))


def _embed_rank(run: Path, data: str, out: Path, split: str | None, features: bool, batch: int) -> int:
    """Embed as one rank; of errors that several ranks raise, one is shown."""
    from launcher.local import die_with_launcher, may_show_error
    from medvlp.library.embedding import Request, embed_dataset

    die_with_launcher(os.environ)
    try:
        embed_dataset(Request(run, data, out, split, features, batch))
    except MedvlpError as error:
        if not may_show_error(error, os.environ):
            sys.exit(error.exit_code)
        raise
    return 0
