"""Optuna's samplers behind NNI's tuner interface: objectives, constraints, conditional spaces, several trials at once.

Akiba et al., "Optuna: a next-generation hyperparameter optimization framework", KDD 2019. TPE is its multivariate form
with groups (Falkner et al., BOHB, 2018), NSGA-II that of Deb et al., 2002.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import nni
import numpy as np
from nni.utils import ClassArgsValidator

from nni_plugins.files import write_json
from nni_plugins.search.amc_state import PREFIX, Environment, GraphEnvironment
from nni_plugins.search.base import RecordedTuner
from nni_plugins.search.budget import Projection, check_budget
from nni_plugins.search.checks import check_seed, refuse_unknown
from nni_plugins.search.errors import SearchError
from nni_plugins.search.journal import Record
from nni_plugins.search.objectives import Front, read_constraints, read_objectives, violations
from nni_plugins.search.optuna_samplers import make_sampler, sampler_arguments
from nni_plugins.search.optuna_space import Parameter, Space
from nni_plugins.search.places import experiment_folder, trial_code_directory

_logger = logging.getLogger(__name__)

PARETO = "pareto.json"
WINDOW, RECENT, BEST = 400, 200, 100
"""TPE looks at so many finished trials at most; then the best and the latest of them stay (old ones count little)."""
DRAWS = 1000  # for a point that has not been tried
ATTEMPTS = 2
"""How often a sampler is asked again for a point that has not been tried."""


class OptunaTuner(RecordedTuner):
    """A tuner for NNI that asks one of Optuna's samplers.

    Parameters
    ----------
    sampler : {'tpe', 'gp', 'cmaes', 'nsga2', 'nsga3', 'random', 'qmc'}
        Which one. CMA-ES has one objective, and draws choices and what lies in their branches at random.
    sampler_args : dict, optional
        Further keyword arguments of Optuna's class, such as ``population_size`` of NSGA-II.
    optimize_mode : {'maximize', 'minimize'}
        Which way ``default`` is better, where there are no ``objectives``.
    objectives : list of dict, optional
        ``{name, direction}`` each: entries of the dictionary that a trial reports. By default ``default`` alone.
    constraints : list of dict, optional
        ``{name, max}`` or ``{name, min}``: bounds on entries of that dictionary. By default a trial says itself
        whether bounds are broken, as those of this package do (``broken_bounds``, ``feasible``).
    seed : int, optional
        Makes suggestions repeatable. After a resume they go on differently, and do not begin again.
    n_startup_trials : int, optional
        Random trials at first, of samplers that have them; 10 where nothing is said.
    deduplicate : bool
        Whether a point that has been tried is not tried again (evolution repeats parents, and discrete spaces are
        small). When none is left the search ends.

    Notes
    -----
    The study lives in memory. What a trial was and what it gave is written to ``optuna.jsonl`` in the experiment's
    checkpoint folder after each event, and the front to ``pareto.json`` in the experiment's folder.
    """

    name = "optuna"

    def __init__(
        self,
        sampler: str = "tpe",
        sampler_args: dict[str, Any] | None = None,
        optimize_mode: str = "maximize",
        objectives: list[dict[str, str]] | None = None,
        constraints: list[dict[str, Any]] | None = None,
        seed: int | None = None,
        n_startup_trials: int | None = None,
        deduplicate: bool = True,
        recipe: str | None = None,
        budget: dict[str, float] | None = None,
        environment: Environment | None = None,
    ) -> None:
        super().__init__()
        check_budget(budget)
        if budget is not None and recipe is None and environment is None:
            raise SearchError("budget: costs are counted on the recipe's model; name the recipe too")
        if recipe is not None and not isinstance(recipe, str):
            raise SearchError(f"recipe is {recipe!r}; it must be the name of a file")
        self._recipe, self._budget, self._environment = recipe, budget, environment
        self._project: Projection | None = None
        check_seed(seed)
        self.objectives = read_objectives(objectives, optimize_mode)
        self.constraints = read_constraints(constraints)
        self.sampler, self.deduplicate = sampler, deduplicate
        self.sampler_args = sampler_arguments(sampler, sampler_args, n_startup_trials, len(self.objectives))
        self._group_is_given = bool({"group", "multivariate"} & set(sampler_args or {}))
        self.seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self.front = Front(self.objectives)
        self.space: Space | None = None
        self._trials: dict[int, Any] = {}
        self._known: list[Record] = []  # finished trials that the study holds
        self._asked: Any = None  # Optuna's trial of the parameters that have just been suggested
        self._own: Any = None  # or parameters that are not Optuna's
        self._study: Any = None
        self._make_sampler(self.seed)  # a wrong argument is found now

    def pareto_front(self) -> list[dict[str, Any]]:
        """Return the trials that none beats: ``number``, ``trial`` (NNI's id), ``values`` and ``parameters`` of each.

        Only trials whose constraints hold are in it. With one objective it is the best trial, or several that are
        equal.
        """
        with self._lock:
            return self.front.to_list()

    def _set_space(self, space: dict[str, Any]) -> None:
        self.space = Space(space)
        names = [p.name for p in self.space.parameters if p.name.startswith(PREFIX)]
        environment = self._environment
        if self._recipe is not None and not names:
            raise SearchError(f"recipe: the search space has no {PREFIX}NAME to meet a budget with; leave recipe out")
        if self._recipe is not None:
            environment = GraphEnvironment.from_recipe(trial_code_directory() / self._recipe, names, self._budget)
        if environment is not None:
            self._project = Projection(environment, self.space.parameters, fill=len(self.objectives) == 1)
        if self.sampler == "tpe" and not self._group_is_given:  # without branches one group holds all, at less cost
            self.sampler_args["group"] = any(parameter.nested for parameter in self.space.parameters)
        self._study = self._new_study(self._make_sampler(self._next_seed()))
        self._trials.clear()
        self._known = []
        for record in self.journal.records:
            self._started(record)
        for record in self.journal.done():
            self._tell(record)

    def _suggest(self) -> dict[str, Any]:
        assert self.space is not None, "update_search_space comes first"
        parameters: dict[str, Any] = {}
        again = self.deduplicate
        for attempt in range(ATTEMPTS if again else 1):
            trial = self._study.ask()
            parameters = self.space.suggest(partial(_ask, trial))
            own = parameters if self._project is None else self._project(parameters)
            if not (again and self.journal.seen(own)):
                if own == parameters:
                    self._asked = trial
                else:
                    self._forget(trial)
                    self._own = own
                return own
            if attempt + 1 < ATTEMPTS:
                self._forget(trial)
        self._forget(trial)
        self._own = self._unseen(parameters)
        return self._own

    def _unseen(self, fallback: dict[str, Any]) -> dict[str, Any]:
        """A point that has not been tried, near the one that the sampler insists on, or any."""
        assert self.space is not None
        rng = np.random.default_rng([self.seed, len(self.journal.records)])
        wanted = self.space.inner(fallback)
        for attempt in range(DRAWS if self._project is None else DRAWS // 20):
            share = min(1.0, (attempt + 1) / (DRAWS / 5))  # of the parameters that are drawn afresh

            def draw(parameter: Parameter, share: float = share) -> Any:
                if parameter.name in wanted and rng.random() > share:
                    return wanted[parameter.name]
                low, high = getattr(parameter.distribution, "low", 0), getattr(parameter.distribution, "high", None)
                if high is None:
                    return int(rng.integers(len(parameter.values)))
                if isinstance(low, int):
                    return int(rng.integers(low, high + 1))
                if getattr(parameter.distribution, "log", False):
                    return min(max(float(np.exp(rng.uniform(np.log(low), np.log(high)))), low), high)
                return float(rng.uniform(low, high))

            parameters = self.space.suggest(draw)
            if self._project is not None:
                parameters = self._project(parameters)
            if not self.journal.seen(parameters):
                return parameters
        tried = sum(1 for record in self.journal.records if record.state != "failed")
        if tried >= self.space.size:
            raise nni.NoMoreTrialError(f"all {self.space.size:.0f} points of the search space have been tried")
        return fallback

    def _started(self, record: Record) -> None:
        assert self.space is not None
        if self._asked is not None:
            self._trials[record.number], self._asked = self._asked, None
        elif record.state == "running" and (record.resumed or self._own is record.parameters):
            self._enqueue(record)
        self._own = None

    def _learn(self, record: Record) -> None:
        values = self._values(record)
        holds = max(violations(record, self.constraints), default=0.0) <= 0
        if values is not None and self.front.add(record, values, holds):
            _logger.info("trial %s is on the front: %s", record.job or record.number, values)
        self._tell(record)

    def _learnt(self, results: int) -> None:
        if self.sampler == "tpe" and len(self._known) > WINDOW:
            self._forget_old()
        folder = experiment_folder()
        if folder is not None:
            self._write_front(folder)

    def _failed(self, record: Record) -> None:
        trial = self._trials.pop(record.number, None)
        if trial is not None:
            self._forget(trial)

    def _restored(self) -> None:
        self._study.sampler = self._make_sampler(self._next_seed())
        self._learnt(0)

    def _write_front(self, folder: Any) -> None:
        done = self.journal.done()
        state = {
            "objectives": [{"name": one.name, "direction": one.direction} for one in self.objectives],
            "finished": len(done),
            "failed": sum(record.state == "failed" for record in self.journal.records),
            "front": self.front.to_list(),
        }
        try:
            write_json(folder / PARETO, state)
        except OSError as error:  # a disk that is full is reported, and stops no search
            _logger.error("%s: cannot be written (%s)", folder / PARETO, error)

    def _values(self, record: Record) -> list[float] | None:
        found = []
        for one in self.objectives:
            number = record.number_of(one.name)
            if number is None:
                known = sorted(record.value) if isinstance(record.value, dict) else ["default"]
                has = "is no finite number" if one.name in known else f"is not there, of {', '.join(known)}"
                _logger.error("trial %s: %s %s; it counts as failed", record.job or record.number, one.name, has)
                return None
            found.append(number)
        return found

    # Optuna's side

    def _make_sampler(self, seed: int) -> Any:
        finished = [] if self._study is None or not self.journal.done() else self._study.get_trials(deepcopy=False)
        return make_sampler(self.sampler, self.sampler_args, seed, finished)

    def _new_study(self, sampler: Any) -> Any:
        import optuna

        directions: list[Any] = [one.direction for one in self.objectives]
        return optuna.create_study(directions=directions, sampler=sampler)

    def _next_seed(self) -> int:
        known = len(self.journal.records)
        return self.seed if not known else int(np.random.SeedSequence([self.seed, known]).generate_state(1)[0] >> 1)

    def _forget(self, trial: Any) -> None:
        from optuna.trial import TrialState

        self._study.tell(trial, state=TrialState.FAIL)

    def _enqueue(self, record: Record) -> None:
        """Make Optuna know of a trial that runs, but that it did not suggest."""
        fitting = self._fitting(record)
        if fitting is None:
            return
        from optuna.trial import TrialState, create_trial

        frozen = create_trial(
            state=TrialState.RUNNING, params=fitting[0], distributions=fitting[1], system_attrs=self._generation()
        )
        before = len(self._study.get_trials(deepcopy=False))
        self._study.add_trial(frozen)
        self._trials[record.number] = before

    def _tell(self, record: Record) -> None:
        from optuna.trial import TrialState, create_trial

        values = self._values(record)
        trial = self._trials.pop(record.number, None)
        excess = [] if self.sampler == "cmaes" else violations(record, self.constraints)
        if trial is not None and not isinstance(trial, int):
            if values is None:
                self._forget(trial)
                return
            for i, one in enumerate(excess):
                trial.set_constraint(f"c{i}", one)
            self._study.tell(trial, values)
            self._known.append(record)
            return
        if trial is not None:
            self._forget(trial)
        fitting = self._fitting(record)
        if values is None or fitting is None:
            return
        frozen = create_trial(
            state=TrialState.COMPLETE,
            values=values,
            params=fitting[0],
            distributions=fitting[1],
            system_attrs=self._generation(),
            constraints={f"c{i}": one for i, one in enumerate(excess)},
        )
        self._study.add_trial(frozen)
        self._known.append(record)

    def _forget_old(self) -> None:
        """Give TPE a study of the best and the latest trials, and of those that run."""
        ranked = sorted(self._known, key=self._rank)[:BEST]
        best = {record.number for record in ranked} | {item.number for item, _ in self.front.members[-BEST:]}
        kept = [r for r in self._known[:-RECENT] if r.number in best] + self._known[-RECENT:]
        running = [record for record in self.journal.records if record.number in self._trials]
        self._study = self._new_study(self._study.sampler)
        self._trials.clear()
        self._known = []
        for record in running:
            self._enqueue(record)
        for record in kept:
            self._tell(record)

    def _rank(self, record: Record) -> tuple[float, float]:
        """Smaller is better: what is broken, then the first objective."""
        values = self._values(record) or [0.0]
        broken = sum(max(one, 0.0) for one in violations(record, self.constraints))
        return broken, -self.objectives[0].sign * values[0]

    def _fitting(self, record: Record) -> tuple[dict[str, Any], dict[str, Any]] | None:
        assert self.space is not None
        try:
            inner = self.space.inner(record.parameters)
        except SearchError as error:
            _logger.warning("trial %s: %s; the sampler does not learn from it", record.job or record.number, error)
            return None
        return inner, self.space.distributions(inner)

    def _generation(self) -> dict[str, Any]:
        """What marks a trial that NSGA did not suggest as a member of a population."""
        sampler = self._study.sampler
        if not hasattr(sampler, "_get_generation_key"):
            return {}
        trials = self._study.get_trials(deepcopy=False)
        count = sum(t.state.name == "COMPLETE" for t in trials)
        return {sampler._get_generation_key(): count // sampler.population_size}


def _ask(trial: Any, parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    distribution: Any = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(parameter.name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(parameter.name, distribution.low, distribution.high)
    return trial.suggest_float(parameter.name, distribution.low, distribution.high, log=distribution.log)


class OptunaClassArgsValidator(ClassArgsValidator):
    """Checks ``classArgs`` of ``config.yml`` before the experiment starts."""

    def validate_class_args(self, **kwargs: Any) -> None:
        """Raise :class:`SearchError`, in one line."""
        refuse_unknown(OptunaTuner, kwargs, hidden=("environment",))
        if not isinstance(kwargs.get("deduplicate", True), bool):
            raise SearchError(f"deduplicate is {kwargs['deduplicate']!r}; it must be true or false")
        OptunaTuner(**kwargs)
