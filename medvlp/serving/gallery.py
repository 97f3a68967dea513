"""A page for people: the most typical images of every cluster, and which findings they have."""

from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medvlp.config import DataConfig
from medvlp.data.cache import open_reader
from medvlp.serving.cluster_report import Members, overall
from medvlp.serving.layout import GALLERY, PAGE, PrototypeFilesError
from shards.atomic import atomic_folder
from shards.errors import DataError
from shards.images import decode_image
from shards.progress import tracked
from shards.reader import ShardReader

_CELL, _GAP, _TITLE, _FONT = 144, 4, 22, 13
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:75em}section{margin:0 0 2em}"
    "h2{margin:0 0 .3em}img{display:block;max-width:100%}small{color:#555}"
    "td,th{padding:0 1em 0 0;text-align:left}"
)


def write_gallery(
    members: Members,
    data: DataConfig,
    folder: Path,
    images: int,
    clusters: int,
) -> Path:
    """Write `gallery/`: one contact sheet (PNG) for each of the largest clusters, and `index.html`.

    The page holds sample keys, findings and metrics, no report text. It appears whole or not at all; a
    gallery that was there is replaced.

    Args:
        members: the clusters and who is in them.
        data: where the images are.
        folder: `RUN/prototypes`.
        images: on a sheet. clusters: most sheets.

    Returns:
        The page.

    Raises:
        PrototypeFilesError: the dataset is another one than the embeddings are of, or the folder cannot be
            written.
        DataError: the dataset cannot be read.
    """
    origin = members.snapshot.origin
    reader = open_reader(data)
    if reader.index.fingerprint != origin.data:
        raise PrototypeFilesError(
            f"{data.root} is another dataset than the one the prototypes were built on: give that one with "
            "--data, or build them anew"
        )
    order = np.argsort(-members.images, kind="stable")[:clusters]
    chosen = [int(number) for number in order if members.images[number]]
    final = folder / GALLERY
    try:
        with atomic_folder(final, replace=True) as partial:
            sections = []
            for number in tracked(chosen, "drawing sheets of clusters", len(chosen)):
                rows = members.rows(number)[:images].tolist()
                name = f"cluster-{number:05d}.png"
                _sheet(members, reader, number, rows).save(partial / name, optimize=True)
                sections.append(_section(members, number, rows, name))
            (partial / PAGE).write_text(_page(members, sections), encoding="utf-8")
    except OSError as error:
        raise PrototypeFilesError(f"{final} cannot be written: {error.strerror or error}") from error
    return final / PAGE


def _sheet(members: Members, reader: ShardReader, number: int, rows: list[int]) -> Image.Image:
    """The images side by side, below a line with the cluster's number and findings."""
    columns = min(len(rows), 6)
    lines = -(-len(rows) // columns)
    size = (columns * (_CELL + _GAP) + _GAP, lines * (_CELL + _GAP) + _GAP + _TITLE)
    sheet = Image.new("L", size, 255)
    title = f"{number}: {_findings(members, number, 3)}"
    ImageDraw.Draw(sheet).text((_GAP, 3), title, fill=0, font=ImageFont.load_default(_FONT))
    split, positions = members.snapshot.origin.split, members.snapshot.sample
    for place, row in enumerate(rows):
        try:
            pixels = decode_image(reader.image(split, int(positions[row])))
        except DataError as error:
            raise DataError(f"sample {members.snapshot.key_of(row)}: {error}") from error
        cell = Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
        left, top = place % columns, place // columns
        sheet.paste(cell, (_GAP + left * (_CELL + _GAP), _TITLE + _GAP + top * (_CELL + _GAP)))
    return sheet


def _section(members: Members, number: int, rows: list[int], sheet: str) -> str:
    """One cluster on the page."""
    purity = members.purity(number)
    facts = [
        f"{members.images[number]} images, {members.reports[number]} reports",
        f"mean cosine {members.similarity[number]:.3f}",
        "no labels" if purity is None else f"purity {purity:.2f}",
    ]
    keys = ", ".join(escape(members.snapshot.key_of(row)) for row in rows)
    return (
        f'<section id="cluster-{number}"><h2>{number}</h2><p>{escape(" · ".join(facts))}<br>'
        f'{escape(_findings(members, number, 8))}</p><img loading="lazy" alt="" src="{escape(sheet)}">'
        f"<small>{keys}</small></section>"
    )


def _page(members: Members, sections: list[str]) -> str:
    origin, table = members.snapshot.origin, members.snapshot.table
    title = f"Prototypes of {origin.run}"
    facts = {
        "checkpoint": origin.checkpoint,
        "clusters": f"{len(table.centroids)} ({origin.source}), {len(sections)} shown",
        "fingerprint": table.fingerprint,
        "samples": f"{len(members.snapshot.sample)} of split {origin.split}",
    }
    facts |= {
        name.replace("_", " "): f"{value:.3f}"
        for name, value in overall(members).items()
        if isinstance(value, float)
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        # Whatever a label or key may hold, the page can load nothing but its own pictures.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' file:; "
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<table>{rows}</table>{''.join(sections)}</body></html>\n"
    )


def _findings(members: Members, number: int, most: int) -> str:
    mix = list(members.label_mix(number).items())[:most]
    return ", ".join(f"{name} {share:.0%}" for name, share in mix) or "no finding"
