"""How the search went: what trials reported while they ran, and the best result so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nni_plugins.report.figures import BLUE, GREY, INK, ORANGE, PAPER, bare, legend_above, new_figure, percent, styled
from nni_plugins.report.findings import Candidate, Findings
from nni_plugins.report.pareto import limit_outliers

MANY_CURVES = 150


def has_curves(findings: Findings) -> bool:
    """Whether a trial reported more than one number while it ran."""
    return any(sum(value is not None for value in one.curve) > 1 for one in findings.candidates)


def draw_curves(findings: Findings) -> Any:
    """The intermediate results of all trials: the chosen one and the rest of the front stand out."""
    front = {one.id for one in findings.front()}
    ranked = [one for one in findings.best_first() if any(value is not None for value in one.curve)]
    ended = [one.default for one in ranked if one.default is not None and one.feasible]
    highest = [max(value for value in one.curve if value is not None) for one in ranked]
    in_percent = findings.maximize and percent(ended, findings.metric) and max(highest, default=0.0) <= 1
    factor = 100.0 if in_percent else 1.0
    with styled():
        figure, axes = new_figure(5.4, 3.3)
        said: set[str] = set()
        for one in reversed(ranked):
            kind = "chosen" if one.id == findings.chosen else _kind(one, front)
            look = LOOKS[kind]
            values = [math.nan if value is None else factor * value for value in one.curve]
            axes.plot(
                range(1, len(values) + 1),
                values,
                label=None if kind in said else kind,
                marker="o" if len(values) == 1 else None,
                rasterized=len(ranked) > MANY_CURVES and kind == "trial",
                markersize=3,
                **look,
            )
            said.add(kind)
        _limits(axes, [one.curve for one in ranked], factor, findings.maximize)
        axes.set_xlabel("epoch of fine-tuning" if findings.compact is not None else "intermediate result")
        axes.set_ylabel("objective on validation" + (" (%)" if in_percent else ""))
        axes.xaxis.get_major_locator().set_params(integer=True)
        bare(axes)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda index: list(LOOKS).index(labels[index]))
        legend_above(figure, [handles[index] for index in order], [labels[index] for index in order])
    return figure


LOOKS: dict[str, dict[str, Any]] = {
    "chosen": {"color": ORANGE, "linewidth": 2.0, "zorder": 5},
    "on the Pareto front": {"color": BLUE, "linewidth": 1.3, "alpha": 0.85, "zorder": 4},
    "trial": {"color": GREY, "linewidth": 0.9, "alpha": 0.8, "zorder": 3},
    "without a result": {"color": INK, "linewidth": 0.9, "linestyle": ":", "alpha": 0.8, "zorder": 3},
}


def _kind(one: Candidate, front: set[str]) -> str:
    if one.id in front and len(front) > 1:
        return "on the Pareto front"
    return "trial" if one.default is not None else "without a result"


def _limits(axes: Any, curves: Sequence[Sequence[float | None]], factor: float, maximize: bool) -> None:
    """Leave out of sight what is far below the rest: a first epoch that is still worse than chance, a penalty."""
    values = sorted(
        factor * value if maximize else -factor * value for curve in curves for value in curve if value is not None
    )
    if len(values) < 8:
        return
    low, quarter, middle, top = values[0], values[len(values) // 4], values[len(values) // 2], values[-1]
    reach = max(top - quarter, 2.0 if factor == 100.0 else 0.02 * abs(middle), 1e-12)
    if quarter - low > 3 * reach:
        edge = quarter - 2 * reach
        limits = (edge, top + 0.06 * (top - edge))
        axes.set_ylim(*(limits if maximize else (-limits[1], -limits[0])))


def draw_progress(findings: Findings) -> Any:
    """The result of each trial by number, and the best so far."""
    found = sorted((one for one in findings.candidates if one.default is not None), key=lambda one: one.sequence)
    values = [one.default or 0.0 for one in found]
    in_percent = percent([one.default or 0.0 for one in found if one.feasible], findings.metric)
    factor = 100.0 if in_percent else 1.0
    with styled():
        figure, axes = new_figure(5.4, 3.0)
        best: list[float] = []
        for value in values:
            better = max if findings.maximize else min
            best.append(better(value, best[-1]) if best else value)
        numbers = [one.sequence + 1 for one in found]
        for feasible, look in (
            (
                False,
                {"s": 22, "zorder": 3, "c": "none", "edgecolors": GREY, "linewidths": 1.1, "label": "over a bound"},
            ),
            (True, {"s": 22, "zorder": 3, "color": BLUE, "alpha": 0.75, "linewidths": 0, "label": "trial"}),
        ):
            part = [index for index, one in enumerate(found) if one.feasible is feasible]
            if part:
                axes.scatter(
                    [numbers[index] for index in part], [factor * values[index] for index in part], **look
                )  # fmt: skip
        axes.step(
            numbers, [factor * value for value in best], where="post", color=BLUE, linewidth=1.3, label="best so far"
        )
        chosen = [index for index, one in enumerate(found) if one.id == findings.chosen]
        axes.scatter(
            [numbers[index] for index in chosen],
            [factor * values[index] for index in chosen],
            s=150,
            marker="*",
            color=ORANGE,
            edgecolors=PAPER,
            linewidths=0.6,
            zorder=5,
            label="chosen",
        )
        failed = [one.sequence + 1 for one in findings.candidates if one.status == "FAILED"]
        usual = [one.default or 0.0 for one in found if one.feasible]
        levels = [factor * value for value in values], [factor * value for value in usual]
        limit_outliers(axes, *levels, [], findings.maximize, in_percent)
        if failed:
            bottom = axes.get_ylim()[0]
            axes.plot(failed, [bottom] * len(failed), "x", color=INK, markersize=5, clip_on=False, label="failed")
        axes.set_xlabel("trial")
        axes.set_ylabel("objective on validation" + (" (%)" if in_percent else ""))
        axes.xaxis.get_major_locator().set_params(integer=True)
        bare(axes)
        legend_above(figure, *axes.get_legend_handles_labels())
    return figure
