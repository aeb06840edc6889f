"""The figures of a report, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LATENCY_NOISE = math.log(1.05)
"""Latencies nearer than this, by their logarithm, count as equal."""


@dataclass(frozen=True)
class ModelFigures:
    """One model in numbers.

    Attributes
    ----------
    name
        What it is called in the table.
    macs, params
        Multiply-accumulates of one input, and parameters.
    latency_ms
        Milliseconds of one input, or ``None`` where it was not measured.
    validation, test
        The task's metric on the two splits; `test` is ``None`` until it was read.
    file_bytes
        Size of its file, or ``None``.
    """

    name: str
    macs: int
    params: int
    latency_ms: float | None = None
    validation: float | None = None
    test: float | None = None
    file_bytes: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One trial as a point: where it landed, and what it tried.

    Attributes
    ----------
    id, sequence
        NNI's name and number of the trial.
    status
        NNI's word for its end.
    metric
        The task's metric on validation, or ``None`` where it has none.
    macs, default
        Its MACs, and what the tuner maximised.
    parameters
        The tuner's values, by dotted path of the recipe.
    note
        Why it failed, or why it does not count.
    feasible
        Whether it meets the bounds of the objective.
    latency_ms
        Milliseconds of one input, or ``None`` where it was not measured.
    """

    id: str
    sequence: int
    status: str
    metric: float | None = None
    macs: int | None = None
    default: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    feasible: bool = True
    latency_ms: float | None = None


@dataclass(frozen=True)
class StockCheck:
    """The winner taken through NNI's own ``ModelSpeedup`` with our replacers.

    Attributes
    ----------
    same_shapes
        Whether every parameter has the shape that ours has.
    max_error
        Largest difference between the two outputs, in shares of the output's size.
    note
        Why it could not be done; empty when it was.
    """

    same_shapes: bool
    max_error: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Same shapes and the same outputs to 1e-5 of their size."""
        return not self.note and self.same_shapes and self.max_error < 1e-5


@dataclass(frozen=True)
class Findings:
    """Everything that the table, the plot and the page show.

    Attributes
    ----------
    title
        The experiment's name.
    metric, higher_is_better
        Name of the task's metric, and its direction.
    dense, compact
        The two models to compare.
    chosen
        The trial that the compact model comes from.
    candidates
        All trials.
    max_error, relative_error, tolerance
        Compact against masked model: the largest difference of their outputs, the same in shares of the output's size,
        and what was allowed.
    stock
        The same check against NNI's own speedup, where it was made.
    bounds
        The objective's bounds, by name.
    seconds
        How long the search took.
    environment
        Versions and machine, by name.
    commands
        How to get the same again.
    recipe
        The winner's recipe, as YAML.
    experiment
        NNI's id and folder.
    stages
        The metric on validation after each step that changes it (``compact``, ``quantised``), where there are several.
    ablation
        The test metric ``with_teacher`` and ``alone``, in float, where there was a teacher.
    """

    title: str
    metric: str
    dense: ModelFigures
    compact: ModelFigures
    chosen: str
    candidates: Sequence[Candidate]
    max_error: float
    relative_error: float
    tolerance: float = 1e-5
    higher_is_better: bool = True
    stock: StockCheck | None = None
    bounds: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()
    recipe: str = ""
    experiment: dict[str, str] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    ablation: dict[str, float] | None = None

    @property
    def realised(self) -> float | None:
        """The share of the MACs saved that is saved in time too: (1 − time ratio) / (1 − MACs ratio)."""
        before, after = self.dense.latency_ms, self.compact.latency_ms
        if not before or not after or self.compact.macs >= self.dense.macs:
            return None
        return (1 - after / before) / (1 - self.compact.macs / self.dense.macs)

    def front(self) -> list[Candidate]:
        """The trials that no other one is at least as good as in metric, MACs and latency, and better in one.

        Cheapest first; latencies that differ by less than 5% count as equal, since trials measure beside each other.
        """
        sign = 1.0 if self.higher_is_better else -1.0
        points = {
            one.id: (-sign * one.metric, float(one.macs), math.log(one.latency_ms) if one.latency_ms else 0.0)
            for one in self.candidates
            if one.metric is not None and one.macs is not None and one.feasible
        }

        def beats(other: tuple[float, ...], this: tuple[float, ...]) -> bool:
            slack = (0.0, 0.0, LATENCY_NOISE)
            no_worse = all(a <= b + s for a, b, s in zip(other, this, slack, strict=True))
            return no_worse and any(a < b - s for a, b, s in zip(other, this, slack, strict=True))

        found = [
            one
            for one in self.candidates
            if one.id in points and not any(beats(other, points[one.id]) for other in points.values())
        ]
        return sorted(found, key=lambda one: (one.macs or 0, one.sequence))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, which has no NaN: null stands for a figure that there is not."""
        return {name: _finite(value) for name, value in asdict(self).items()} | {
            "front": [one.id for one in self.front()]
        }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pareto_front(points: Iterable[tuple[float, float]], higher_is_better: bool = True) -> list[tuple[float, float]]:
    """The (cost, metric) points that no other one beats in both, by rising cost.

    Parameters
    ----------
    points
        Cost (lower is better) and metric.
    higher_is_better
        The metric's direction.
    """
    sign = 1.0 if higher_is_better else -1.0
    front: list[tuple[float, float]] = []
    for cost, metric in sorted(set(points), key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * metric > sign * front[-1][1]:
            front.append((cost, metric))
    return front
