"""LeGR: evolve one scale and one shift for each group's scores, and rank all units globally by the result.

Chin et al., "Towards efficient model compression via learned global ranking", CVPR 2020, algorithm 1, by regularised
evolution (Real et al., 2019). A pruner multiplies the scores of a group by its scale ``a`` and adds its shift ``b``;
with a global scope and a budget every trial meets the budget, whatever the numbers are, so that this tuner knows
nothing of models.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import numpy as np
from nni.utils import ClassArgsValidator

from nni_plugins.search.base import RecordedTuner
from nni_plugins.search.checks import check_number, check_seed, refuse_unknown
from nni_plugins.search.errors import SearchError
from nni_plugins.search.journal import Record
from nni_plugins.search.objectives import DIRECTIONS
from nni_plugins.search.optuna_space import Parameter, Space

_logger = logging.getLogger(__name__)

SCALES, SHIFTS = "prune.scales.", "prune.shifts."
ATTEMPTS = 20  # to make a child that has not been tried


class LeGRTuner(RecordedTuner):
    """A tuner for NNI that evolves affine transformations of the groups' scores.

    Parameters
    ----------
    population_size : int
        How many of the latest results are parents; as many trials at first are mutations of the identity.
    tournament_size : int
        How many of them are drawn; the best one has the child.
    mutation : float
        Share of the groups that a child changes, one at least.
    step : float
        Standard deviation of a change, as a share of the parameter's range (of its logarithm, for scales).
    optimize_mode : {'maximize', 'minimize'}
        Which way ``default`` is better.
    seed : int, optional
        Makes suggestions repeatable.

    Notes
    -----
    The search space holds ``prune.scales.GROUP`` (around 1) and ``prune.shifts.GROUP`` (around 0), each a range of
    numbers. The first trial is the identity. The oldest parent goes, not the worst.
    """

    name = "legr"

    def __init__(
        self,
        population_size: int = 64,
        tournament_size: int = 16,
        mutation: float = 0.1,
        step: float = 0.15,
        optimize_mode: str = "maximize",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_number("population_size", population_size, int, 1, 100_000)
        check_number("tournament_size", tournament_size, int, 1, 100_000)
        check_number("mutation", mutation, float, 0, 1)
        check_number("step", step, float, 1e-6, 1)
        check_seed(seed)
        if optimize_mode not in DIRECTIONS:
            raise SearchError(f"optimize_mode is {optimize_mode!r}; it must be maximize or minimize")
        self.population_size, self.tournament_size = population_size, tournament_size
        self.mutation, self.step = mutation, step
        self.sign = 1 if optimize_mode == "maximize" else -1
        self.seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self.population: deque[tuple[dict[str, float], float]] = deque(maxlen=population_size)
        self.space: Space | None = None
        self._groups: dict[str, list[Parameter]] = {}

    def _set_space(self, space: dict[str, Any]) -> None:
        read = Space(space)
        groups: dict[str, list[Parameter]] = {}
        for parameter in read.parameters:
            place = next((p for p in (SCALES, SHIFTS) if parameter.name.startswith(p)), None)
            if place is None:
                raise SearchError(
                    f"LeGRTuner: {parameter.name} is neither prune.scales.GROUP nor prune.shifts.GROUP; write it into "
                    "the recipe"
                )
            if not hasattr(parameter.distribution, "low") or "normal" in parameter.kind:
                raise SearchError(f"LeGRTuner: {parameter.name} is a {parameter.kind}; give it a range (uniform)")
            groups.setdefault(parameter.name[len(place) :], []).append(parameter)
        self.space, self._groups = read, groups
        self.population.clear()
        for record in self.journal.done():
            self._learn(record)

    def _suggest(self) -> dict[str, Any]:
        assert self.space is not None, "update_search_space comes first"
        rng = np.random.default_rng([self.seed, len(self.journal.records)])
        if not self.journal.records:
            return self._parameters(self._identity())
        parameters: dict[str, Any] = {}
        for _ in range(ATTEMPTS):
            if len(self.journal.records) < self.population_size or not self.population:
                parameters = self._parameters(self._mutated(self._identity(), rng, 1.0))
            else:
                drawn = rng.integers(len(self.population), size=min(self.tournament_size, len(self.population)))
                parent = max((self.population[i] for i in drawn), key=lambda item: item[1])[0]
                parameters = self._parameters(self._mutated(parent, rng, self.mutation))
            if not self.journal.seen(parameters):
                break
        return parameters

    def _learn(self, record: Record) -> None:
        assert self.space is not None
        number = record.number_of("default")
        if number is None:
            _logger.error(
                "trial %s: its result has no finite default; it counts as failed", record.job or record.number
            )
            return
        try:
            inner = self.space.inner(record.parameters)
        except SearchError as error:
            _logger.warning("trial %s: %s; it is no parent", record.job or record.number, error)
            return
        units = {p.name: _unit(p, inner[p.name]) for p in self.space.parameters}
        self.population.append((units, self.sign * number))

    def _identity(self) -> dict[str, float]:
        assert self.space is not None
        return {p.name: _unit(p, _nearest(p, 1.0 if p.name.startswith(SCALES) else 0.0)) for p in self.space.parameters}

    def _mutated(self, parent: dict[str, float], rng: np.random.Generator, share: float) -> dict[str, float]:
        names = list(self._groups)
        chosen = [name for name in names if rng.random() < share] or [names[int(rng.integers(len(names)))]]
        child = dict(parent)
        for name in chosen:
            for parameter in self._groups[name]:
                child[parameter.name] = float(np.clip(child[parameter.name] + rng.normal(0, self.step), 0, 1))
        return child

    def _parameters(self, units: dict[str, float]) -> dict[str, Any]:
        assert self.space is not None
        return self.space.suggest(lambda parameter: _from_unit(parameter, units[parameter.name]))


def _log(parameter: Parameter) -> bool:
    """Whether steps are in the logarithm: a scale multiplies."""
    distribution: Any = parameter.distribution
    continuous = isinstance(distribution.low, float)
    return continuous and distribution.low > 0 and (distribution.log or parameter.name.startswith(SCALES))


def _unit(parameter: Parameter, inner: Any) -> float:
    distribution: Any = parameter.distribution
    low, high, x = distribution.low, distribution.high, inner
    if _log(parameter):
        low, high, x = math.log(low), math.log(high), math.log(x)
    return float((x - low) / (high - low)) if high > low else 0.0


def _from_unit(parameter: Parameter, unit: float) -> Any:
    distribution: Any = parameter.distribution
    low, high = distribution.low, distribution.high
    if isinstance(low, int):
        return min(max(round(low + unit * (high - low)), low), high)
    if _log(parameter):
        return min(max(math.exp(math.log(low) + unit * (math.log(high) - math.log(low))), low), high)
    return min(max(low + unit * (high - low), low), high)


def _nearest(parameter: Parameter, wanted: float) -> Any:
    """The point of a range that is nearest to a value, in Optuna's words."""
    distribution: Any = parameter.distribution
    if isinstance(distribution.low, int):
        candidates = range(distribution.low, distribution.high + 1)
        return min(candidates, key=lambda inner: abs(float(parameter.value(inner)) - wanted))
    return min(max(wanted, distribution.low), distribution.high)


class LeGRClassArgsValidator(ClassArgsValidator):
    """Checks ``classArgs`` of ``config.yml`` before the experiment starts."""

    def validate_class_args(self, **kwargs: Any) -> None:
        """Raise :class:`SearchError`, in one line."""
        refuse_unknown(LeGRTuner, kwargs)
        LeGRTuner(**kwargs)
