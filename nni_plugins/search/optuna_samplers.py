"""Optuna's samplers by the names that class arguments give them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from nni_plugins.search.errors import SearchError

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tpe": ("TPESampler", {"multivariate": True, "group": True, "constant_liar": True}),
    "gp": ("GPSampler", {"warn_independent_sampling": False}),
    "cmaes": ("CmaEsSampler", {"warn_independent_sampling": False}),
    "nsga2": ("NSGAIISampler", {"population_size": 20}),
    "nsga3": ("NSGAIIISampler", {"population_size": 20}),
    "random": ("RandomSampler", {}),
    "qmc": ("QMCSampler", {"scramble": True, "warn_independent_sampling": False}),
}
"""Optuna's class of each sampler, and what differs from Optuna's defaults."""
WARM_START = 10  # trials that CMA-ES begins from after a resume


def make_sampler(name: str, arguments: dict[str, Any], seed: int, trials: Sequence[Any]) -> Any:
    """Make one of Optuna's samplers.

    Parameters
    ----------
    name
        A key of :data:`SAMPLERS`.
    arguments
        What :func:`sampler_arguments` returned.
    seed
        Of its suggestions.
    trials
        Optuna's trials of an earlier process. CMA-ES begins from them: Optuna keeps its state as a pickle, which is not
        kept here.

    Raises
    ------
    SearchError
        An argument that it refuses, in one line.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments = dict(arguments)
    if name == "cmaes" and not {"x0", "sigma0", "use_separable_cma"} & set(arguments):
        known = [trial for trial in trials if trial.state.name == "COMPLETE"]
        if len(known) >= WARM_START:
            arguments["source_trials"] = known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(optuna.samplers, SAMPLERS[name][0])(seed=seed, **arguments)
        except (TypeError, ValueError) as error:
            raise SearchError(f"sampler_args do not fit {name}: {str(error).splitlines()[0]}") from None


def sampler_arguments(sampler: str, given: Any, n_startup_trials: Any, objectives: int) -> dict[str, Any]:
    """Check ``sampler`` and its arguments; return the keyword arguments of Optuna's class but for the seed."""
    import optuna

    if sampler not in SAMPLERS:
        raise SearchError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    if sampler == "cmaes" and objectives > 1:
        raise SearchError("sampler cmaes has one objective; take tpe, gp, nsga2 or nsga3 for several")
    if given is not None and not isinstance(given, dict):
        raise SearchError(f"sampler_args is {given!r}; it must be names and values")
    name, defaults = SAMPLERS[sampler]
    signature = inspect.signature(getattr(optuna.samplers, name)).parameters
    known = [item for item in signature if item not in ("seed", "n_startup_trials", "constraints_func")]
    for item in given or {}:
        if item not in known:
            raise SearchError(f"sampler_args.{item} is not an argument of {sampler}; known: {', '.join(known)}")
    arguments = {**defaults, **(given or {})}
    if n_startup_trials is not None:
        if type(n_startup_trials) is not int or n_startup_trials < 0:
            raise SearchError(f"n_startup_trials is {n_startup_trials!r}; it must be a whole number, 0 or more")
        if "n_startup_trials" in signature:
            arguments["n_startup_trials"] = n_startup_trials
    elif sampler == "cmaes":
        arguments["n_startup_trials"] = 10
    return arguments
