"""The Pareto plot: the metric against a cost, all trials, the front, the dense and the chosen model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_plugins.report.figures import (
    BLUE,
    GREY,
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
from nni_plugins.report.findings import Candidate, Findings, ModelFigures, pareto_front

__all__ = ["BLUE", "COSTS", "GREY", "INK", "ORANGE", "Cost", "costs_of", "draw_pareto", "save_pareto"]

MANY_POINTS = 600
"""More of them are stored as a bitmap within the vector picture."""


@dataclass(frozen=True)
class Cost:
    """A cost to draw against: a field of the candidates and of the models, and how it is written."""

    name: str
    words: str
    units: tuple[tuple[float, str], ...]

    def unit(self, largest: float) -> tuple[str, float]:
        """The unit that suits the largest value, and its size."""
        for factor, name in self.units:
            if largest >= factor:
                return name, factor
        return self.units[-1][1], self.units[-1][0]

    def of(self, one: Candidate | ModelFigures) -> float | None:
        """The cost of a trial or a model, where it is known."""
        value = getattr(one, self.name)
        return None if value is None else float(value)


COSTS = {
    "macs": Cost("macs", "of one input", ((1e9, "GMACs"), (1e6, "MMACs"), (1e3, "kMACs"), (1.0, "MACs"))),
    "latency_ms": Cost("latency_ms", "latency of one input", ((1000.0, "s"), (1.0, "ms"), (0.001, "µs"))),
    "file_bytes": Cost("file_bytes", "size of the file", ((1024.0**2, "MiB"), (1024.0, "KiB"), (1.0, "bytes"))),
    "params": Cost("params", "parameters", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))),
}


def costs_of(findings: Findings) -> list[Cost]:
    """The costs that are worth a plot: of at least one trial each; parameters where no file's size is known."""
    points = [one for one in findings.candidates if one.metric is not None]
    known = [cost for cost in COSTS.values() if any(cost.of(one) is not None for one in points)]
    return [cost for cost in known if cost.name != "params" or COSTS["file_bytes"] not in known]


def save_pareto(findings: Findings, path: Path, dots_per_inch: int = 200, cost: str = "macs") -> None:
    """Draw the plot to `path` (its ending decides the format: png, pdf, svg).

    Parameters
    ----------
    findings
        The trials (those without a metric are left out), the dense model and the bounds; all on validation.
    path
        The file to write.
    dots_per_inch
        Resolution of a bitmap.
    cost
        Which one: a name in :data:`COSTS`.
    """
    save_figure(draw_pareto(findings, COSTS[cost]), path, dots_per_inch)


