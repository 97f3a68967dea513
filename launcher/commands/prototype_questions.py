"""`medvlp prototypes nearest | clusters | cluster`: questions to a server, or to the files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.console import echo, for_tables
from shards.errors import DataError, UsageError

if TYPE_CHECKING:
    from medvlp.serving.client import PrototypeClient
    from medvlp.serving.offline import RunFiles
    from medvlp.serving.questions import ClusterSummary

RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="ask the server that RUN/prototypes/server.json names"),
]
Server = Annotated[str | None, typer.Option("--server", metavar="HOST:PORT", help="ask this server")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="the server's token; default: RUN/prototypes/token")
]
Authority = Annotated[
    Path | None, typer.Option("--tls-ca", help="PEM file with the certificates to trust; for TLS")
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure-network", help="ask a --server of another machine without TLS all the same"),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="answer from the files of --run, whether a server runs or not")
]


def nearest(
    text: Annotated[str | None, typer.Option("--text", help="a finding, a sentence, a report")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="JPEG, PNG or TIFF")] = None,
    clusters: Annotated[int, typer.Option("--clusters", min=1, max=100, help="how many to show")] = 5,
    samples: Annotated[int, typer.Option("--samples", min=0, max=100, help="how many to show")] = 5,
    run: RunOption = None,
    server: Server = None,
    token_file: TokenFile = None,
    tls_ca: Authority = None,
    insecure_network: Insecure = False,
    offline: Offline = False,
) -> None:
    """Clusters and samples nearest to a text or an image."""
    if (text is None) == (image is None):
        raise UsageError("give either --text or --image")
    file = b""
    if image is not None:
        from shards.images import read_image_file  # brings decoders

        try:
            file = read_image_file(image)
        except OSError as error:
            raise UsageError(f"--image {image}: {error.strerror}") from error
        except DataError as error:
            raise UsageError(f"--image {image}: {error}") from error
    with _ask(run, server, token_file, tls_ca, insecure_network, offline) as asked:
        reply = (
            asked.nearest_text([text], clusters, samples)
            if text is not None
            else asked.nearest_image([file], clusters, samples)
        )
    echo(f"version {reply.version}, {reply.fingerprint}")
    table = Table(title="nearest clusters")
    table.add_column("cluster", justify="right")
    table.add_column("cosine", justify="right")
    for number, cosine in zip(reply.clusters, reply.cosines, strict=True):
        table.add_row(str(number), f"{cosine:.4f}")
    _print(table)
    if reply.sample_keys:
        table = Table(title="nearest samples, by their images")
        for column in ("key", "position", "cosine"):
            table.add_column(column, justify="left" if column == "key" else "right")
        for key, position, cosine in zip(
            reply.sample_keys, reply.sample_positions, reply.sample_cosines, strict=True
        ):
            table.add_row(escape(key), str(position), f"{cosine:.4f}")
        _print(table)


def clusters(
    run: RunOption = None,
    server: Server = None,
    token_file: TokenFile = None,
    tls_ca: Authority = None,
    insecure_network: Insecure = False,
    offline: Offline = False,
) -> None:
    """All clusters: size, purity, findings."""
    table = Table(title="clusters")
    for column in ("cluster", "images", "reports", "cosine", "purity", "findings"):
        table.add_column(column, justify="left" if column == "findings" else "right")
    with _ask(run, server, token_file, tls_ca, insecure_network, offline) as asked:
        for cluster in asked.all_clusters():
            table.add_row(*_summary(cluster, 3))
    _print(table)


def cluster(
    number: Annotated[int, typer.Argument(metavar="ID", min=0, help="number of the cluster")],
    run: RunOption = None,
    server: Server = None,
    token_file: TokenFile = None,
    tls_ca: Authority = None,
    insecure_network: Insecure = False,
    offline: Offline = False,
) -> None:
    """One cluster: size, purity, findings, and its most typical images by key."""
    with _ask(run, server, token_file, tls_ca, insecure_network, offline) as asked:
        reply = asked.cluster(number)
    names = ("cluster", "images", "reports", "mean cosine", "purity", "findings")
    echo(f"version {reply.version}, {reply.fingerprint}")
    table = Table(show_header=False)
    for name, value in zip(names, _summary(reply.cluster, 20), strict=True):
        table.add_row(name, value)
    _print(table)
    table = Table(title="most typical images")
    for column in ("key", "position", "cosine"):
        table.add_column(column, justify="left" if column == "key" else "right")
    for sample in reply.typical:
        table.add_row(escape(sample.key), str(sample.position), f"{sample.cosine:.4f}")
    _print(table)


def _summary(cluster: ClusterSummary, findings: int) -> tuple[str, ...]:
    return (
        str(cluster.id),
        str(cluster.images),
        str(cluster.reports),
        "" if cluster.similarity is None else f"{cluster.similarity:.3f}",
        "" if cluster.purity is None else f"{cluster.purity:.2f}",
        escape(", ".join(f"{label.name} {label.share:.0%}" for label in cluster.labels[:findings])),
    )


def _print(table: Table) -> None:
    for_tables(140).print(table)


def _ask(
    run: Path | None,
    server: str | None,
    token_file: Path | None,
    authority: Path | None,
    insecure_network: bool,
    offline: bool,
) -> PrototypeClient | RunFiles:
    """The server given, else the one of the run, else the run's files.

    Raises:
        UsageError: neither run nor server, or options that contradict each other.
    """
    if server is None and run is None:
        raise UsageError("say whom to ask: --run RUN, or --server HOST:PORT with --token-file")
    if offline and (server is not None or run is None):
        raise UsageError("--offline reads the files of --run RUN; a --server has no part in it")
    if insecure_network and (server is None or authority is not None):
        raise UsageError("--insecure-network is for a --server without --tls-ca")
    from medvlp.serving.layout import ADDRESS, folder_of

    if run is not None and server is None and (offline or not (folder_of(run) / ADDRESS).is_file()):
        from medvlp.serving.offline import RunFiles

        return RunFiles(run)
    from medvlp.serving.access import read_token
    from medvlp.serving.client import Connection, PrototypeClient, connection_of

    if server is not None:
        if token_file is None:
            raise UsageError("--server needs --token-file with the server's token")
        return PrototypeClient(Connection(server, read_token(token_file), authority, insecure_network))
    assert run is not None
    return PrototypeClient(connection_of(run, token_file, authority))
