"""The number that a tuner maximises."""

from pathlib import Path

import pytest

from nni_plugins.training import DenseBaseline, recipe_from_dict
from nni_plugins.training.objective import excess, objective
from nni_plugins.training.tasks import build_metric

DENSE = DenseBaseline(Path("x"), accuracy=0.9, macs=1000, params=100, latency_ms=2.0)


def value(settings, train=None, **values):
    recipe = recipe_from_dict({"objective": settings, "train": train or {}})
    metric = build_metric(recipe)
    return objective(recipe, metric, DENSE, values), excess(recipe, metric, DENSE, values)


def test_within_the_bounds_it_is_the_accuracy():
    assert value({"macs": 0.5, "params": 0.6}, accuracy=0.8, macs=500, params=60, latency_ms=9) == (0.8, {})


def test_beyond_a_bound_less_the_farther():
    scores = [value({"macs": 0.5}, accuracy=0.99, macs=macs)[0] for macs in (500, 505, 550, 1000)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 0.99
    assert scores[1] == pytest.approx(0.99 - 10 * 0.01)
    assert value({"macs": 0.5}, accuracy=0.99, macs=505)[1] == pytest.approx({"macs": 0.01})
    assert value({"latency_ms": 1.0}, accuracy=0.99, latency_ms=1.5)[1] == pytest.approx({"latency_ms": 0.5})


def test_a_cost_under_a_bound_on_accuracy():
    good = value({"metric": "macs", "accuracy": 0.9}, accuracy=0.95, macs=300)[0]
    assert good == pytest.approx(-0.3)
    assert value({"metric": "macs", "accuracy": 0.9}, accuracy=0.81, macs=100)[0] == pytest.approx(-0.1 - 10 * 0.1)


def test_a_cost_as_a_share_of_a_reference():
    assert value({"metric": "macs", "reference": 600}, accuracy=0.95, macs=300)[0] == pytest.approx(-0.5)


def test_where_lower_is_better():
    assert value({}, {"metric": "mse"}, accuracy=0.25)[0] == -0.25
    assert value({"metric": "params", "accuracy": 0.2}, {"metric": "mse"}, accuracy=0.1, params=50) == (-0.5, {})
    assert value({"metric": "params", "accuracy": 0.2}, {"metric": "mse"}, accuracy=0.3, params=50)[0] < -4
