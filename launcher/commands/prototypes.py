"""`medvlp prototypes build | gallery | export | serve`: clusters of a run as files, pages, and a server."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.command_words import CommandGroup
from launcher.commands import prototype_questions
from launcher.console import Console, echo
from shards.errors import UsageError

if TYPE_CHECKING:
    from medvlp.config import Config
    from medvlp.runs.saved_run import SavedRun
    from medvlp.serving.cluster_report import Members

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Clusters of a run for people and mining jobs."
)
app.command("nearest")(prototype_questions.nearest)
app.command("clusters")(prototype_questions.clusters)
app.command("cluster")(prototype_questions.cluster)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
Data = Annotated[str | None, typer.Option("--data", help="dataset folder or URL; default: the run's own")]
Split = Annotated[str | None, typer.Option("--split", help="split to embed; default: the one trained on")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=0, help="samples to embed, evenly spread over the split; 0: all; default: 20000"
    ),
]
Clusters = Annotated[
    int | None,
    typer.Option(
        "--clusters", min=2, help="cluster anew into so many; default: the run's own clusters if it has some"
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint folder")
    ],
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    clusters: Clusters = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="default: RUN/prototypes")
    ] = None,
    device: Device = "auto",
) -> None:
    """Embed samples and write prototypes.safetensors and report.json into RUN/prototypes."""
    from medvlp.serving.build import SnapshotOptions, build

    options = SnapshotOptions(source, data, split, limit, clusters, out, device)
    echo(str(build(options, _say())))


@app.command()
def gallery(
    run: Run,
    data: Data = None,
    images: Annotated[int, typer.Option("--images", min=1, max=100, help="images of a cluster")] = 12,
    clusters: Annotated[int, typer.Option("--clusters", min=1, help="only so many, the largest")] = 500,
) -> None:
    """Contact sheets of the most typical images of each cluster, as a page in RUN/prototypes/gallery."""
    from medvlp.runs import saved_run
    from medvlp.serving.cluster_report import Members
    from medvlp.serving.gallery import write_gallery
    from medvlp.serving.layout import SNAPSHOT, folder_of
    from medvlp.serving.snapshot import Snapshot

    folder = folder_of(run)
    members = Members.of(Snapshot.read(folder / SNAPSHOT))
    source = saved_run.locate(run)
    config = saved_run.load_config(source, [], data)
    page = write_gallery(members, config.data, folder, images, clusters)
    _share(page, members, source, config)
    echo(str(page))


#: Sheets of the largest clusters that are sent to W&B.
_SHARED = 24


def _share(page: Path, members: "Members", source: "SavedRun", config: "Config") -> None:
    """Add the gallery to the W&B run of the training, where its user shares samples."""
    from medvlp import trust
    from medvlp.training.wandb_run import WandbRun, known_id

    key, entity = "monitor.share_samples", config.monitor.entity
    run_id = known_id(source.run, source.manifest.wandb_run_id)
    if run_id is None or not (config.monitor.share_samples and trust.is_said(key, True)):
        return
    if entity is not None and not trust.is_said("monitor.entity", entity):
        return
    import numpy as np
    from PIL import Image

    sheets = sorted(page.parent.glob("cluster-*.png"), key=lambda path: -members.images[_number(path)])
    run = WandbRun(config.monitor, source.run, source.name(config), {}, run_id, "gallery")
    run.images("prototypes/gallery", [
        (np.asarray(Image.open(sheet)), f"cluster {_number(sheet)}: {members.images[_number(sheet)]} images")
        for sheet in sheets[:_SHARED]
    ])  # fmt: skip
    run.finish()


def _number(sheet: Path) -> int:
    return int(sheet.stem.rpartition("-")[2])


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT.faiss", help="the index file; replaced if it exists")],
    samples: Annotated[
        str | None,
        typer.Option("--samples", help="image or report: the samples' embeddings in place of the centroids"),
    ] = None,
) -> None:
    """Write centroids (or samples) as a plain FAISS index, which faiss.read_index opens."""
    from medvlp.serving.layout import SNAPSHOT, folder_of
    from medvlp.serving.snapshot import Snapshot, export_index

    if samples not in (None, "image", "report"):
        raise UsageError(f"--samples {samples}: there are image and report")
    rows = export_index(Snapshot.read(folder_of(run) / SNAPSHOT), out, samples)
    echo(f"{out}: {rows} rows")


@app.command()
def serve(
    run: Run,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one")] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="default: RUN/prototypes/token, made where it does not exist"),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="PEM file")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM file")] = None,
    insecure_network: Annotated[
        bool, typer.Option("--insecure-network", help="serve other machines without TLS all the same")
    ] = False,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="embeddings of a request")] = 4096,
    max_message: Annotated[int, typer.Option("--max-message", min=1, help="MiB of a request")] = 16,
    max_connections: Annotated[int, typer.Option("--max-connections", min=1, help="open ones")] = 1024,
    rate: Annotated[
        float, typer.Option("--rate", min=0, help="requests a second of one address; 0: no limit")
    ] = 10_000,
    follow: Annotated[
        bool, typer.Option("--follow", help="while the run trains: always the newest checkpoint")
    ] = False,
    poll: Annotated[float, typer.Option("--poll", min=0.1, help="seconds between two looks at the run")] = 10,
    data: Data = None,
    split: Split = None,
    limit: Limit = None,
    clusters: Clusters = None,
    device: Device = "auto",
) -> None:
    """Answer questions about a run's clusters over gRPC until SIGTERM or Ctrl-C; read-only, with a token.

    RUN/prototypes is built first where it does not exist. What is there must be what --data, --split, --limit
    and --clusters ask for where they are given; --follow builds it anew where it is not.
    """
    from medvlp.serving.build import SnapshotOptions
    from medvlp.serving.limits import Limits
    from medvlp.serving.serve import ServeOptions, serve
    from medvlp.serving.server import Address

    serve(
        ServeOptions(
            run=run,
            address=Address(host, port, tls_cert, tls_key),
            build=SnapshotOptions(run, data, split, limit, clusters, device=device),
            limits=Limits(
                message_bytes=max_message << 20, rows=max_rows, connections=max_connections, rate=rate
            ),
            token_file=token_file,
            insecure_network=insecure_network,
            follow=follow,
            poll_seconds=poll,
        ),
        _say(),
    )


def _say() -> Callable[[str], None]:
    console = Console(stderr=True)
    return lambda line: console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
