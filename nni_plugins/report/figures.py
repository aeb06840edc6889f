"""How the plots of a report look, and the ways they are stored: bitmaps, PDF, and SVG within a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nni_plugins.report.table import named

INK, GREY, BLUE, ORANGE = "#222222", "#b8bec8", "#2b6cb0", "#d9622b"
"""Colours that stay apart for colour-blind readers and in print."""
PAPER = "#fefefe"
PAGE = {INK: "currentColor", PAPER: "var(--card)", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREY: "var(--grey)"}
"""What the colours become within a page, which may be dark."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # names of layers may hold a dollar sign
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "nni-plugins",
    "pdf.fonttype": 42,
}
DASHES = str.maketrans(dict.fromkeys(range(32), " "))


@contextmanager
def styled() -> Iterator[None]:
    """Draw, and store, in the style of the reports; a letter that the font lacks is no reason to warn."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure, without a window, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def bare(axes: Any, grid: str = "both") -> None:
    """Leave a pale grid and two of the four sides."""
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend_above(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """Name what is drawn above the axes, where it covers nothing."""
    if not handles:
        return
    width = 0.6 * sum(len(label) + 8 for label in labels) * 8 / 72  # inches, of letters of 8 points
    lines = -(-int(100 * width) // int(92 * figure.get_figwidth()))
    columns = -(-len(labels) // lines)
    figure.legend(handles, labels, loc="outside upper right", ncols=columns, frameon=False, fontsize=8)


def settle(figure: Any) -> None:
    """Lay out once what is stored in several formats: it takes as long as drawing."""
    from matplotlib.layout_engine import PlaceHolderLayoutEngine

    engine = figure.get_layout_engine()
    if engine is not None and not isinstance(engine, PlaceHolderLayoutEngine):
        engine.execute(figure)
        figure.set_layout_engine("none")


def save_figure(figure: Any, path: Path, dots_per_inch: int = 200) -> None:
    """Write a figure; the ending of `path` decides the format (png, pdf, svg)."""
    dated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with styled():
        settle(figure)
        figure.savefig(path, dpi=dots_per_inch, metadata=dated.get(path.suffix.lower()))


def inline_svg(figure: Any, prefix: str) -> str:
    """The figure as SVG for a page: no names in common with other figures, and ink in the page's own colour.

    Parameters
    ----------
    figure
        Of matplotlib.
    prefix
        Goes before every id.
    """
    stored = io.StringIO()
    with styled():
        settle(figure)
        figure.savefig(stored, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    text = stored.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)width="([0-9.]+)pt"', r'\1style="max-width:\2pt"', text, count=1)
    for colour, name in PAGE.items():
        text = text.replace(colour, name)
    return re.sub(r"\n\s*\n+", "\n", text).strip()


def shortened(name: str, most: int) -> str:
    """A name on one line, with its middle left out where it is too long: its ends tell names of layers apart."""
    name = " ".join(str(name).translate(DASHES).split())
    if len(name) <= most:
        return name
    front = (most - 1) // 3
    return f"{name[:front]}…{name[len(name) - (most - 1 - front) :]}"


def percent(values: list[float], metric: str) -> bool:
    """Whether a metric is drawn in per cent: an accuracy that is a share."""
    return metric == "accuracy" and all(abs(value) <= 1 for value in values)


def metric_label(metric: str, in_percent: bool, split: str = "validation") -> str:
    """What an axis of the task's metric says."""
    return named(split, shortened(metric, 28)) + (" (%)" if in_percent else "")
