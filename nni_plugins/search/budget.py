"""Suggestions that meet a budget: sparsities of groups, scaled together until it is just met.

A search over sparsities of which many are too large to meet a bound learns slowly where the bound is. Costs are known
without a trial, so a suggestion can be brought to the bound first, as ``prune.target: macs`` does within a trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nni_plugins.search.amc_state import BUDGETS, PREFIX, Environment
from nni_plugins.search.checks import check_number
from nni_plugins.search.errors import SearchError
from nni_plugins.search.optuna_space import Parameter

SLACK = 1e-9
MOST_PASSES = 3  # in which each group of a grid gets one step more, if that fits


class Step:
    """One group's range of sparsities; an action of 1 keeps the most that it allows."""

    def __init__(self, parameter: Parameter) -> None:
        name, kind = parameter.name, parameter.kind
        if not name.startswith(PREFIX):
            raise SearchError(
                f"{name} is not {PREFIX}GROUP, the only names whose sparsities meet a budget; write it into the recipe"
            )
        self.grid: list[tuple[float, Any]] = []  # sparsity, and the value as the space has it
        if kind == "choice":
            numbers = [v for v in parameter.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            if len(numbers) != len(parameter.values):
                raise SearchError(f"{name}: all its choices must be sparsities, numbers in [0, 1)")
            self.grid = sorted((float(v), v) for v in numbers)
        elif kind == "quniform":
            inner: Any = parameter.distribution
            self.grid = [(float(v), v) for v in map(parameter.value, range(inner.low, inner.high + 1))]
        elif kind not in ("uniform", "loguniform"):
            raise SearchError(f"{name} is a {kind}; give it a uniform, a quniform or a choice of sparsities")
        ends = [one for one, _ in self.grid] or [float(value) for value in parameter.values]
        self.low, self.high = min(ends), max(ends)
        if not 0 <= self.low <= self.high < 1:
            raise SearchError(f"{name}: [{self.low:g}, {self.high:g}] are no sparsities, numbers in [0, 1)")

    def sparsity(self, action: float) -> float:
        """Return the sparsity of an action in [0, 1]."""
        wanted = self.high - action * (self.high - self.low)
        wanted = min(max(wanted, self.low), self.high)
        return min((one for one, _ in self.grid), key=lambda one: abs(one - wanted)) if self.grid else wanted

    def action(self, sparsity: float) -> float:
        """Return the action of a sparsity."""
        return (self.high - sparsity) / (self.high - self.low) if self.high > self.low else 1.0

    def value(self, sparsity: float) -> Any:
        """Return the sparsity as the search space writes it."""
        return dict(self.grid)[sparsity] if self.grid else float(sparsity)

    def read(self, value: Any) -> float:
        """Return the sparsity of a trial's parameter; ValueError where it is none of this range."""
        number = float(value)
        if not self.low - 1e-6 <= number <= self.high + 1e-6:
            raise ValueError(value)
        return min((one for one, _ in self.grid), key=lambda one: abs(one - number)) if self.grid else number


class Projection:
    """Brings parameters to a budget.

    Parameters
    ----------
    environment
        Knows the costs of ``prune.groups.NAME``.
    parameters
        Those of the search space; others than groups are left as they are.
    fill
        Whether a suggestion below the budget is brought up to it too.
    """

    def __init__(self, environment: Environment, parameters: Sequence[Parameter], fill: bool) -> None:
        own = {parameter.name: Step(parameter) for parameter in parameters if parameter.name.startswith(PREFIX)}
        self.environment, self.fill = environment, fill
        self.steps = [own[name] for name in in_order(environment, list(own))]
        check_reach(environment, self.steps)

    def __call__(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with their groups' sparsities scaled."""
        names = self.environment.names
        sparsities = [step.read(parameters[name]) for step, name in zip(self.steps, names, strict=True)]
        if not self.fill and self.environment.load(sparsities) <= 1 + SLACK:
            return dict(parameters)
        actions = [step.action(s) for step, s in zip(self.steps, sparsities, strict=True)]
        found = scaled(self.environment, self.steps, actions)
        values = {name: step.value(s) for name, step, s in zip(names, self.steps, found, strict=True)}
        return {**parameters, **values}


def scaled(environment: Environment, steps: Sequence[Step], actions: Sequence[float]) -> list[float]:
    """Scale what groups keep until the budget is just met; on a grid, single groups then keep some steps more.

    Parameters
    ----------
    environment, steps
        The budget, and the ranges.
    actions
        How much each group keeps, from 0 (the least that its range allows) to 1.

    Returns
    -------
    list of float
        Sparsities.
    """

    def at(scale: float) -> list[float]:
        return [step.sparsity(min(a * scale, 1.0)) for step, a in zip(steps, actions, strict=True)]

    def fits(sparsities: list[float]) -> bool:
        return environment.load(sparsities) <= 1 + SLACK

    low, high = 0.0, 1 / max(min(actions), 1e-3)
    if fits(at(high)):
        low = high
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    found = at(low)
    wanted = [min(a * low, 1.0) for a in actions]

    def gap(index: int) -> float:
        return wanted[index] - steps[index].action(found[index])

    for index in sorted(range(len(steps)), key=gap, reverse=True) * MOST_PASSES:
        below = [one for one, _ in steps[index].grid if one < found[index]]
        if below and fits([*found[:index], below[-1], *found[index + 1 :]]):
            found[index] = below[-1]
    return found


def in_order(environment: Environment, names: Sequence[str]) -> list[str]:
    """Return the names in the environment's order; raise where they are not the same."""
    if set(environment.names) != set(names):
        raise SearchError(f"the budget's groups are {environment.names}, those of the search space {list(names)}")
    return list(environment.names)


def check_reach(environment: Environment, steps: Sequence[Step]) -> None:
    """Raise where no point of the search space meets the budget."""
    most = environment.load([step.high for step in steps])
    if most > 1 + SLACK:
        raise SearchError(
            "the budget is out of reach: where every group loses the most that the search space allows, "
            f"{most:.3g} times the budget is left; widen the ranges, or raise the budget"
        )


def check_budget(budget: Any) -> None:
    """Raise where the class argument ``budget`` is not what it should be."""
    if budget is None:
        return
    if not isinstance(budget, Mapping) or not budget or set(budget) - set(BUDGETS):
        raise SearchError(f"budget is {budget!r}; it must be names and values of {', '.join(BUDGETS)}")
    for name, value in budget.items():
        check_number(f"budget.{name}", value, float, 1e-9, 1e18)
