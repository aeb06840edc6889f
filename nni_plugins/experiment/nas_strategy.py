"""NNI's exploration strategies: made from a configuration, and told of earlier trials when a search goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.nas_config import NasSettings

Finished = Sequence[tuple[dict[str, Any], float | None]]
EXTRA = "it needs tianshou and gym, which are not installed: pip install 'nni-plugins[rl]', or choose another strategy"


def make_strategy(settings: NasSettings, path: Path) -> Any:
    """Return the strategy that a configuration names.

    Raises
    ------
    ExperimentError
        No such class, arguments that it refuses, or packages that it lacks.
    """
    from nni.nas import strategy as theirs

    name, arguments = settings.strategy, dict(settings.arguments)
    where = f"{path}: nas.strategy {name}"
    if ":" in name:
        from nni_plugins.training.errors import RecipeError
        from nni_plugins.training.resolve import resolve

        try:
            kind = resolve(name, str(path.parent), "nas.strategy")
        except RecipeError as error:
            raise ExperimentError(f"{path}: {error}") from None
    else:
        kind = getattr(theirs, name)
    if name == "TPE" and arguments.setdefault("optimize_mode", "maximize") != "maximize":
        raise ExperimentError(f"{where} minimises what is to be maximised; set optimize_mode: maximize")
    try:
        made = kind(**arguments)
    except ImportError:
        raise ExperimentError(f"{where}: {EXTRA}") from None
    except Exception as error:  # whatever the class raises
        raise ExperimentError(f"{where} refuses its classArgs: {' '.join(str(error).split())}") from None
    if not isinstance(made, theirs.Strategy):
        raise ExperimentError(f"{where} is no strategy of nni.nas")
    unknown = _ignored(kind, arguments)
    if unknown:
        raise ExperimentError(f"{where} has no argument {unknown}")
    return made


def _ignored(kind: type, arguments: dict[str, Any]) -> str:
    """An argument that the class takes and forgets: NNI's have ``**kwargs`` for what is no longer there."""
    import inspect

    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    forgets = kind.__module__.startswith("nni.nas.strategy") and kind.__name__ != "TPE" and "kwargs" in known
    return next((name for name in arguments if forgets and name not in known), "")


def recall(strategy: Any, finished: Finished) -> None:
    """Tell a strategy, before it runs, of trials that an earlier process made.

    NNI saves a strategy's state when a search starts and when it is stopped in order, so that a killed one would begin
    anew. The results are in its database: samples are not tried again, an evolution has its population, and TPE its
    history. A policy of :class:`PolicyBasedRL` starts afresh.

    Parameters
    ----------
    strategy
        Made, not run.
    finished
        Each sample with its metric, None where it failed; in the order of the trials.
    """
    from nni.nas import strategy as theirs
    from nni.nas.strategy.evolution import Individual
    from nni.nas.strategy.hpo import HPOTunerStrategy

    helper: Any = getattr(strategy, "_dedup_helper", None) or getattr(strategy, "_dedup", None)
    for sample, _ in finished:
        if hasattr(helper, "_history"):
            from nni.nas.strategy.utils import _to_hashable

            helper._history.add(_to_hashable(sample))
    if isinstance(strategy, theirs.RegularizedEvolution):
        for sample, value in finished:
            strategy._individual_counter += 1
            if value is not None:
                strategy._population.append(Individual(sample, value))
        while len(strategy._population) > strategy.population_size:
            strategy._population.popleft()
    if isinstance(strategy, HPOTunerStrategy):
        _recall_tuner(
            strategy, [{"parameter": sample, "value": value} for sample, value in finished if value is not None]
        )


def _recall_tuner(strategy: Any, data: list[dict[str, Any]]) -> None:
    tuner = strategy.tuner
    theirs = tuner.update_search_space

    def update_search_space(space: Any) -> None:
        theirs(space)
        tuner.import_data(data)

    tuner.update_search_space = update_search_space
