"""AMC: an agent walks through the channel groups and says how much each keeps; a trial says how good the whole is.

He et al., "AMC: AutoML for model compression and acceleration on mobile devices", ECCV 2018: DDPG, a continuous action
for each layer, brought to the budget, and the trial's reward for each step. The paper clips an action where the layers
to come could not meet the budget any more (algorithm 1), so that the last layers pay for the first; here the actions of
a walk are scaled together, as those of the random episodes are, and the budget is used up.

A trial is one episode. It is carried by the trial's parameters alone: states are computed again from them, so that
results may come in any order, from remote workers, from another experiment, or after a resume.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from nni.utils import ClassArgsValidator

from nni_plugins.search.amc_state import Environment, GraphEnvironment
from nni_plugins.search.base import RecordedTuner
from nni_plugins.search.budget import Step, check_budget, check_reach, in_order, scaled
from nni_plugins.search.checks import check_number, check_seed, refuse_unknown
from nni_plugins.search.errors import SearchError
from nni_plugins.search.journal import Record
from nni_plugins.search.optuna_space import NORMAL, Space
from nni_plugins.search.places import checkpoint_folder, experiment_config, trial_code_directory

if TYPE_CHECKING:  # torch is imported when the space is known: NNI gives a tuner ten seconds to start
    from nni_plugins.search.ddpg import DDPG, Episode

_logger = logging.getLogger(__name__)

MOST_UPDATES = 3  # gradient steps after a result, some milliseconds each (published: one for each group)
MOST_AT_ONCE = 100  # results of which each has its gradient steps, when many come at once
ATTEMPTS = 5  # to find parameters that have not been tried
NETWORKS = "amc.safetensors"


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
        Gradient steps after a result; by default one for each group, 3 at most. What the random episodes collect is
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
        self._steps: list[Step] = []
        self._agent: DDPG | None = None

    def _set_space(self, space: dict[str, Any]) -> None:
        steps = {parameter.name: Step(parameter) for parameter in Space(space).parameters}
        if self._given is None:
            path = trial_code_directory() / str(self._recipe)
            self.environment = GraphEnvironment.from_recipe(path, list(steps), self._budget)
        assert self.environment is not None
        self._steps = [steps[name] for name in in_order(self.environment, list(steps))]
        check_reach(self.environment, self._steps)
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
        for attempt in range(ATTEMPTS):  # a policy that has settled needs more noise to find what has not been tried
            noise = self._noise(number) + 0.1 * attempt
            sparsities = self._random(rng) if explore else self._policy(rng, noise)
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
        saved = self.environment.saved([*chosen, *(later.low for later in self._steps[step:])])
        last = float(actions[step - 1]) if step else 1.0
        return np.array([*self.environment.features[step], saved, self.environment.rest[step], last])

    def _policy(self, rng: np.random.Generator, noise: float) -> list[float]:
        assert self._agent is not None
        chosen: list[float] = []
        actions: list[float] = []
        for step in self._steps:
            mean = self._agent.act(self._state(chosen, actions))
            if noise > 1e-6:
                low, high = NORMAL.cdf(-mean / noise), NORMAL.cdf((1 - mean) / noise)  # cut off at 0 and 1
                share = min(max(low + float(rng.random()) * (high - low), 1e-12), 1 - 1e-12)
                mean = min(max(mean + noise * NORMAL.inv_cdf(share), 0.0), 1.0)
            chosen.append(step.sparsity(mean))
            actions.append(step.action(chosen[-1]))
        assert self.environment is not None
        return scaled(self.environment, self._steps, actions)

    def _random(self, rng: np.random.Generator) -> list[float]:
        """Random shares, scaled together until the budget is just met."""
        assert self.environment is not None
        drawn = rng.random(len(self._steps))
        return scaled(self.environment, self._steps, [float(a) for a in drawn])


def _default_warmup() -> int:
    trials = experiment_config().get("maxTrialNumber")
    return min(100, max(5, trials // 4)) if isinstance(trials, int) else 100


def check_arguments(
    recipe: Any, budget: Any, warmup: Any, noise: Any, decay: Any, memory: Any, updates: Any, seed: Any, own: Any = None
) -> None:
    """Raise :class:`SearchError` where a class argument is not what it should be."""
    if own is None and not (isinstance(recipe, str) and recipe):
        raise SearchError("AMCTuner: recipe is missing; name the experiment's recipe.yml, as in its trialCommand")
    check_budget(budget)
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
