"""A picture of a model's groups: a bar a group, of its size and of its shares, and what pruning it alone costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nni_plugins.report.pareto import BLUE, GREY, INK, ORANGE
from nni_plugins.report.table import amount

COLOURS = {"exact": BLUE, "inexact": ORANGE, "frozen": GREY}
MOST = 400
"""So many groups are drawn, those with the most MACs; a taller picture could not be opened."""


def save_groups(found: dict[str, Any], path: Path, dots_per_inch: int = 150) -> None:
    """Draw the groups of :func:`nni_plugins.report.inspect.inspect_model` (the ending of ``path`` decides the format).

    Parameters
    ----------
    found
        What is known of the model.
    path
        The file to write.
    dots_per_inch
        Resolution of a bitmap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = found["groups"]
    if len(groups) > MOST:
        largest = sorted(range(len(groups)), key=lambda i: -groups[i]["macs"])[:MOST]
        groups = [groups[i] for i in sorted(largest)]
    panels = [("size", "units", 1.0), ("macs_share", "MACs (%)", 100.0), ("params_share", "parameters (%)", 100.0)]
    if found["latency"] is not None:
        panels.append(("latency_share", "latency (%)", 100.0))
    sensitivity = found.get("sensitivity")
    columns = len(panels) + (1 if sensitivity else 0)
    height = max(0.17 if len(groups) > 40 else 0.24, 0.1) * max(len(groups), 4) + 1.3
    figure = Figure(figsize=(1.6 + 2.1 * columns + (0.9 if sensitivity else 0), height), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [1.0] * len(panels) + ([1.5] if sensitivity else [])
    axes = figure.subplots(1, columns, sharey=True, squeeze=False, width_ratios=ratios)[0]
    places = range(len(groups))
    colours = [COLOURS[group["state"]] for group in groups]
    for one, (key, label, scale) in zip(axes, panels, strict=False):
        one.barh(places, [scale * group[key] for group in groups], color=colours, height=0.72, linewidth=0)
        one.set_xlabel(label, fontsize=8)
    if sensitivity:
        _draw_sensitivity(axes[-1], groups, sensitivity)
    _dress(axes, groups)
    shown = (
        "" if len(groups) == len(found["groups"]) else f" ({len(groups)} of {len(found['groups'])} with the most MACs)"
    )
    total = f"{amount(found['macs'])} MACs, {amount(found['params'])} parameters"
    if found["latency"] is not None:
        total += f", {found['latency']['measured_ms']:.3g} ms"
    figure.suptitle(f"{found['model']}: {total}{shown}", fontsize=10, x=0.01, ha="left", color=INK)
    _legend(figure, groups)
    figure.savefig(path, dpi=dots_per_inch)


def _dress(axes: Any, groups: list[dict[str, Any]]) -> None:
    size = 7.5 if len(groups) <= 40 else 6
    names = [name if len(name) <= 44 else f"…{name[-43:]}" for name in (group["name"] for group in groups)]
    axes[0].set_yticks(range(len(groups)), names, fontsize=size)
    axes[0].set_ylim(len(groups) - 0.4, -0.6)
    for one in axes:
        one.tick_params(axis="x", labelsize=7)
        one.tick_params(axis="y", length=0)
        one.grid(axis="x", alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
        for side in ("top", "right", "left"):
            one.spines[side].set_visible(False)
        if len(groups) > 25:
            one.tick_params(axis="x", top=True, labeltop=True)


def _draw_sensitivity(one: Any, groups: list[dict[str, Any]], sensitivity: dict[str, Any]) -> None:
    from matplotlib import colormaps

    scale = 100.0 if sensitivity["metric"] == "accuracy" else 1.0
    shades = colormaps["viridis_r"]
    sparsities = sensitivity["sparsities"]
    for index, sparsity in enumerate(sparsities):
        points = [
            (scale * value, place)
            for place, group in enumerate(groups)
            if (value := (group["sensitivity"] or {}).get(f"{sparsity:g}")) is not None
        ]
        if points:
            shade = shades(0.2 + 0.75 * index / max(1, len(sparsities) - 1))
            one.scatter(
                *zip(*points, strict=True), s=16, color=shade, label=f"{sparsity:.0%} gone", zorder=3, linewidths=0
            )
    one.axvline(scale * sensitivity["dense"], color=INK, linewidth=0.9, linestyle="--", alpha=0.7, label="dense")
    one.set_xlabel(sensitivity["metric"] + (" (%)" if scale == 100.0 else ""), fontsize=8)
    one.legend(fontsize=6.5, frameon=True, framealpha=0.8, edgecolor="none", loc="best")


def _legend(figure: Any, groups: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Patch

    states = [state for state in COLOURS if any(group["state"] == state for group in groups)]
    patches = [Patch(color=COLOURS[state], label=state) for state in states]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
