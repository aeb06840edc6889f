"""AMC: an agent walks through the channel groups and says how much each keeps; a trial says how good the whole is.

He et al., "AMC: AutoML for model compression and acceleration on mobile devices", ECCV 2018: DDPG, a continuous action
for each layer, clipped so that the layers to come can still meet the budget (algorithm 1), and the trial's reward for
each step. A trial is one episode. It is carried by the trial's parameters alone: states are computed again from them,
so that results may come in any order, from remote workers, from another experiment, or after a resume.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from nni.utils import ClassArgsValidator
from scipy.special import ndtr, ndtri

from nni_plugins.search.amc_state import BUDGETS, PREFIX, Environment, GraphEnvironment
from nni_plugins.search.base import RecordedTuner
from nni_plugins.search.checks import check_number, check_seed, refuse_unknown
from nni_plugins.search.errors import SearchError
from nni_plugins.search.journal import Record
from nni_plugins.search.optuna_space import Parameter, Space
from nni_plugins.search.places import checkpoint_folder, experiment_config, trial_code_directory

if TYPE_CHECKING:  # torch is imported when the space is known: NNI gives a tuner ten seconds to start
    from nni_plugins.search.ddpg import DDPG, Episode

_logger = logging.getLogger(__name__)

MOST_UPDATES = 4  # gradient steps after a result, some milliseconds each (published: one for each group)
MOST_AT_ONCE = 100  # results of which each has its gradient steps, when many come at once
NETWORKS = "amc.safetensors"
SLACK = 1e-9


class AMCTuner(RecordedTuner):
    """A tuner for NNI that learns a policy over the channel groups of a model.

    Parameters
    ----------
    recipe : str
        The experiment's recipe, relative to ``trialCodeDirectory``. Its model is built (not trained) and watched, for
        the agent's states and to count costs. ``prune.target`` must be ``channels``.
    budget : dict, optional
        ``macs`` and ``params`` (shares of the dense model's, numbers above 1), ``latency_ms``; by default the bounds
        of the recipe's ``objective``. Every suggestion meets it.
    warmup : int, optional
        Random episodes at first: 100, or a quarter of ``maxTrialNumber`` where that is less. They are spread over the
        groups and then scaled together until the budget is just met.
    noise, noise_decay : float
        Standard deviation of the truncated normal noise after them, and its factor for each episode.
    memory : int
        Episodes that are replayed, the latest.
    updates : int, optional
        Gradient steps after a result; by default one for each group, 4 at most. What the random episodes collect is
        learnt at once, after the last of them.
    seed : int, optional
        Makes suggestions repeatable, for results that come in the same order.
    environment : Environment, optional
        In place of ``recipe``, from Python: what the steps are, and what they cost.

    Notes
    -----
    The search space holds ``prune.groups.NAME`` only, each a range of sparsities or a list of them. The result's
    ``default`` is maximised. Networks and optimizers are saved after each result, without pickle.
    """

    name = "amc"

    def __init__(
        self,
        recipe: str | None = None,
        budget: dict[str, float] | None = None,
        warmup: int | None = None,
        noise: float = 0.5,
        noise_decay: float = 0.95,
        memory: int = 500,
        updates: int | None = None,
        seed: int | None = None,
        environment: Environment | None = None,
    ) -> None:
        super().__init__()
        check_arguments(recipe, budget, warmup, noise, noise_decay, memory, updates, seed, environment)
        self._recipe, self._budget = recipe, budget
        self.warmup = _default_warmup() if warmup is None else warmup
        self.noise, self.noise_decay, self.memory_size, self.updates = noise, noise_decay, memory, updates
        self.seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._given, self.environment = environment, environment
        self.memory: list[Episode] = []
        self._steps: list[_Step] = []
        self._agent: DDPG | None = None

    def _set_space(self, space: dict[str, Any]) -> None:
        steps = {parameter.name: _Step(parameter) for parameter in Space(space).parameters}
        if self._given is None:
            path = trial_code_directory() / str(self._recipe)
            self.environment = GraphEnvironment.from_recipe(path, list(steps), self._budget)
        assert self.environment is not None
        if set(self.environment.names) != set(steps):
            raise SearchError(f"AMCTuner: the environment has {self.environment.names}, the space {list(steps)}")
        self._steps = [steps[name] for name in self.environment.names]
        most = self.environment.load([step.high for step in self._steps])
        if most > 1 + SLACK:
            raise SearchError(
                f"AMCTuner: the budget is out of reach: where every group loses the most that the search space allows, "
                f"{most:.3g} times the budget is left; widen the ranges, or raise the budget"
            )
        from nni_plugins.search.ddpg import DDPG

        self._agent = DDPG(self.environment.features.shape[1] + 3, self.seed)
        self.memory = []
        for record in self.journal.done():
            self._remember(record)

    def _suggest(self) -> dict[str, Any]:
        assert self.environment is not None, "update_search_space comes first"
        number = len(self.journal.records)
        rng = np.random.default_rng([self.seed, number])
        explore = number < self.warmup or not self.memory
        for _ in range(20):
            sparsities = self._random(rng) if explore else self._policy(rng, self._noise(number))
            values = [step.value(s) for step, s in zip(self._steps, sparsities, strict=True)]
            parameters = dict(zip(self.environment.names, values, strict=True))
            if not self.journal.seen(parameters):
                break
        return parameters

    def _noise(self, number: int) -> float:
        return self.noise * self.noise_decay ** max(number - self.warmup, 0)

    def _learn(self, record: Record) -> None:
        self._remember(record)

    def _learnt(self, results: int) -> None:
        assert self._agent is not None
        done = len(self.journal.done())
        if done < max(self.warmup, 2) or not self.memory:
            return
        updates = min(len(self._steps), MOST_UPDATES) if self.updates is None else self.updates
        if done - results < self.warmup:
            results = done  # what was collected so far
        self._agent.learn(
            self.memory, updates * min(results, MOST_AT_ONCE), np.random.default_rng([self.seed, done, 1])
        )
        self._save(done)

    def _restored(self) -> None:
        folder = checkpoint_folder()
        if folder is None or not (folder / NETWORKS).exists():
            return
        assert self._agent is not None
        try:
            notes = self._agent.load(folder / NETWORKS)
            _logger.info("amc: networks after %s results found again", notes.get("results"))
        except ValueError as error:
            _logger.warning("%s; the networks start anew, from all earlier episodes", error)

    def _save(self, done: int) -> None:
        folder = checkpoint_folder()
        assert self._agent is not None
        if folder is None:
            return
        try:
            self._agent.save(folder / NETWORKS, results=done)
        except Exception as error:  # safetensors has errors of its own; a full disk does not end the search
            _logger.error("%s: cannot be written (%s)", folder / NETWORKS, error)

    def _remember(self, record: Record) -> bool:
        """Make the episode of a trial's parameters and keep it."""
        assert self.environment is not None
        from nni_plugins.search.ddpg import Episode

        reward = record.number_of("default")
        if reward is None:
            _logger.error("trial %s: no finite default in its result; it is no episode", record.job or record.number)
            return False
        try:
            sparsities = [
                step.read(record.parameters[name])
                for step, name in zip(self._steps, self.environment.names, strict=True)
            ]
        except (KeyError, TypeError, ValueError):
            _logger.warning("trial %s is of another search space; it is no episode", record.job or record.number)
            return False
        actions = np.array([step.action(s) for step, s in zip(self._steps, sparsities, strict=True)])
        states = np.stack([self._state(sparsities[:i], actions[:i]) for i in range(len(sparsities))])
        self.memory.append(Episode(states.astype(np.float32), actions.astype(np.float32), reward))
        del self.memory[: -self.memory_size]
        return True

    # Walking through the groups

    def _state(self, chosen: list[float], actions: Any) -> np.ndarray:
        """What the agent sees before step ``len(chosen)``: constants, MACs saved, MACs left, the last action."""
        assert self.environment is not None
        step = len(chosen)
        saved = self.environment.saved(self._completed(chosen, "low"))
        last = float(actions[step - 1]) if step else 1.0
        return np.array([*self.environment.features[step], saved, self.environment.rest[step], last])

    def _completed(self, chosen: list[float], rest: str) -> list[float]:
        return [*chosen, *(getattr(step, rest) for step in self._steps[len(chosen) :])]

    def _policy(self, rng: np.random.Generator, noise: float) -> list[float]:
        assert self._agent is not None
        chosen: list[float] = []
        actions: list[float] = []
        for step in self._steps:
            mean = self._agent.act(self._state(chosen, actions))
            if noise > 1e-6:
                low, high = ndtr(-mean / noise), ndtr((1 - mean) / noise)  # normal, cut off at 0 and 1
                mean = min(max(mean + noise * float(ndtri(low + rng.random() * (high - low))), 0.0), 1.0)
            chosen.append(self._clipped(chosen, step, step.sparsity(mean)))
            actions.append(step.action(chosen[-1]))
        return chosen

    def _clipped(self, chosen: list[float], step: _Step, wanted: float) -> float:
        """Return the sparsity nearest to ``wanted`` with which the later groups can still meet the budget."""

        def fits(sparsity: float) -> bool:
            assert self.environment is not None
            return self.environment.load(self._completed([*chosen, sparsity], "high")) <= 1 + SLACK

        return wanted if fits(wanted) else step.least(fits, wanted)

    def _random(self, rng: np.random.Generator) -> list[float]:
        """Random shares, scaled together until the budget is just met."""
        assert self.environment is not None
        drawn = rng.random(len(self._steps))

        def at(scale: float) -> list[float]:
            kept = np.minimum(drawn * scale, 1.0)
            return [step.sparsity(a) for step, a in zip(self._steps, kept, strict=True)]

        low, high = 0.0, 1 / max(float(drawn.min()), 1e-3)
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.environment.load(at(middle)) <= 1 + SLACK else (low, middle)
        return at(low)


class _Step:
    """One group's range of sparsities; an action of 1 keeps the most that it allows."""

    def __init__(self, parameter: Parameter) -> None:
        name, kind = parameter.name, parameter.kind
        if not name.startswith(PREFIX):
            raise SearchError(
                f"AMCTuner: {name} is not {PREFIX}GROUP: AMC chooses sparsities of groups; write it into the recipe"
            )
        self.grid: list[tuple[float, Any]] = []  # sparsity, and the value as the space has it
        if kind == "choice":
            numbers = [v for v in parameter.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            if len(numbers) != len(parameter.values):
                raise SearchError(f"AMCTuner: {name}: all its choices must be sparsities, numbers in [0, 1)")
            self.grid = sorted((float(v), v) for v in numbers)
        elif kind == "quniform":
            inner: Any = parameter.distribution
            self.grid = [(float(v), v) for v in map(parameter.value, range(inner.low, inner.high + 1))]
        elif kind not in ("uniform", "loguniform"):
            raise SearchError(f"AMCTuner: {name} is a {kind}; give it a uniform, a quniform or a choice of sparsities")
        ends = [one for one, _ in self.grid] or [float(value) for value in parameter.values]
        self.low, self.high = min(ends), max(ends)
        if not 0 <= self.low <= self.high < 1:
            raise SearchError(f"AMCTuner: {name}: [{self.low:g}, {self.high:g}] are no sparsities, numbers in [0, 1)")

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

    def least(self, fits: Any, above: float) -> float:
        """Return the smallest sparsity above this one that fits; the largest of all always does."""
        if self.grid:
            return next((one for one, _ in self.grid if one > above and fits(one)), self.high)
        low, high = above, self.high
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high


def _default_warmup() -> int:
    trials = experiment_config().get("maxTrialNumber")
    return min(100, max(5, trials // 4)) if isinstance(trials, int) else 100


def check_arguments(
    recipe: Any, budget: Any, warmup: Any, noise: Any, decay: Any, memory: Any, updates: Any, seed: Any, own: Any = None
) -> None:
    """Raise :class:`SearchError` where a class argument is not what it should be."""
    if own is None and not (isinstance(recipe, str) and recipe):
        raise SearchError("AMCTuner: recipe is missing; name the experiment's recipe.yml, as in its trialCommand")
    if budget is not None:
        if not isinstance(budget, Mapping) or not budget or set(budget) - set(BUDGETS):
            raise SearchError(f"budget is {budget!r}; it must be names and values of {', '.join(BUDGETS)}")
        for name, value in budget.items():
            check_number(f"budget.{name}", value, float, 1e-9, 1e18)
    if warmup is not None:
        check_number("warmup", warmup, int, 0, 1_000_000)
    if updates is not None:
        check_number("updates", updates, int, 0, 10_000)
    check_number("noise", noise, float, 0, 10)
    check_number("noise_decay", decay, float, 0, 1)
    check_number("memory", memory, int, 1, 1_000_000)
    check_seed(seed)


class AMCClassArgsValidator(ClassArgsValidator):
    """Checks ``classArgs`` of ``config.yml`` before the experiment starts."""

    def validate_class_args(self, **kwargs: Any) -> None:
        """Raise :class:`SearchError`, in one line. Whether the recipe can be read shows when the tuner starts."""
        refuse_unknown(AMCTuner, kwargs, hidden=("environment",))
        AMCTuner(**kwargs)
