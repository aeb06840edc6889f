"""The configuration of an architecture search: NNI's ``config.yml`` with a ``nas`` section in the tuner's place.

NNI has no file for its NAS experiments. What this reads is NNI's own configuration, but for the fields that make no
sense in one (``searchSpace``, ``trialCommand``, ``tuner``, ``assessor``), and a section of four fields::

    nas:
      space: space:digits_space          # module:function, which returns a ModelSpace
      recipe: recipe.yml                 # how an architecture is trained, pruned and judged
      strategy:
        name: RegularizedEvolution
        classArgs: {population_size: 8, sample_size: 4}
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nni_plugins.experiment.config_check import read_config, reason_of
from nni_plugins.experiment.errors import ExperimentError

STRATEGIES = ("Random", "GridSearch", "RegularizedEvolution", "TPE", "PolicyBasedRL")
TRIAL = "-m nni_plugins.experiment.nas_trial"
NOT_HERE = {
    "searchspace": "the space is nas.space",
    "searchspacefile": "the space is nas.space",
    "trialcommand": "trials are started by nni-plugins",
    "tuner": "the algorithm is nas.strategy",
    "assessor": "NNI's strategies know no assessor",
    "advisor": "the algorithm is nas.strategy",
}


@dataclass(frozen=True)
class NasSettings:
    """The ``nas`` section.

    Attributes
    ----------
    space
        ``module:function``, looked for beside the recipe, in ``trialCodeDirectory`` and among what is installed.
    recipe
        Path of the recipe, as trials see it from ``trialCodeDirectory``.
    strategy
        A name in ``nni.nas.strategy``, or ``module:Class``.
    arguments
        The strategy's keyword arguments.
    top
        How many of the best models are copied beside the report, and loaded again in a process of their own.
    """

    space: str
    recipe: str = "recipe.yml"
    strategy: str = "RegularizedEvolution"
    arguments: dict[str, Any] = field(default_factory=dict)
    top: int = 1


def is_nas(path: Path) -> bool:
    """Say whether a configuration is one of an architecture search."""
    return "nas" in read_config(path)


def load_nas_config(
    path: Path,
    experiments_folder: Path | None = None,
    trials: int | None = None,
    concurrency: int | None = None,
) -> tuple[Any, NasSettings]:
    """Read a configuration with a ``nas`` section.

    Parameters
    ----------
    path
        The file.
    experiments_folder, trials, concurrency
        In place of ``experimentWorkingDirectory``, ``maxTrialNumber``, ``trialConcurrency``.

    Returns
    -------
    NNI's ``NasExperimentConfig``, checked, and the section.

    Raises
    ------
    ExperimentError
        In one line.
    """
    content = read_config(path)
    settings = read_settings(content.pop("nas"), path)
    for name in content:
        plain = str(name).lower().replace("_", "")
        if plain in NOT_HERE:
            raise ExperimentError(f"{path}: {name} has no place beside a nas section: {NOT_HERE[plain]}")
    from nni.experiment.config import utils

    from nni_plugins.experiment.nas_experiment import NasExperimentConfig

    utils.unset_base_path()
    utils.set_base_path(path.parent)
    try:
        config: Any = NasExperimentConfig("ts", "simplified", **content)
        if experiments_folder is not None:
            config.experiment_working_directory = str(experiments_folder.expanduser().resolve())
        if trials is not None:
            config.max_trial_number = trials
        if concurrency is not None:
            config.trial_concurrency = concurrency
        python = f'"{sys.executable}"' if sys.platform == "win32" else shlex.quote(sys.executable)
        config.trial_command = f"{python if _local(config) else 'python3'} {TRIAL}"
        config = config.canonical_copy()
        config.validate()
    except Exception as error:  # NNI raises whatever comes
        reason = reason_of(error)
        if "MISSING" in reason:
            reason = "a field that it needs is missing, such as trainingService: {platform: local} or trialConcurrency"
        raise ExperimentError(f"{path}: NNI refuses this configuration: {reason}") from None
    finally:
        utils.unset_base_path()
    return config, settings


def _local(config: Any) -> bool:
    return getattr(config.training_service, "platform", "") == "local"


def read_settings(section: Any, path: Path) -> NasSettings:
    """Check the ``nas`` section."""

    def fail(text: str) -> ExperimentError:
        return ExperimentError(f"{path}: nas{text}")

    if not isinstance(section, dict):
        raise fail(" must be a section with space, recipe and strategy")
    known = ("space", "recipe", "strategy", "top")
    for name in section:
        if name not in known:
            raise fail(f".{name} is not a field; known: {', '.join(known)}")
    space, recipe, strategy = section.get("space"), section.get("recipe", "recipe.yml"), section.get("strategy", {})
    if not isinstance(space, str) or ":" not in space:
        raise fail(f".space is {space!r}; it must be module:function, which returns a ModelSpace")
    if not isinstance(recipe, str):
        raise fail(f".recipe is {recipe!r}; it must be the path of a recipe")
    if isinstance(strategy, str):
        strategy = {"name": strategy}
    if not isinstance(strategy, dict) or set(strategy) - {"name", "classArgs"}:
        raise fail(".strategy must be a name, or a section with name and classArgs")
    name, arguments = strategy.get("name", NasSettings.strategy), strategy.get("classArgs") or {}
    if name not in STRATEGIES and ":" not in str(name):
        raise fail(f".strategy is {name!r}; known: {', '.join(STRATEGIES)}, or module:Class")
    if not isinstance(arguments, dict):
        raise fail(f".strategy.classArgs is {arguments!r}; it must be names and values")
    top = section.get("top", 1)
    if type(top) is not int or top < 1:
        raise fail(f".top is {top!r}; it must be a whole number from 1")
    return NasSettings(space, recipe, name, arguments, top)
