"""NNI's search spaces in Optuna's words, and Optuna's suggestions in the shape that NNI's own tuners produce.

=================  ==========================================================================================
NNI                Optuna
=================  ==========================================================================================
choice             categorical over the positions; an integer where all are numbers in ascending or descending
                   order, three or more, so that a sampler knows which are close
randint            integer, the upper bound left out
uniform            float
loguniform         float on a logarithmic scale
quniform           integer multiple of q, clipped into the range as NNI does
qloguniform        float on a logarithmic scale, then the multiple of q, clipped
normal, lognormal  float in (0, 1), the quantile of the (logarithm of the) value
qnormal,           the same, then the multiple of q
qlognormal
=================  ==========================================================================================

What lies in a branch of a nested choice is suggested when that branch is chosen, and only then.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from nni_plugins.search.errors import SearchError
from nni_plugins.search.spaces import check_space, short

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NORMAL = NormalDist()
TAIL = 1e-6
"""The share of a normal distribution that is cut off on each side."""


class Parameter:
    """One parameter of a space.

    Parameters
    ----------
    key
        Names from the top of the space, with the position of the chosen branch after each nested choice.
    kind, values
        NNI's ``_type`` and ``_value``.
    """

    def __init__(self, key: tuple[str | int, ...], kind: str, values: list[Any]) -> None:
        self.key, self.kind, self.values = key, kind, values
        plain = not any("/" in str(part) for part in key)
        self.name = "/".join(str(part) for part in key) if plain else json.dumps(key)
        self.nested = kind == "choice" and all(isinstance(v, dict) and "_name" in v for v in values)
        self.ordered = kind == "choice" and not self.nested and _in_order(values)
        self.q = float(values[2]) if kind.startswith("q") else None
        self.distribution = self._distribution()

    def chosen(self, inner: Mapping[tuple[str | int, ...], Any]) -> bool:
        """Whether this parameter is there, given the positions of the choices above it."""
        branches = [i for i, part in enumerate(self.key) if isinstance(part, int)]
        return all(inner.get(self.key[:i]) == self.key[i] for i in branches)

    def value(self, inner: Any) -> Any:
        """Return NNI's value of Optuna's."""
        if self.kind == "choice":
            item = self.values[int(inner)]
            return item["_name"] if self.nested else item
        if self.kind == "randint":
            return int(inner)
        if self.kind == "quniform":
            return self._clipped(inner * self.q)
        if "normal" in self.kind:
            inner = self.values[0] + self.values[1] * NORMAL.inv_cdf(inner)
            if "log" in self.kind:
                inner = math.exp(inner)
        x = float(inner)
        return x if self.q is None else self._clipped(round(x / self.q) * self.q)

    def inner(self, value: Any) -> Any:
        """Return Optuna's value of NNI's; raise ValueError where it lies outside."""
        if self.kind == "choice":
            items = [item["_name"] for item in self.values] if self.nested else self.values
            found = [i for i, item in enumerate(items) if item == value and type(item) is type(value)]
            return found[0] if found else items.index(value)
        number = float(value)
        low, high = float(self.values[0]), float(self.values[1])
        if self.kind == "randint":
            if not math.ceil(low) <= number < math.ceil(high) or number != int(number):
                raise ValueError(value)
            return int(number)
        if "normal" in self.kind:
            x = math.log(max(number, 1e-300)) if "log" in self.kind else number
            return min(max(NORMAL.cdf((x - low) / high), TAIL), 1 - TAIL)
        slack = 1e-9 * max(abs(low), abs(high))
        if not low - slack <= number <= high + slack:
            raise ValueError(value)
        number = min(max(number, low), high)
        if self.kind == "quniform":
            assert self.q is not None
            return min(max(round(number / self.q), round(low / self.q)), round(high / self.q))
        return number

    def _clipped(self, x: float) -> float:
        return x if "normal" in self.kind else min(max(x, float(self.values[0])), float(self.values[1]))

    def _distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            if self.ordered:
                return IntDistribution(0, len(self.values) - 1)
            return CategoricalDistribution(tuple(range(len(self.values))))
        low, high = float(self.values[0]), float(self.values[1])
        if self.kind == "randint":
            return IntDistribution(math.ceil(low), math.ceil(high) - 1)
        if "normal" in self.kind:
            return FloatDistribution(TAIL, 1 - TAIL)
        if self.kind == "quniform":
            assert self.q is not None
            return IntDistribution(round(low / self.q), round(high / self.q))
        return FloatDistribution(low, high, log="log" in self.kind)


class Space:
    """A whole search space.

    Parameters
    ----------
    space
        NNI's dictionary.

    Attributes
    ----------
    parameters
        Those of all branches, each after the choices that it depends on.
    size
        How many different trials there are; infinite where a parameter is continuous.

    Raises
    ------
    SearchError
        In one line: the parameter, what is wrong and what to do.
    """

    def __init__(self, space: Any) -> None:
        self.parameters = list(_walk((), check_space(space)))
        self.size = _count(self.parameters)

    def suggest(self, ask: Callable[[Parameter], Any]) -> dict[str, Any]:
        """Return NNI's parameters, from the values that ``ask`` gives for each parameter that is there."""
        inner: dict[tuple[str | int, ...], Any] = {}
        result: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.chosen(inner):
                inner[parameter.key] = ask(parameter)
                _put(result, parameter, parameter.value(inner[parameter.key]))
        return result

    def inner(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return Optuna's names and values of NNI's parameters.

        Raises
        ------
        SearchError
            Where they do not belong to this space.
        """
        found: dict[tuple[str | int, ...], Any] = {}
        for parameter in self.parameters:
            if not parameter.chosen(found):
                continue
            value: Any = parameters
            try:
                for part in parameter.key:
                    value = value if isinstance(part, int) else value[part]
                found[parameter.key] = parameter.inner(value["_name"] if parameter.nested else value)
            except (KeyError, ValueError, TypeError, IndexError):
                raise SearchError(f"{parameter.name}: {short(value)} is not in the search space") from None
        return {parameter.name: found[parameter.key] for parameter in self.parameters if parameter.key in found}

    def distributions(self, names: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Return the distributions of these of Optuna's names."""
        return {parameter.name: parameter.distribution for parameter in self.parameters if parameter.name in names}


def _walk(above: tuple[str | int, ...], space: Mapping[str, Any]) -> Any:
    for name, spec in space.items():
        if name == "_name" and above:
            continue
        key = (*above, name)
        parameter = Parameter(key, spec["_type"], list(spec["_value"]))
        yield parameter
        if parameter.nested:
            for position, branch in enumerate(parameter.values):
                yield from _walk((*key, position), branch)


def _in_order(values: list[Any]) -> bool:
    if len(values) < 3 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return False
    steps = [b - a for a, b in itertools.pairwise(values)]
    return all(step > 0 for step in steps) or all(step < 0 for step in steps)


def _put(result: dict[str, Any], parameter: Parameter, value: Any) -> None:
    names = [part for part in parameter.key if isinstance(part, str)]
    for name in names[:-1]:
        result = result.setdefault(name, {})
    if parameter.nested:
        result.setdefault(names[-1], {})["_name"] = value
    else:
        result[names[-1]] = value


def _count(parameters: list[Parameter]) -> float:
    """The number of points of the (sub)space that these parameters make: a product, of sums over branches."""
    below: dict[tuple[str | int, ...], float] = {}
    for parameter in reversed(parameters):
        if parameter.nested:
            own = sum(below.get((*parameter.key, i), 1.0) for i in range(len(parameter.values)))
        elif parameter.kind == "choice":
            own = len(parameter.values)
        elif parameter.kind in ("randint", "quniform"):
            own = float(parameter.distribution.high - parameter.distribution.low + 1)  # type: ignore[attr-defined]
        else:
            own = 1.0 if parameter.distribution.single() else math.inf
        below[parameter.key[:-1]] = below.get(parameter.key[:-1], 1.0) * own
    return below[()]