def draw_pareto(findings: Findings, cost: Cost, title: bool = True) -> Any:
    """The plot as a figure of matplotlib."""
    with styled():
        figure, axes = new_figure(5.4, 3.6)
        points = [one for one in findings.candidates if one.metric is not None and cost.of(one) is not None]
        marked = {"dense": findings.dense, "chosen": findings.compact}
        costs = [cost.of(one) or 0.0 for one in points]
        costs += [value for one in marked.values() if one is not None and (value := cost.of(one)) is not None]
        unit, scale = cost.unit(max(costs, default=0.0))
        values = [one.metric for one in points if one.metric is not None]
        dense_metric = None if findings.dense is None else findings.dense.validation
        in_percent = percent([*values, *([] if dense_metric is None else [dense_metric])], findings.metric)
        factor = 100.0 if in_percent else 1.0

        compact = None if findings.compact is None else cost.of(findings.compact)

        def place(candidates: list[Candidate]) -> tuple[list[float], list[float]]:
            own = [compact if one.id == findings.chosen and compact is not None else cost.of(one) for one in candidates]
            xs = [(value or 0.0) / scale for value in own]
            return xs, [factor * (one.metric or 0.0) for one in candidates]

        fits = [one for one in points if one.feasible and one.id != findings.chosen]
        _draw_trials(axes, place, fits, [one for one in points if not one.feasible and one.id != findings.chosen])
        _draw_front(axes, place, points, findings)
        _draw_marked(axes, place, points, findings, cost, scale, factor)
        costs.append(_draw_bound(axes, findings, cost, scale, unit, max(costs, default=0.0)))
        levels = [] if dense_metric is None else [factor * dense_metric]
        usual = [factor * one.metric for one in points if one.feasible and one.metric is not None]
        drawn = [factor * value for value in values]
        limit_outliers(axes, drawn, usual, levels, findings.higher_is_better, in_percent)
        axes.set_xlabel(f"{unit} {cost.words}" if cost.name == "macs" else f"{cost.words} ({unit})".replace(" ()", ""))
        axes.set_ylabel(metric_label(findings.metric, in_percent))
        if title:
            axes.set_title(shortened(findings.title, 70), fontsize=11, loc="left")
        low, high = sorted(axes.get_ylim())
        seen = [cost.of(one) or 0.0 for one in points if low <= factor * (one.metric or 0.0) <= high]
        costs = [*seen, *costs[len(points) :]]
        if costs:
            axes.set_xlim(left=0, right=1.06 * max(costs) / scale if max(costs) > 0 else None)
        bare(axes)
        legend_above(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_trials(axes: Any, place: Any, fits: list[Candidate], others: list[Candidate]) -> None:
    bitmap = {"rasterized": len(fits) + len(others) > MANY_POINTS}
    if others:
        axes.scatter(*place(others), s=22, c="none", edgecolors=GREY, linewidths=1.1, label="over a bound", **bitmap)
    if fits:
        axes.scatter(*place(fits), s=26, color=BLUE, alpha=0.75, linewidths=0, label="trial", zorder=3, **bitmap)


def _draw_front(axes: Any, place: Any, points: list[Candidate], findings: Findings) -> None:
    within = [one for one in points if one.feasible] or points
    front = pareto_front(zip(*place(within), strict=True), findings.higher_is_better)
    if len(front) > 1:
        axes.step(
            *zip(*front, strict=True),
            where="post",
            color=INK,
            linewidth=1.2,
            alpha=0.75,
            label="Pareto front",
            zorder=4,
        )


def _draw_marked(
    axes: Any, place: Any, points: list[Candidate], findings: Findings, cost: Cost, scale: float, factor: float
) -> None:
    """The star of the chosen model and the diamond of the dense one; their times were taken in turns, at the end."""
    xs, ys = place([one for one in points if one.id == findings.chosen])
    if xs:
        axes.scatter(
            xs, ys, s=150, marker="*", color=ORANGE, edgecolors=PAPER, linewidths=0.6, label="chosen", zorder=5
        )
    dense = findings.dense
    if dense is None or dense.validation is None:
        return
    level, where = factor * dense.validation, cost.of(dense)
    name = "dense" if findings.shared_dense else "dense, of the chosen one"
    if where is not None:
        axes.scatter([where / scale], [level], s=48, marker="D", color=INK, linewidths=0, label=name, zorder=4)
    axes.axhline(level, color=INK, linewidth=0.7, linestyle=":", alpha=0.7, zorder=1)


def _draw_bound(axes: Any, findings: Findings, cost: Cost, scale: float, unit: str, largest: float) -> float:
    """Draw the bound, where it is not far beyond all trials, and return it; else 0."""
    bound = findings.bounds.get({"file_bytes": "bytes"}.get(cost.name, cost.name))
    if not isinstance(bound, (int, float)):
        return 0.0
    base = None if findings.dense is None else cost.of(findings.dense)
    is_share = bound <= 1 and cost.name != "latency_ms"
    if is_share and base is None:
        return 0.0
    limit = (bound * (base or 0.0) if is_share else bound) / scale
    if limit * scale > 1.5 * largest:
        return 0.0
    axes.axvline(limit, color=INK, linewidth=0.9, linestyle="--", alpha=0.6, zorder=1)
    note = f" bound: {100 * bound:.3g}% of dense" if is_share else f" bound: {limit:.3g} {unit}"
    axes.annotate(note, (limit, 1.0), xycoords=("data", "axes fraction"), fontsize=8, va="bottom", ha="center")
    return limit * scale


def limit_outliers(
    axes: Any,
    values: list[float],
    usual: list[float],
    levels: list[float],
    higher_is_better: bool,
    in_percent: bool,
) -> None:
    """Keep a trial that learned nothing from squeezing the interesting points into a line; a note says how many.

    Parameters
    ----------
    axes
        Whose y axis is limited.
    values
        All that is drawn.
    usual
        Those of them that are to be seen apart: trials within the bounds.
    levels
        What else has to stay in sight.
    higher_is_better
        The metric's direction.
    in_percent
        Whether the values are.
    """
    usual = usual if len(usual) >= 3 else values
    if len(values) < 4:
        return
    sign = 1.0 if higher_is_better else -1.0
    ordered = sorted(sign * value for value in usual)
    middle, quarter = ordered[len(ordered) // 2], ordered[len(ordered) // 4]
    top = max([sign * value for value in (*values, *levels)])
    reach = max(top - quarter, 2.0 if in_percent else 0.02 * abs(middle))
    edge = quarter - 2 * reach
    if len(usual) < len(values):
        edge = min(edge, ordered[0] - 0.2 * reach) if middle - ordered[0] <= 4 * reach else edge
    hidden = sum(sign * value < edge for value in values)
    if middle - min(sign * value for value in values) <= 4 * reach or not hidden:
        return
    limits = (edge, top + 0.06 * (top - edge))
    axes.set_ylim(*(limits if sign > 0 else (-limits[1], -limits[0])))
    arrow, height, va = ("▼", 0.02, "bottom") if sign > 0 else ("▲", 0.98, "top")
    note = f"{hidden} trial{'s' if hidden > 1 else ''} beyond {arrow}"
    axes.annotate(note, (0.995, height), xycoords="axes fraction", fontsize=8, ha="right", va=va)
