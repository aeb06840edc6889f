"""``nni-plugins run``: start the experiment, follow it to its end, stop its manager, finish."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.alone import resuming
from nni_plugins.experiment.bring import Bringing
from nni_plugins.experiment.errors import ExperimentError, Interrupted
from nni_plugins.experiment.finish import finish
from nni_plugins.experiment.follow import LineDisplay, LiveDisplay, wait
from nni_plugins.experiment.launch import (
    Running,
    find_config,
    load_config,
    look_at_machines,
    recipe_of,
    start,
)
from nni_plugins.experiment.manifest import Known, find_experiment
from nni_plugins.experiment.nas_config import is_nas
from nni_plugins.experiment.node import LOOPBACK
from nni_plugins.experiment.recipe_watch import RecipeWatch
from nni_plugins.experiment.resume import load_stopped
from nni_plugins.experiment.signals import interruptible
from nni_plugins.experiment.trials import Trial

if TYPE_CHECKING:
    from rich.console import Console

    from nni_plugins.experiment.machines import Found
    from nni_plugins.report.findings import Findings


def run_experiment(
    source: Path | None,
    port: int,
    console: Console,
    experiments_folder: Path | None = None,
    output: Path | None = None,
    trials: int | None = None,
    concurrency: int | None = None,
    resume: str | None = None,
    listen: str = LOOPBACK,
) -> tuple[Findings, Path]:
    """Run an experiment from ``config.yml`` to its report.

    Parameters
    ----------
    source
        The experiment's folder, or its ``config.yml``; ``None`` to go on with `resume` as NNI stored it.
    port
        Port of NNI's web page and REST API.
    console
        Where progress is shown.
    experiments_folder, trials, concurrency
        In place of what the file says.
    output
        The folder for the report and the best model; ``outputs/NAME-ID`` by default.
    resume
        A stopped experiment to go on with, by id. An architecture search needs `source` too.
    listen
        The address that NNI's manager listens on, without a password.

    Returns
    -------
    The findings, and the folder that they were written to.

    Raises
    ------
    ExperimentError, Interrupted
        With one line each. Either way the manager that was started has been stopped, and the experiment can be resumed.
    """
    if source is None and resume is None:
        raise ExperimentError("no experiment; give its folder, or --resume with the id of a stopped one")
    config_path = None if source is None else find_config(source)
    if config_path is not None and is_nas(config_path):
        from nni_plugins.experiment.nas import run_nas

        return run_nas(config_path, port, console, experiments_folder, output, trials, concurrency, resume, listen)
    with ExitStack() as held:
        if resume is not None:
            earlier = held.enter_context(resuming(find_experiment(resume, experiments_folder), console.print))
            config, name = load_stopped(earlier, trials, concurrency), earlier.name or earlier.id
            resume = earlier.id
            if config_path is not None:
                console.print(
                    f"going on with the configuration that NNI stored; {config_path} is not read again: "
                    "--trials and --concurrency change it, anything else is a new experiment",
                    highlight=False,
                    soft_wrap=True,
                )
        else:
            assert config_path is not None
            config = load_config(config_path, experiments_folder, trials, concurrency)
            check_direction(config, config_path)
            name = config.experiment_name or config_path.resolve().parent.name
        found = look_at_machines(config)
        show_machines(found, console)
        known = followed(lambda: start(config, port, found=found, listen=listen, resume=resume), name, console)
    return finish(known, output, console.print)


def show_machines(found: Sequence[Found], console: Console) -> None:
    """Say what the remote machines are, and what is odd about them."""
    for one in found:
        facts = one.facts
        console.print(
            f"{one.machine}: Python {facts['version']}, torch {facts['torch']}, {facts['cores']} cores, "
            f"{facts['gpus']} GPUs, {facts['free'] >> 30} GiB free",
            highlight=False,
            soft_wrap=True,
        )
        for warning in one.warnings:
            console.print(f"warning: {warning}", highlight=False, soft_wrap=True)


def followed(begin: Callable[[], Running], name: str, console: Console) -> Known:
    """Start an experiment, show its progress to its end, and stop its manager, whatever happens.

    Parameters
    ----------
    begin
        Starts the manager.
    name
        Of the experiment.
    console
        Where progress is shown.

    Raises
    ------
    ExperimentError, Interrupted
        With one line each.
    """
    with interruptible() as received:
        running = begin()
        try:
            announce(running, console)
            limit = running.handle.config.max_trial_duration
            watch = RecipeWatch(
                _read_in_place(running), running.folder, partial(console.print, highlight=False, soft_wrap=True)
            )
            display: Any = LiveDisplay if console.is_terminal else LineDisplay
            with (
                display(console, running.trials_wanted) as show,
                Bringing(running.machines, running.folder, show, console.print, limit) as bring,
            ):

                def look(trials: list[Trial]) -> None:
                    bring(trials)
                    watch()

                trials = wait(running, look, lambda: bool(received))
            count, wanted = len(trials), running.trials_wanted
            if wanted is not None and count < wanted:
                told = f"the tuner tried all there is in its search space: {count} of {wanted} trials"
                console.print(told, highlight=False)
        except Interrupted:
            console.print(f"stopping experiment {running.id} …", highlight=False)
            raise Interrupted(
                f"experiment {running.id} is stopped; `{running.resume_command}` goes on with it, "
                f"`nni-plugins report {running.id}` reports on what it has"
            ) from None
        finally:
            stop(running)
    return Known(running.id, name, "STOPPED", None, running.folder)


def _read_in_place(running: Running) -> Path | None:
    """The recipe that trials read where the user edits it; remote machines get a copy at the start."""
    config = running.handle.config
    return None if running.machines else recipe_of(config.trial_command, config.trial_code_directory)


def announce(running: Running, console: Console) -> None:
    """Say where the experiment can be watched, and who else can."""
    port = running.port
    lines = [f"experiment {running.id}: http://127.0.0.1:{port}, folder {running.folder}"]
    if running.listen == LOOPBACK:
        lines.append(
            f"from another machine: ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"
        )
    else:
        lines.append(f"warning: NNI listens on every address, without a password; keep port {port} behind a firewall")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def stop(running: Running) -> None:
    """Stop the manager; what NNI stored by then stays valid, whatever happens here."""
    try:
        running.stop()
    except KeyboardInterrupt:  # the user does not wait for trials that take their time to end
        running.kill()
        raise Interrupted(
            f"experiment {running.id} was ended at once, and its trials are; `{running.resume_command}` goes on with it"
        ) from None
    except Exception as error:
        if running.alive():
            raise ExperimentError(
                f"experiment {running.id} could not be stopped ({error}); `nnictl stop {running.id}` tries again"
            ) from None


def check_direction(config: Any, path: Path) -> None:
    """Refuse a tuner that would look for the worst model: a trial's ``default`` is to be made large."""
    tuner = config.tuner
    arguments = dict(getattr(tuner, "class_args", None) or {})
    default = "minimize" if getattr(tuner, "name", None) in ("TPE", "Anneal") else "maximize"
    if "nni_plugins.trial" in str(config.trial_command) and arguments.get("optimize_mode", default) == "minimize":
        raise ExperimentError(
            f"{path}: this tuner minimises what is to be maximised; set tuner.classArgs.optimize_mode: maximize"
        )
