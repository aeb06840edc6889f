"""NNI's spaces in Optuna's words: every type, in NNI's own shape, and back."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from nni.common.hpo_utils import deformat_parameters, format_parameters, format_search_space

from nni_plugins.search.errors import SearchError
from nni_plugins.search.optuna_space import Space

SPACE: dict[str, Any] = {
    "choice": {"_type": "choice", "_value": ["a", 2, [1, 2], None, True]},
    "levels": {"_type": "choice", "_value": [0.0, 0.25, 0.5]},
    "randint": {"_type": "randint", "_value": [-2, 5]},
    "uniform": {"_type": "uniform", "_value": [0.1, 0.7]},
    "quniform": {"_type": "quniform", "_value": [0.05, 0.7, 0.1]},
    "loguniform": {"_type": "loguniform", "_value": [1e-4, 1e-1]},
    "qloguniform": {"_type": "qloguniform", "_value": [1, 100, 5]},
    "normal": {"_type": "normal", "_value": [3, 0.5]},
    "qnormal": {"_type": "qnormal", "_value": [10, 4, 2]},
    "lognormal": {"_type": "lognormal", "_value": [0, 1]},
    "qlognormal": {"_type": "qlognormal", "_value": [2, 1, 3]},
    "outer/x": {
        "_type": "choice",
        "_value": [
            {"_name": "none"},
            {
                "_name": "deep",
                "lr": {"_type": "uniform", "_value": [0, 1]},
                "inner": {
                    "_type": "choice",
                    "_value": [{"_name": "p", "k": {"_type": "randint", "_value": [0, 3]}}, {"_name": "q"}],
                },
            },
        ],
    },
}


def draws(space: Space, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    rng = random.Random(0)

    def ask(parameter: Any) -> Any:
        low, high = getattr(parameter.distribution, "low", 0), getattr(parameter.distribution, "high", None)
        if high is None:
            return rng.randrange(len(parameter.values))
        if isinstance(low, int):
            return rng.randint(low, high)
        if getattr(parameter.distribution, "log", False):
            return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
        return rng.uniform(low, high)

    found = []
    for _ in range(count):
        inner: dict[str, Any] = {}
        found.append((space.suggest(lambda p, inner=inner: inner.setdefault(p.name, ask(p))), inner))
    return found


def test_values_are_in_range_and_in_nnis_shape() -> None:
    formatted = format_search_space(SPACE)
    levels, steps = set(), set()
    for parameters, _ in draws(Space(SPACE), 300):
        assert parameters["choice"] in SPACE["choice"]["_value"]
        assert type(parameters["randint"]) is int
        assert -2 <= parameters["randint"] < 5
        assert 0.1 <= parameters["uniform"] <= 0.7
        assert 1e-4 <= parameters["loguniform"] <= 1e-1
        assert 1 <= parameters["qloguniform"] <= 100
        assert parameters["qnormal"] % 2 == 0
        assert parameters["qlognormal"] % 3 == 0
        assert parameters["lognormal"] > 0
        levels.add(parameters["levels"])
        steps.add(parameters["quniform"])
        if parameters["outer/x"]["_name"] == "none":
            assert parameters["outer/x"] == {"_name": "none"}
        else:
            assert set(parameters["outer/x"]) == {"_name", "lr", "inner"}
            assert ("k" in parameters["outer/x"]["inner"]) == (parameters["outer/x"]["inner"]["_name"] == "p")
        # NNI's own reader fails on a branch that was not chosen, and on the logarithm of 0
        if parameters["outer/x"]["_name"] == "deep" and parameters["qlognormal"] > 0:
            theirs = deformat_parameters(format_parameters(parameters, formatted), formatted)
            for name, value in parameters.items():
                same = theirs[name] == value if not isinstance(value, float) else math.isclose(theirs[name], value)
                assert same, (name, value, theirs[name])
                assert type(theirs[name]) is type(value)
    assert levels == {0.0, 0.25, 0.5}
    assert sorted(steps) == pytest.approx([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_what_nni_gives_back_is_read_again() -> None:
    space = Space(SPACE)
    for parameters, inner in draws(space, 200):
        read = space.inner(parameters)
        assert set(read) == set(inner)
        again = space.suggest(lambda p, read=read: read[p.name])
        for name in ("choice", "levels", "randint", "quniform", "qnormal", "qlognormal", "qloguniform"):
            assert again[name] == parameters[name]
        assert again["normal"] == pytest.approx(parameters["normal"], abs=1e-6)
        assert again["lognormal"] == pytest.approx(parameters["lognormal"], rel=1e-6)
        assert again["outer/x"] == parameters["outer/x"]


def test_normal_quantiles_are_those_of_the_distribution() -> None:
    space = Space({"x": {"_type": "normal", "_value": [3, 0.5]}, "y": {"_type": "lognormal", "_value": [1, 0.5]}})
    at = [space.suggest(lambda p, u=u: u) for u in (0.5, 0.8413447460685429)]
    assert [one["x"] for one in at] == pytest.approx([3.0, 3.5])
    assert [one["y"] for one in at] == pytest.approx([math.e, math.exp(1.5)])


def test_size_counts_branches() -> None:
    nested = {key: SPACE[key] for key in ("levels", "randint")}
    assert Space(nested).size == 3 * 7
    branch = {
        "_type": "choice",
        "_value": [{"_name": "a"}, {"_name": "b", "k": {"_type": "randint", "_value": [0, 3]}}],
    }
    assert Space({"x": branch, "levels": SPACE["levels"]}).size == 3 * (1 + 3)
    assert Space(SPACE).size == math.inf


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "must be names"),
        ({"x": 3}, "x is 3"),
        ({"x": {"_type": "unifrom", "_value": [0, 1]}}, "unifrom"),
        ({"x": {"_type": "uniform", "_value": [0, 1, 2]}}, r"takes \[low, high\]"),
        ({"x": {"_type": "uniform", "_value": [1, 0]}}, "low must be below high"),
        ({"x": {"_type": "loguniform", "_value": [0, 1]}}, "above 0"),
        ({"x": {"_type": "normal", "_value": [0, 0]}}, "deviation must be above 0"),
        ({"x": {"_type": "quniform", "_value": [0, 1, 0]}}, "step must be above 0"),
        ({"x": {"_type": "randint", "_value": [3, 3]}}, "low must be below high"),
        ({"x": {"_type": "choice", "_value": []}}, "a list of values"),
        ({"o": {"_type": "choice", "_value": [{"_name": "a", "y": {"_type": "uniform"}}]}}, r"o\.a\.y"),
    ],
)
def test_a_wrong_space_is_named_in_one_line(space: Any, words: str) -> None:
    with pytest.raises(SearchError, match=words) as caught:
        Space(space)
    assert "\n" not in str(caught.value)
