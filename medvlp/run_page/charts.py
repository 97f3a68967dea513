"""Curves as SVG that stands inside the page: its ink follows the page, its text is text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]

#: Stands for the page's own colour of text in what matplotlib writes.
_INK = "#010203"
#: Readable on white and on black (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.usetex": False,
    "text.parse_math": False,  # names of a stranger's metrics are words, not formulas
    "font.size": 9,
    "figure.facecolor": "none",  # the page's own ground, light or dark
    "axes.facecolor": "none",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_numbers = count()


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    marks: Sequence[float] = (),
    axes: tuple[str, str] = ("step", ""),
    unit_square: bool = False,
    diagonal: bool = False,
) -> str:
    """An `<svg>` with a line for each curve.

    Args:
        title: what is drawn, for people who hear it.
        curves: name in the legend -> (x, y).
        marks: x of dotted vertical lines (restarts).
        axes: what x and y are.
        unit_square: both go from 0 to 1. diagonal: a dotted line from corner to corner.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 3.4 if unit_square else 2.7), layout="constrained")
        plot = figure.subplots()
        for number, (name, (steps, values)) in enumerate(curves.items()):
            style = ("-", "--", ":")[number // len(COLOURS) % 3]
            plot.plot(steps, values, style, color=COLOURS[number % len(COLOURS)], linewidth=1.4, label=name)
        for mark in marks:
            plot.axvline(mark, color=_INK, linewidth=0.8, linestyle=":")
        if unit_square:
            plot.set_xlim(-0.01, 1.01)
            plot.set_ylim(-0.01, 1.01)
        if diagonal:
            plot.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
        plot.set_xlabel(axes[0])
        plot.set_ylabel(axes[1])
        plot.grid(visible=True, color="#808080", alpha=0.25, linewidth=0.6)
        if len(curves) > 1:
            plot.legend(fontsize=7, frameon=False)
        return _inside_a_page(figure, title)


def _inside_a_page(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)  # its methods are not typed
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    # Several charts share the page: an id is kept where something refers to it, under a name of its own.
    own = f"c{next(_numbers)}-"
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)([\w-]+)', rf"\g<1>{own}\2", svg)
    svg = svg.replace(_INK, "currentColor")
    described = re.sub(r"[^\w ./@%+,:-]", "", title)
    size = r'<svg [^>]*?viewBox="([^"]+)"[^>]*>'
    return re.sub(size, rf'<svg viewBox="\1" role="img" aria-label="{described}">', svg, count=1)
