"""``compare.html``, ``compare.md`` and the plot of both fronts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.report.compare import Comparison, within
from nni_plugins.report.figures import (
    BLUE,
    INK,
    ORANGE,
    PAPER,
    bare,
    legend_above,
    metric_label,
    new_figure,
    percent,
    save_figure,
    shortened,
    styled,
)
from nni_plugins.report.findings import Findings, pareto_front
from nni_plugins.report.html import inlined, render, write_text
from nni_plugins.report.pareto import COSTS, limit_outliers
from nni_plugins.report.table import amount, markdown_table, quality

if TYPE_CHECKING:
    from rich.table import Table

KINDS = {
    "recipe": "The recipe",
    "space": "The search space",
    "search": "The search",
    "chosen": "What the two winners chose",
    "version": "Versions and machine",
}
LOOKS = ({"color": BLUE, "marker": "o", "line": "-"}, {"color": ORANGE, "marker": "s", "line": "--"})


def save_comparison(found: Comparison, folder: Path) -> None:
    """Write ``compare.html``, ``.md``, ``.json``, and ``.png`` and ``.pdf`` where there is something to draw."""
    figure = draw_fronts(found)
    for ending in (".png", ".pdf"):
        path = folder / f"compare{ending}"
        if figure is not None:
            save_figure(figure, path)
        else:
            path.unlink(missing_ok=True)
    write_text(folder / "compare.md", markdown(found, "compare.png" if figure is not None else None))
    write_text(folder / "compare.html", html(found, figure))
    write_text(folder / "compare.json", json.dumps(found.to_dict(), indent=1, default=str))


def html(found: Comparison, figure: Any = None) -> str:
    """The comparison as one self-contained page."""
    figures = inlined({} if figure is None else {"fronts": (figure, plot_words(found))})
    return render(
        "compare.html",
        found=found,
        figure=figures.get("fronts"),
        volume=volume_words(found),
        differences=[(KINDS[kind], rows) for kind, rows in grouped(found).items()],
    )


def markdown(found: Comparison, plot: str | None = "compare.png") -> str:
    """The comparison as Markdown."""
    parts = [f"# {found.names[0]} and {found.names[1]}"]
    parts += [f"> {warning}" for warning in found.warnings]
    parts.append(markdown_table(found.header, found.rows))
    if plot is not None:
        parts += [f"![{found.first.metric} against MACs: both fronts]({plot})"]
    parts += [words] if (words := volume_words(found)) else []
    for kind, rows in grouped(found).items():
        parts += [f"## {KINDS[kind]}", markdown_table(["", *found.names], rows, left=(0, 1, 2))]
    return "\n\n".join(parts) + "\n"


def grouped(found: Comparison) -> dict[str, list[list[str]]]:
    """The differences as rows, by kind."""
    tables: dict[str, list[list[str]]] = {}
    for one in found.differences:
        tables.setdefault(one.kind, []).append([one.name, one.first, one.second])
    return tables


def volume_words(found: Comparison) -> str:
    """What the hypervolume is a share of."""
    volume, metric = found.hypervolume, found.first.metric
    if volume is None:
        return ""
    better = "neither" if volume.first == volume.second else found.names[volume.second > volume.first]
    return (
        f"Hypervolume of the fronts: {volume.first:.4f} and {volume.second:.4f} (larger is better: {better}). They are "
        f"shares of the rectangle from {amount(volume.macs)} MACs and {metric} {quality(volume.worst, metric)} to none "
        f"and {quality(volume.best, metric)}, on validation."
    )


def comparison_table(found: Comparison) -> Table:
    """The best models side by side, for a terminal."""
    from rich.table import Table

    table = Table(title=f"{found.names[0]} and {found.names[1]}", title_justify="left")
    for index, name in enumerate(found.header):
        table.add_column(name, justify="right" if index else "left")
    for row in found.rows:
        table.add_row(*row)
    return table


def plot_words(found: Comparison) -> str:
    """What the plot shows."""
    return f"Validation {found.first.metric} against MACs: trials and fronts of both; stars: the chosen models."


def draw_fronts(found: Comparison) -> Any:
    """Both searches in one plot, as a figure of matplotlib; ``None`` where no trial knows its MACs."""
    sides = [(findings, within(findings)) for findings in (found.first, found.second)]
    points = [one for _, trials in sides for one in trials]
    if not points:
        return None
    dense = [one.dense for one, _ in sides if one.dense is not None]
    unit, scale = COSTS["macs"].unit(max([float(one.macs or 0) for one in points] + [float(one.macs) for one in dense]))
    values = [one.metric or 0.0 for one in points]
    in_percent = percent([*values, *(one.validation or 0.0 for one in dense)], found.first.metric)
    factor = 100.0 if in_percent else 1.0
    with styled():
        figure, axes = new_figure(5.4, 3.8)
        for (findings, _), name, look in zip(sides, found.names, LOOKS, strict=True):
            _draw_side(axes, findings, shortened(name, 34), look, scale, factor)
        drawn: set[tuple[int, float | None]] = set()
        for one in dense:
            if one.validation is not None and (one.macs, one.validation) not in drawn:
                drawn.add((one.macs, one.validation))
                axes.scatter([one.macs / scale], [factor * one.validation], s=44, marker="D", color=INK, linewidths=0)
        if drawn:
            axes.scatter([], [], s=44, marker="D", color=INK, linewidths=0, label="dense")
        levels = [factor * one.validation for one in dense if one.validation is not None]
        heights = [factor * value for value in values]
        limit_outliers(axes, heights, heights, levels, found.first.higher_is_better, in_percent)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{unit} of one input")
        axes.set_ylabel(metric_label(found.first.metric, in_percent))
        bare(axes)
        legend_above(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_side(axes: Any, findings: Findings, name: str, look: dict[str, str], scale: float, factor: float) -> None:
    trials = within(findings)
    places = [((one.macs or 0) / scale, factor * (one.metric or 0.0)) for one in trials]
    if not places:
        return
    shape: dict[str, Any] = {"marker": look["marker"], "color": look["color"]}
    axes.scatter(
        *zip(*places, strict=True), s=16, alpha=0.35, linewidths=0, zorder=3, rasterized=len(places) > 600, **shape
    )
    front = pareto_front(places, findings.higher_is_better)
    line: dict[str, Any] = {"drawstyle": "steps-post", "linestyle": look["line"], "linewidth": 1.4, "markersize": 4.5}
    axes.plot(*zip(*front, strict=True), zorder=4, label=name, **line, **shape)
    chosen = [place for place, one in zip(places, trials, strict=True) if one.id == findings.chosen]
    for x, y in chosen:
        axes.scatter([x], [y], s=170, marker="*", color=look["color"], edgecolors=PAPER, linewidths=0.8, zorder=6)
