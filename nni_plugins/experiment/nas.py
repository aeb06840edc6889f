"""``nni-plugins run`` for an architecture search: NNI's NasExperiment, followed to its end, and reported on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.alone import resuming
from nni_plugins.experiment.best_trials import FINETUNED
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.finish import finish
from nni_plugins.experiment.folders import METRICS, read_json
from nni_plugins.experiment.launch import (
    Running,
    _early_error,
    _patience,
    check_home,
    check_port,
    look_at_machines,
    silence_nni,
)
from nni_plugins.experiment.machines import Found, host_keys
from nni_plugins.experiment.manifest import Known, find_experiment
from nni_plugins.experiment.nas_config import NasSettings, load_nas_config
from nni_plugins.experiment.node import LOOPBACK, preloaded
from nni_plugins.experiment.trials import Trial, from_database, ranked
from nni_plugins.experiment.write import KEPT

if TYPE_CHECKING:
    from rich.console import Console

    from nni_plugins.report.findings import Findings

TOP = "top"


def run_nas(
    path: Path,
    port: int,
    console: Console,
    experiments_folder: Path | None = None,
    output: Path | None = None,
    trials: int | None = None,
    concurrency: int | None = None,
    resume: str | None = None,
    listen: str = LOOPBACK,
) -> tuple[Findings, Path]:
    """Run an architecture search from its configuration to its report.

    Parameters
    ----------
    path
        ``config.yml`` with a ``nas`` section.
    port
        Port of NNI's web page and REST API.
    console
        Where progress is shown.
    experiments_folder, trials, concurrency
        In place of what the file says.
    output
        The folder for the report and the best models; ``outputs/NAME-ID`` by default.
    resume
        Id of a stopped run of the same search to go on with: its trials count, and its strategy knows them.
    listen
        The address that NNI's manager listens on.

    Returns
    -------
    The findings, and the folder that they were written to.

    Raises
    ------
    ExperimentError, Interrupted
        With one line each; the manager that was started has been stopped.
    """
    from nni_plugins.experiment.session import followed, show_machines

    with ExitStack() as held:
        stopped = None if resume is None else find_experiment(resume, experiments_folder)
        if stopped is not None:
            stopped = held.enter_context(resuming(stopped, console.print))
        folder, earlier = _earlier(stopped, experiments_folder)
        config, settings = load_nas_config(path, folder, trials, concurrency)
        experiment = make_experiment(config, settings, path, None if stopped is None else stopped.id)
        command = again(path, experiment.id)
        name = config.experiment_name or path.resolve().parent.name
        machines = look_at_machines(config)
        show_machines(machines, console)
        known = followed(lambda: launch(experiment, config, port, earlier, command, machines, listen), name, console)
    findings, written = finish(known, output, console.print)
    export_top_models(whole(known, known.trials()), settings.top, written, console.print)
    return findings, written


def make_experiment(config: Any, settings: NasSettings, path: Path, resume: str | None = None) -> Any:
    """Make NNI's experiment: the space by its name, the recipe as its evaluator, the strategy.

    Raises
    ------
    ExperimentError
        A space, recipe or strategy that is not there or does not work.
    """
    from nni.nas.nn.pytorch import ModelSpace

    from nni_plugins.experiment.nas_evaluation import RecipeEvaluation, limits_of
    from nni_plugins.experiment.nas_experiment import WatchedNasExperiment
    from nni_plugins.experiment.nas_strategy import make_strategy
    from nni_plugins.search.pruned_space import PrunedSpace, known_as, space_of
    from nni_plugins.training.recipe import load_recipe

    folder = Path(config.trial_code_directory)
    recipe = load_recipe(folder / settings.recipe)
    strategy = make_strategy(settings, path)
    try:
        space = space_of(settings.space, recipe.folder)
    except ValueError as error:
        raise ExperimentError(f"{path}: nas.space {settings.space}: {' '.join(str(error).split())}") from None
    if not isinstance(space, ModelSpace):
        raise ExperimentError(f"{path}: nas.space {settings.space} returned {type(space).__name__}, not a ModelSpace")
    default: dict[str, Any] = dict(space.survey.default) if isinstance(space, PrunedSpace) else {}
    if not isinstance(space, PrunedSpace):
        for mutable in space.simplify().values():
            mutable.robust_default(default)
    known_as(space, settings.space, recipe.folder)
    limits = limits_of(recipe, settings.space, default)
    evaluator = RecipeEvaluation(settings.recipe, settings.space, limits)
    return WatchedNasExperiment(space, evaluator, strategy, config, id=resume)


def launch(
    experiment: Any,
    config: Any,
    port: int,
    earlier: list[Trial],
    command: str,
    machines: Sequence[Found] = (),
    listen: str = LOOPBACK,
) -> Running:
    """Start the manager and the strategy; returns once a trial is there."""
    from nni_plugins.experiment.nas_experiment import StrategyManager

    check_port(port)
    folder = Path(config.experiment_working_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"{folder}: the experiments folder cannot be made ({error.strerror})") from None
    check_home()
    silence_nni()
    manager = StrategyManager(port, experiment, folder / experiment.id)
    hosts = tuple(one.machine for one in machines)
    wanted = config.max_trial_number
    running = _Watched(experiment.id, port, folder / experiment.id, manager, experiment, wanted, hosts, listen, command)
    try:
        with _patience(experiment.id), preloaded(listen, host_keys(machines) if machines else None):
            experiment.start_watched(port, [(trial.parameters, trial.default) for trial in earlier])
        reason = _early_error(running)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason:
        running.stop()
        raise ExperimentError(f"the architecture search did not start: {reason}; see {running.folder / 'log'}")
    return running


@dataclass(frozen=True)
class _Watched(Running):
    """As any running experiment, but nnictl cannot resume it."""

    again: str = ""

    @property
    def resume_command(self) -> str:
        """How to go on with it after a stop."""
        return self.again


def again(path: Path, experiment: str) -> str:
    """How to go on with a stopped search: nnictl cannot."""
    return f"nni-plugins run {path} --resume {experiment}"


def _earlier(stopped: Known | None, experiments_folder: Path | None) -> tuple[Path | None, list[Trial]]:
    """Where the run to go on with is kept, and its trials; NNI runs those that were cut off again by itself."""
    if stopped is None:
        return experiments_folder, []
    return stopped.folder.parent, [trial for trial in from_database(stopped.folder) if trial.parameters]


def whole(known: Known, trials: list[Trial]) -> list[Trial]:
    """The trials; those of a quick search that were fine-tuned at its end, and only these, as they were then."""
    found = []
    for trial in trials:
        folder = known.folder / FINETUNED / trial.id
        metrics = read_json(folder / METRICS)
        if metrics is not None:
            found.append(replace(trial, folder=folder, metrics=metrics))
    return found or trials


def export_top_models(trials: list[Trial], limit: int, output: Path, say: Any) -> list[Path]:
    """Copy the best compact models beside the report, and load each again in a process of its own.

    Parameters
    ----------
    trials
        Of the search.
    limit
        How many.
    output
        Folder of the report; models go to ``top/1``, ``top/2`` ... in it.
    say
        Called with a line.

    Returns
    -------
    list of Path
        The models' files, the best first.

    Raises
    ------
    ExperimentError
        A file from which the model does not come back as it was.
    """
    folders = []
    for rank, trial in enumerate(ranked(trials)[:limit], 1):
        folder = output / TOP / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            assert trial.folder is not None
            if (trial.folder / name).is_file():
                shutil.copyfile(trial.folder / name, folder / name)
        folders.append(folder)
    answer = subprocess.run(
        [sys.executable, "-m", "nni_plugins.experiment.nas_check", *map(str, folders)], capture_output=True, text=True
    )
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or ["it says nothing"]
        raise ExperimentError(f"{output / TOP}: a model does not come back from its file: {lines[-1]}")
    for line in answer.stdout.strip().splitlines():
        say(line)
    return [folder / "compact.safetensors" for folder in folders]
