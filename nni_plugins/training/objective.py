"""What a search maximises: one quantity under bounds on the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nni_plugins.training.dense import DenseBaseline
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.tasks import Metric

RELATIVE = ("macs", "params", "bytes")


def excess(recipe: Recipe, metric: Metric, dense: DenseBaseline, values: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much, relative to the bound, each bound of the objective is broken.

    Parameters
    ----------
    recipe
        Its ``objective`` section holds the bounds.
    metric
        Says which way the accuracy is better.
    dense
        What ``macs``, ``params`` and ``bytes`` are shares of.
    values
        ``macs``, ``params``, ``bytes``, ``latency_ms`` and ``accuracy`` as far as they are known.

    Returns
    -------
    dict
        Only the broken bounds.
    """
    settings, broken = recipe.objective, {}
    for name in (*RELATIVE, "latency_ms"):
        bound = getattr(settings, name)
        if bound is not None and name in values:
            limit = limit_of(name, bound, dense)
            broken[name] = values[name] / limit - 1
    if settings.accuracy is not None and "accuracy" in values:
        gap = metric.better(settings.accuracy) - metric.better(values["accuracy"])
        broken["accuracy"] = gap / max(abs(settings.accuracy), 1e-12)
    return {name: share for name, share in broken.items() if share > 1e-9}


def limit_of(name: str, bound: float, dense: DenseBaseline) -> float:
    """Return what a cost may be: bounds up to 1 are shares of the dense model's, larger ones numbers; latency is ms."""
    return bound * getattr(dense, name) if name in RELATIVE and bound <= 1 else bound


def objective(recipe: Recipe, metric: Metric, dense: DenseBaseline, values: Mapping[str, Any]) -> float:
    """Return the number that a tuner maximises.

    Where all bounds hold it is the quantity itself (the validation metric, or a cost as a negative share of
    ``reference``, or of the dense model's), so that only that ranks trials. Where one is broken, ``penalty`` times the
    relative excess is taken off: more than the quantity varies, and less the nearer the bound, which tells a tuner the
    way back.
    """
    name = recipe.objective.metric
    if name == "accuracy":
        gain = metric.better(values["accuracy"])
    else:
        gain = -values[name] / (recipe.objective.reference or getattr(dense, name))
    return gain - recipe.objective.penalty * sum(excess(recipe, metric, dense, values).values())
