"""The Pareto plot: the metric against MACs, all trials, the front, the dense and the chosen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nni_plugins.report.findings import Candidate, Findings, pareto_front

INK, GREY, BLUE, ORANGE = "#222222", "#b8bec8", "#2b6cb0", "#d9622b"
"""Colours that stay apart for colour-blind readers and in print."""


def save_pareto(findings: Findings, path: Path, dots_per_inch: int = 200) -> None:
    """Draw the plot to `path` (its ending decides the format: png, pdf, svg).

    Parameters
    ----------
    findings
        The trials (those without a metric are left out), the dense model and the bounds; all on validation.
    path
        The file to write.
    dots_per_inch
        Resolution of a bitmap.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit, scale = _unit(findings.dense.macs)
    points = [one for one in findings.candidates if one.metric is not None and one.macs is not None]
    by_choice = {chosen: [one for one in points if (one.id == findings.chosen) is chosen] for chosen in (True, False)}
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def place(candidates: list[Candidate]) -> tuple[list[float], list[float]]:
        xs = [(one.macs or 0) / scale for one in candidates]
        return xs, [_shown(one.metric or 0.0, findings.metric) for one in candidates]

    fits = [one for one in by_choice[False] if one.feasible]
    others = [one for one in by_choice[False] if not one.feasible]
    if others:
        axes.scatter(
            *place(others), s=22, facecolors="none", edgecolors=GREY, linewidths=1.1, label="trial over the budget"
        )
    axes.scatter(*place(fits), s=26, color=BLUE, alpha=0.75, linewidths=0, label="trial", zorder=3)
    front = pareto_front(zip(*place(points), strict=True), findings.higher_is_better)
    if len(front) > 1:
        axes.step(
            *zip(*front, strict=True),
            where="post",
            color=BLUE,
            linewidth=1.2,
            alpha=0.6,
            label="Pareto front",
            zorder=2,
        )
    axes.scatter(*place(by_choice[True]), s=150, marker="*", color=ORANGE, linewidths=0, label="chosen", zorder=5)
    if findings.dense.validation is not None:
        dense = _shown(findings.dense.validation, findings.metric)
        axes.scatter(
            [findings.dense.macs / scale], [dense], s=60, marker="D", color=INK, linewidths=0, label="dense", zorder=4
        )
        axes.axhline(dense, color=INK, linewidth=0.7, linestyle=":", alpha=0.7, zorder=1)
    bound = findings.bounds.get("macs")
    if isinstance(bound, (int, float)):
        limit = (bound * findings.dense.macs if bound <= 1 else bound) / scale
        axes.axvline(limit, color=INK, linewidth=0.9, linestyle="--", alpha=0.6, zorder=1)
        note = f" budget: {100 * bound:.0f}% of the MACs" if bound <= 1 else f" budget: {limit:.3g} {unit}"
        axes.annotate(note, (limit, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color=INK, va="top")
    _clip_outliers(axes, place(points)[1], findings)
    axes.set_xlabel(f"{unit} of one input")
    axes.set_ylabel(f"validation {findings.metric}" + (" (%)" if findings.metric == "accuracy" else ""))
    axes.set_title(findings.title, fontsize=11, loc="left")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, dpi=dots_per_inch)


def _shown(value: float, metric: str) -> float:
    return 100 * value if metric == "accuracy" else value


def _unit(macs: int) -> tuple[str, float]:
    for factor, name in ((1e9, "GMACs"), (1e6, "MMACs"), (1e3, "kMACs")):
        if macs >= factor:
            return name, factor
    return "MACs", 1.0


def _clip_outliers(axes: Any, values: list[float], findings: Findings) -> None:
    """Keep a trial that learned nothing from squeezing the interesting points into a line; it is drawn at the edge."""
    if findings.metric != "accuracy" or len(values) < 4:
        return
    ordered = sorted(values)
    low, middle = ordered[0], ordered[len(ordered) // 2]
    usual = ordered[len(ordered) // 4]
    top = max([*values, _shown(findings.dense.validation or 0.0, findings.metric)])
    if middle - low > 4 * max(top - usual, 2.0):
        edge = usual - 2 * max(top - usual, 2.0)
        hidden = sum(value < edge for value in values)
        axes.set_ylim(bottom=edge)
        note = f"{hidden} trial{'s' if hidden > 1 else ''} below"
        axes.annotate(note, (0.995, 0.02), xycoords="axes fraction", fontsize=8, ha="right")
