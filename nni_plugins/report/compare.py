"""Two searches, or two compressions, side by side: their best models, their fronts, and what was done differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from nni_plugins.report.findings import Candidate, Findings, ModelFigures, pareto_front
from nni_plugins.report.importance import flat
from nni_plugins.report.table import amount, named, quality, quality_change, share, size

DATA_FIELDS = ("data.name", "data.arguments", "data.validation", "data.split_seed", "data.limit")
"""What decides on which images a metric was measured."""
NOT_COMPARED = ("folder", "data.root", "model.arguments.home", "model.arguments.digest")
"""Fields that name places, not choices."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in both.

    Attributes
    ----------
    kind
        ``recipe``, ``chosen`` (a searched field: the two winners' values), ``space``, ``search`` or ``version``.
    name, first, second
        What it is, and its value in each.
    """

    kind: str
    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Hypervolume:
    """How much of the plane of metric and MACs each front covers.

    Attributes
    ----------
    macs, worst, best
        The reference: MACs of the larger dense model, and the worst and the best metric on either front.
    first, second
        The share of the rectangle between them that each front dominates.
    """

    macs: float
    worst: float
    best: float
    first: float
    second: float


@dataclass(frozen=True)
class Comparison:
    """Two findings and what can be said of both.

    Attributes
    ----------
    first, second, names
        The findings, and what they are called.
    header, rows
        The best models side by side.
    differences
        What was done differently.
    hypervolume
        Of the fronts, where they have a reference in common.
    warnings
        What keeps the figures from being comparable.
    """

    first: Findings
    second: Findings
    names: tuple[str, str]
    header: list[str]
    rows: list[list[str]]
    differences: list[Difference] = field(default_factory=list)
    hypervolume: Hypervolume | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        from dataclasses import asdict

        def model(found: Findings) -> dict[str, Any]:
            whole = found.to_dict()
            kept = ("title", "metric", "higher_is_better", "chosen", "dense", "compact", "relative_error", "bounds")
            return {name: whole[name] for name in (*kept, "front", "seconds", "state", "experiment")} | {
                "trials": len(found.candidates)
            }

        return {
            "names": list(self.names),
            "models": [model(self.first), model(self.second)],
            "differences": [asdict(one) for one in self.differences],
            "hypervolume": None if self.hypervolume is None else asdict(self.hypervolume),
            "warnings": self.warnings,
        }


def compare(first: Findings, second: Findings) -> Comparison:
    """Put two findings side by side.

    Raises
    ------
    ValueError
        They measure different things: another metric, or the other way round.
    """
    if first.metric != second.metric:
        raise ValueError(f"one measures {first.metric}, the other {second.metric}")
    if first.higher_is_better != second.higher_is_better:
        raise ValueError(f"more {first.metric} is better in one, less in the other")
    names = _names(first, second)
    recipes = [_recipe(one) for one in (first, second)]
    warnings, same_data = _warnings(first, second, recipes)
    volume = hypervolume(first, second) if same_data else None
    return Comparison(
        first,
        second,
        names,
        ["", *names, "second against first"],
        _rows(first, second, volume),
        _differences(first, second, recipes),
        volume,
        warnings,
    )


def _names(first: Findings, second: Findings) -> tuple[str, str]:
    titles = first.title, second.title
    if titles[0] != titles[1]:
        return titles
    ids = [one.experiment.get("id", "") for one in (first, second)]
    if ids[0] != ids[1] and all(ids):
        return f"{titles[0]} {ids[0]}", f"{titles[1]} {ids[1]}"
    return f"{titles[0]} (first)", f"{titles[1]} (second)"


def _recipe(found: Findings) -> dict[str, Any]:
    """The winner's recipe by dotted path; empty where there is none."""
    try:
        recipe = yaml.safe_load(found.recipe) if found.recipe else None
    except yaml.YAMLError:
        recipe = None
    return _flattened(recipe) if isinstance(recipe, dict) else {}


def _flattened(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{before}{key}"
        if isinstance(item, dict) and item:
            found.update(_flattened(item, f"{name}."))
        else:
            found[name] = item
    return found


def _warnings(first: Findings, second: Findings, recipes: list[dict[str, Any]]) -> tuple[list[str], bool]:
    found = []
    same_data = True
    if not all(recipes):
        found.append("It is not known whether both measured on the same data: a recipe is missing.")
    else:
        parts = [{name: value for name, value in one.items() if name.startswith(DATA_FIELDS)} for one in recipes]
        other = sorted(name for name in {*parts[0], *parts[1]} if parts[0].get(name) != parts[1].get(name))
        if other:
            same_data = False
            found.append(
                f"The metric was measured on other data ({', '.join(other)}): which model is better cannot be said, "
                "and there is no hypervolume."
            )
    machines = [one.environment.get("processor", "") for one in (first, second)]
    if machines[0] != machines[1]:
        found.append("The latencies are of different machines.")
    if first.compact is not None and second.compact is not None:
        tested = [one.compact.test is not None for one in (first, second) if one.compact is not None]
        if tested[0] != tested[1]:
            found.append("The test split was read for one of them only; compare the figures of validation.")
    for name, one in zip(("first", "second"), (first, second), strict=True):
        if one.state in ("running", "stopped"):
            found.append(f"The {name} search is not over ({one.state}, {len(one.candidates)} trials).")
    if first.bounds != second.bounds and first.compact is not None and second.compact is not None:
        found.append(f"They had other bounds: {_bounds(first)}; {_bounds(second)}.")
    return found, same_data


def _bounds(found: Findings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in found.bounds.items()) or "none"


def _rows(first: Findings, second: Findings, volume: Hypervolume | None) -> list[list[str]]:
    metric = first.metric
    one, two = _best(first), _best(second)
    rows: list[list[str]] = []

    def add(label: str, values: tuple[Any, Any], form: Any, change: Any = None) -> None:
        if values[0] is None and values[1] is None:
            return
        cells = ["–" if value is None else form(value) for value in values]
        known = values[0] is not None and values[1] is not None
        rows.append([label, *cells, change(*values) if change is not None and known else ""])

    def written(value: float) -> str:
        return quality(value, metric)

    def moved(before: float, after: float) -> str:
        return quality_change(before, after, metric)

    def ratio(before: float, after: float) -> str:
        return share(before, after)

    for split in ("test", "validation"):
        add(named(split, metric), (getattr(one, split, None), getattr(two, split, None)), written, moved)
    for label, name, form in (
        ("MACs", "macs", amount),
        ("parameters", "params", amount),
        ("latency", "latency_ms", lambda value: f"{value:.2f} ms"),
        ("file", "file_bytes", size),
    ):
        add(label, (getattr(one, name, None), getattr(two, name, None)), form, ratio)
    add("MACs left of dense", (_left(first), _left(second)), lambda value: f"{100 * value:.0f}%")
    dense = first.dense, second.dense
    add(f"dense validation {metric}", tuple(d.validation if d else None for d in dense), written, moved)  # type: ignore[arg-type]
    add("dense MACs", tuple(d.macs if d else None for d in dense), amount, ratio)  # type: ignore[arg-type]
    errors = first.relative_error, second.relative_error
    add("largest difference to masked", errors, lambda value: f"{value:.1e}")
    rows.append(["bounds", _bounds(first), _bounds(second), ""])
    rows.append(["trials", _trials(first), _trials(second), ""])
    minutes = tuple(found.seconds / 60 if found.seconds else None for found in (first, second))
    add("minutes of search", minutes, lambda value: f"{value:.1f}")  # type: ignore[arg-type]
    if volume is not None:
        add("hypervolume", (volume.first, volume.second), lambda value: f"{value:.4f}", lambda a, b: f"{b - a:+.4f}")
    return rows


def _best(found: Findings) -> ModelFigures | None:
    """The compact model; of trials that leave none, the best one's figures."""
    if found.compact is not None:
        return found.compact
    best = next((one for one in found.candidates if one.id == found.chosen), None)
    if best is None:
        return None
    figures: dict[str, Any] = {"macs": best.macs, "params": best.params}
    return ModelFigures(
        "best trial", **figures, latency_ms=best.latency_ms, validation=best.metric, file_bytes=best.file_bytes
    )


def _left(found: Findings) -> float | None:
    if found.dense is None or found.compact is None or not found.dense.macs:
        return None
    return found.compact.macs / found.dense.macs


def _trials(found: Findings) -> str:
    failed = sum(one.status == "FAILED" for one in found.candidates)
    return f"{len(found.candidates)}" + (f", {failed} failed" if failed else "")


def within(found: Findings) -> list[Candidate]:
    """The trials that count for a front: with metric and MACs, within the bounds."""
    return [one for one in found.candidates if one.metric is not None and one.macs is not None and one.feasible]


def hypervolume(first: Findings, second: Findings) -> Hypervolume | None:
    """The area that each front of metric against MACs dominates, below a reference that both have in common."""
    fronts = [
        pareto_front([(float(one.macs or 0), one.metric or 0.0) for one in within(found)], found.higher_is_better)
        for found in (first, second)
    ]
    if not all(fronts) or all(len(front) == 1 for front in fronts):
        return None
    sign = 1.0 if first.higher_is_better else -1.0
    metrics = [sign * metric for front in fronts for _, metric in front]
    dense = [float(found.dense.macs) for found in (first, second) if found.dense is not None]
    limit = max([*dense, *(cost for front in fronts for cost, _ in front)])
    worst, best = min(metrics), max(metrics)
    if best <= worst or limit <= 0:
        return None
    areas = []
    for front in fronts:
        area, level = 0.0, worst
        for cost, metric in front:  # by rising cost, and so by rising quality
            area += (limit - cost) * max(sign * metric - level, 0.0)
            level = max(level, sign * metric)
        areas.append(area / (limit * (best - worst)))
    return Hypervolume(limit, sign * worst, sign * best, *areas)


def _differences(first: Findings, second: Findings, recipes: list[dict[str, Any]]) -> list[Difference]:
    searched = {name for found in (first, second) for one in found.candidates for name in flat(one.parameters)}
    found = _one_sided(recipes) if all(recipes) else []
    for name in sorted({*recipes[0]} & {*recipes[1]}):
        values = [one[name] for one in recipes]
        if values[0] != values[1] and not name.startswith(NOT_COMPARED):
            chosen = any(name == one or name.startswith(f"{one}.") for one in searched)
            found.append(Difference("chosen" if chosen else "recipe", name, *map(_short, values)))
    spaces = [found.search.get("space") or {} for found in (first, second)]
    for name in sorted({*spaces[0], *spaces[1]}):
        values = [_dimension(one.get(name)) for one in spaces]
        if values[0] != values[1]:
            found.append(Difference("space", name, *values))
    for name in ("tuner", "objectives"):
        values = [one.search.get(name) or "–" for one in (first, second)]
        if values[0] != values[1]:
            found.append(Difference("search", name, *map(_short, values)))
    for name in sorted({*first.environment, *second.environment}):
        values = [one.environment.get(name, "–") for one in (first, second)]
        if values[0] != values[1]:
            found.append(Difference("version", name, *values))
    order = ("recipe", "space", "search", "chosen", "version")
    return sorted(found, key=lambda one: (order.index(one.kind), one.name))


def _one_sided(recipes: list[dict[str, Any]]) -> list[Difference]:
    """Fields that one recipe has and the other not, as recipes of two versions: a line for each section."""
    sections: dict[str, list[list[str]]] = {}
    for side, other in ((0, 1), (1, 0)):
        for name in recipes[side]:
            if name not in recipes[other] and not name.startswith(NOT_COMPARED):
                sections.setdefault(name.split(".")[0], [[], []])[side].append(name)
    found = []
    for section, sides in sections.items():
        if sum(map(len, sides)) == 1:
            side = 0 if sides[0] else 1
            value = _short(recipes[side][sides[side][0]])
            found.append(Difference("recipe", sides[side][0], *((value, "–") if side == 0 else ("–", value))))
        else:
            words = [f"{len(names)} fields of its own" if names else "–" for names in sides]
            found.append(Difference("recipe", f"{section}.*", *words))
    return found


def _dimension(value: Any) -> str:
    if not isinstance(value, dict):
        return "–" if value is None else _short(value)
    return f"{value.get('_type', '')} {_short(value.get('_value', ''))}".strip()


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 160 else text[:159] + "…"
