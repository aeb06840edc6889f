"""What a tuner makes of a trial's result: objectives, constraints, and the trials that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nni_plugins.search.errors import SearchError
from nni_plugins.search.journal import Record

DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Objective:
    """One entry of a trial's result, and which way it is better."""

    name: str
    direction: str

    @property
    def sign(self) -> int:
        """1 where more is better."""
        return 1 if self.direction == "maximize" else -1


@dataclass(frozen=True)
class Constraint:
    """A bound on one entry of a trial's result."""

    name: str
    least: float | None = None
    most: float | None = None

    def excess(self, value: float) -> float:
        """By how much of itself the bound is broken; negative where it holds."""
        found: list[float] = []
        if self.most is not None:
            found.append((value - self.most) / (abs(self.most) or 1.0))
        if self.least is not None:
            found.append((self.least - value) / (abs(self.least) or 1.0))
        return max(found)


def read_objectives(given: Any, optimize_mode: str) -> list[Objective]:
    """Check the class arguments ``objectives`` and ``optimize_mode``."""
    if optimize_mode not in DIRECTIONS:
        raise SearchError(f"optimize_mode is {optimize_mode!r}; it must be maximize or minimize")
    if given is None:
        return [Objective("default", optimize_mode)]
    if not isinstance(given, (list, tuple)) or not given:
        raise SearchError("objectives: it must be a list of {name, direction}, with one at least")
    found: list[Objective] = []
    for index, item in enumerate(given):
        where = f"objectives[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or set(item) - {"name", "direction"}:
            raise SearchError(f"{where} is {item!r}; it must be {{name: ..., direction: maximize or minimize}}")
        direction = item.get("direction", "maximize")
        if direction not in DIRECTIONS:
            raise SearchError(f"{where}.direction is {direction!r}; it must be maximize or minimize")
        if item["name"] in [one.name for one in found]:
            raise SearchError(f"{where}: {item['name']} is named twice; leave one out")
        found.append(Objective(item["name"], direction))
    return found


def read_constraints(given: Any) -> list[Constraint] | None:
    """Check the class argument ``constraints``; None takes what the trial says of its bounds."""
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise SearchError("constraints: it must be a list of {name, min or max}")
    found = []
    for index, item in enumerate(given):
        where = f"constraints[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or set(item) - {"name", "min", "max"}:
            raise SearchError(f"{where} is {item!r}; it must be {{name: ..., max: number}} or with min")
        bounds = [item.get("min"), item.get("max")]
        if bounds == [None, None] or not all(b is None or type(b) in (int, float) for b in bounds):
            raise SearchError(f"{where} ({item['name']}): give min or max, a number")
        found.append(Constraint(item["name"], *bounds))
    return found


def violations(record: Record, constraints: Sequence[Constraint] | None) -> list[float]:
    """Return how far each bound is from holding: above 0 where it is broken.

    Without constraints of its own, a tuner believes the trial: its ``excess``, or the relative excesses in
    ``broken_bounds`` added up; a trial that only says that it is not ``feasible`` counts as 1.
    """
    if constraints is None:
        value = record.value if isinstance(record.value, dict) else {}
        broken = value.get("broken_bounds")
        numbers = list(broken.values()) if isinstance(broken, dict) else []
        numbers = [value["excess"]] if "excess" in value else numbers
        total = float(sum(v for v in numbers if isinstance(v, (int, float)) and v == v and v > 0))
        if value.get("feasible") is False and total <= 0:
            total = 1.0
        return [min(total, 1e12)]
    found = []
    for constraint in constraints:
        number = record.number_of(constraint.name)
        found.append(1.0 if number is None else constraint.excess(number))
    return found


@dataclass
class Front:
    """The feasible trials that no other feasible one beats in every objective.

    Parameters
    ----------
    objectives
        What is compared.
    """

    objectives: list[Objective]
    members: list[tuple[Record, list[float]]] = field(default_factory=list)

    def add(self, record: Record, values: list[float], feasible: bool) -> bool:
        """Take a result in; returns whether the front has changed."""
        if not feasible:
            return False
        point = [one.sign * value for one, value in zip(self.objectives, values, strict=True)]
        kept = []
        for other, theirs in self.members:
            held = [one.sign * value for one, value in zip(self.objectives, theirs, strict=True)]
            if all(a >= b for a, b in zip(held, point, strict=True)) and held != point:
                return False
            if not (all(a <= b for a, b in zip(held, point, strict=True)) and held != point):
                kept.append((other, theirs))
        self.members = [*kept, (record, values)]
        return True

    def to_list(self) -> list[dict[str, Any]]:
        """Return the front as plain data, the best in the first objective first."""
        names = [one.name for one in self.objectives]
        order = sorted(self.members, key=lambda item: (-self.objectives[0].sign * item[1][0], item[0].number))
        return [
            {
                "number": record.number,
                "trial": record.job,
                "values": dict(zip(names, values, strict=True)),
                "parameters": record.parameters,
            }
            for record, values in order
        ]
