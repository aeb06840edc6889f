"""What is left of each layer: a bar a channel group, of the units kept in that of all units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nni_plugins.report.figures import BLUE, GREY, INK, bare, legend_above, new_figure, shortened, styled
from nni_plugins.report.findings import Layer

MOST = 120
"""So many layers are drawn, those that lose the most units; the caption says so."""
WIDE_RANGE = 20
"""Where the widest layer has so many times the units of the narrowest, bars are shares."""


def kind_of(layers: Sequence[Layer]) -> str:
    """What the bars count: ``units`` or ``weights``."""
    return layers[0].kind if layers else "units"


def shown_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Those that are drawn, in the model's order."""
    if len(layers) <= MOST:
        return list(layers)
    losing = sorted(range(len(layers)), key=lambda index: layers[index].kept - layers[index].size)[:MOST]
    return [layers[index] for index in sorted(losing)]


def unlike(names: Sequence[str]) -> list[str]:
    """The names, shortened as far as they stay apart."""
    for most in (38, 54, 70):
        short = [shortened(name, most) for name in names]
        if len(set(short)) == len(set(names)):
            break
    return short


def draw_layers(layers: Sequence[Layer]) -> Any:
    """The bars as a figure of matplotlib.

    Parameters
    ----------
    layers
        At least one.
    """
    shown = shown_layers(layers)
    names = unlike([layer.name for layer in shown])
    sizes = [max(layer.size, 1) for layer in shown]
    weights = kind_of(layers) == "weights"
    shares = weights or max(sizes) > WIDE_RANGE * min(sizes)
    dense = [100.0 if shares else float(size) for size in sizes]
    kept = [whole * layer.kept / size for whole, layer, size in zip(dense, shown, sizes, strict=True)]
    row = 0.21 if len(shown) <= 30 else 0.165
    with styled():
        figure, axes = new_figure(5.4, row * max(len(shown), 3) + 0.9)
        places = range(len(shown))
        axes.barh(places, dense, height=0.74, color=GREY, alpha=0.45, linewidth=0, label="dense")
        axes.barh(places, kept, height=0.74, color=BLUE, linewidth=0, label="kept")
        small = 7.5 if len(shown) <= 30 else 6
        for place, whole, layer in zip(places, dense, shown, strict=True):
            text = f"{100 * layer.kept / max(layer.size, 1):.3g}%" if weights else f"{layer.kept}/{layer.size}"
            axes.annotate(
                text, (whole, place), (3, 0), textcoords="offset points", va="center", fontsize=small, color=INK
            )  # fmt: skip
        axes.set_yticks(places, names, fontsize=small)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.13 * max(dense))
        what = "weights" if weights else "units"
        axes.set_xlabel(f"{what} kept (% of the dense layer's)" if shares else "units (channels, heads …) of the layer")
        bare(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        legend_above(figure, *axes.get_legend_handles_labels())
    return figure
