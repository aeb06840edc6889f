"""The figures of a report, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
    params, file_bytes
        Its parameters, and the size of its file.
    curve
        What it reported while it ran, one number an epoch; ``None`` for one that was not finite.
    seconds
        How long it ran.
    finetuned
        Whether its metric is that of a model that was trained after pruning.
    dense_macs
        MACs of the dense model that it began with.
    others
        Further numbers that it reported, by name.
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
    params: int | None = None
    file_bytes: int | None = None
    curve: Sequence[float | None] = ()
    seconds: float | None = None
    finetuned: bool = True
    dense_macs: int | None = None
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One channel group of the chosen model, or one layer whose single weights were pruned.

    Attributes
    ----------
    name
        Of the group: the first module that makes its channels.
    size, kept
        Units of the dense model, and those that are left.
    kind
        ``units``, or ``weights`` of a layer of which single weights are zero.
    """

    name: str
    size: int
    kept: int
    kind: str = "units"


@dataclass(frozen=True)
class Importance:
    """What decides one figure of the trials (:func:`nni_plugins.report.importance.importance_of`).

    Attributes
    ----------
    target
        The figure: ``accuracy``, ``macs`` …
    trials
        From how many trials.
    shares, spread
        By parameter: the share of the variance that it explains, and its standard deviation over resampled trials.
    explained
        How much of the figure a forest predicts for trials that it has not seen (cross-validated R²).
    note
        Why there are no shares; empty where there are.
    left_out
        Parameters that only some of the trials have.
    """

    target: str
    trials: int
    shares: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    explained: float | None = None
    note: str = ""
    left_out: Sequence[str] = ()


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
        The two models to compare; ``None`` where trials report numbers and leave no model.
    chosen
        The trial that the compact model comes from.
    candidates
        All trials.
    max_error, relative_error, tolerance
        Compact against masked model: the largest difference of their outputs, the same in shares of the output's size,
        and what was allowed; ``None`` where there is no compact model.
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
    round_to
        ``chosen`` and ``tried`` (``round_to``, ``macs``, ``time``, ``realised``, ``note``) of ``round_to: auto``.
    latency_budget
        ``asked``, ``time``, ``sparsity``, ``tried`` of ``prune.target: latency``, in shares of the dense model's time.
    state
        ``running``, ``stopped`` (it can be resumed), ``finished``, or ``single`` for one recipe without a search.
    trials_wanted
        After how many trials the search ends, where it was told.
    maximize
        Which way the candidates' ``default`` is better.
    layers, blocks
        The chosen model's channel groups, and the blocks that were removed as a whole.
    importance
        What decides the metric, and the costs.
    search
        ``tuner``, ``objectives`` and ``space`` of the search, as they were configured.
    tested
        For which trials the test split was read, in this order.
    notes
        What is missing here, and why.
    """

    title: str
    metric: str
    dense: ModelFigures | None
    compact: ModelFigures | None
    chosen: str
    candidates: Sequence[Candidate]
    max_error: float | None = None
    relative_error: float | None = None
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
    round_to: dict[str, Any] | None = None
    latency_budget: dict[str, Any] | None = None
    state: str = "finished"
    trials_wanted: int | None = None
    maximize: bool = True
    layers: Sequence[Layer] = ()
    blocks: Sequence[str] = ()
    importance: Sequence[Importance] = ()
    search: dict[str, Any] = field(default_factory=dict)
    tested: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def realised(self) -> float | None:
        """The share of the MACs saved that is saved in time too: (1 − time ratio) / (1 − MACs ratio)."""
        if self.dense is None or self.compact is None:
            return None
        before, after = self.dense.latency_ms, self.compact.latency_ms
        if not before or not after or self.compact.macs >= self.dense.macs:
            return None
        return (1 - after / before) / (1 - self.compact.macs / self.dense.macs)

    def front(self) -> list[Candidate]:
        """The trials that no other one is at least as good as in metric, MACs and latency, and better in one.

        Cheapest first; latencies that differ by less than 5% count as equal, since trials measure beside each other.
        Where no trial knows its MACs, the metric and the latency count.
        """
        sign = 1.0 if self.higher_is_better else -1.0
        counted = any(one.macs is not None for one in self.candidates)
        points = {
            one.id: (-sign * one.metric, float(one.macs or 0), math.log(one.latency_ms) if one.latency_ms else 0.0)
            for one in self.candidates
            if one.metric is not None and (one.macs is not None or not counted) and one.feasible
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

    @property
    def shared_dense(self) -> bool:
        """Whether all trials began with the same dense model; those of a search over architectures do not."""
        return len({one.dense_macs for one in self.candidates if one.dense_macs is not None}) <= 1

    def best_first(self) -> list[Candidate]:
        """All trials by what the tuner optimised; those without a figure at the end, by number."""
        sign = 1.0 if self.maximize else -1.0

        def rank(one: Candidate) -> tuple[bool, bool, float, int]:
            return one.id != self.chosen, one.default is None, -sign * (one.default or 0.0), one.sequence

        return sorted(self.candidates, key=rank)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Findings:
        """The findings in a ``report.json``; what an older one does not hold has its default.

        Raises
        ------
        TypeError, ValueError, KeyError, AttributeError
            The data is not a report's.
        """
        known = {key: value for key, value in data.items() if key in {item.name for item in fields(cls)}}
        kind: Any
        for name, kind in (("dense", ModelFigures), ("compact", ModelFigures), ("stock", StockCheck)):
            if known.get(name) is not None:
                known[name] = _made(kind, known[name])
        for name, kind in (("candidates", Candidate), ("layers", Layer), ("importance", Importance)):
            known[name] = [_made(kind, item) for item in known.get(name) or ()]
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, which has no NaN: null stands for a figure that there is not."""
        return {name: _finite(value) for name, value in asdict(self).items()} | {
            "front": [one.id for one in self.front()]
        }


def _made(kind: Any, data: Mapping[str, Any]) -> Any:
    names = {item.name for item in fields(kind)}
    found = {key: value for key, value in data.items() if key in names}
    if kind is StockCheck and found.get("max_error") is None:  # JSON has no NaN
        found["max_error"] = math.nan
    return kind(**found)


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
