"""One manager for an experiment, and one process for a trial, when it goes on after a stop.

NNI's manager takes no lock: two that resume an experiment at once both start its unfinished trials, in the same
folders. Nor does it look for what a manager that was killed left running.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.left import end, trials
from nni_plugins.experiment.trials import ENDED, from_database

if TYPE_CHECKING:
    import psutil

    from nni_plugins.experiment.manifest import Known

LOCK = ".resume.lock"
"""In the experiment's folder; held from before the manager starts until it is stopped."""


@contextmanager
def resuming(known: Known, say: Callable[[str], Any] = lambda line: None) -> Iterator[Known]:
    """Hold a stopped experiment for this process, which will start its manager inside.

    Parameters
    ----------
    known
        The experiment.
    say
        Called with a line when processes of its trials had to be ended.

    Yields
    ------
    The experiment as it is now that nobody else can start it: who came first may have finished it.

    Raises
    ------
    ExperimentError
        When another process starts or runs it, or a process of its trials cannot be ended.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(known.folder / LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ExperimentError(_running(known)) from None
    except (OSError, NotImplementedError):  # a folder that cannot be written says so later, in its own words
        pass
    try:
        fresh = _as_it_is(known)
        if fresh.port is not None or manager_of(fresh.id) is not None:
            raise ExperimentError(_running(fresh))
        end_left(fresh, say)
        with _listed_as_starting(fresh):
            yield fresh
    finally:
        lock.release()


def manager_of(experiment: str, besides: int | None = None) -> int | None:
    """The process of a manager that runs this experiment, whoever started it and whether or not NNI lists it yet.

    Parameters
    ----------
    experiment
        Its id.
    besides
        A process that does not count.
    """
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "--experiment-id" not in words or "--experiments-directory" not in words or process.pid == besides:
                continue
            viewed = words[words.index("--action") + 1 :][:1] == ["view"] if "--action" in words else False
            own = words[words.index("--experiment-id") + 1 :][:1] == [experiment]
            if own and not viewed and process.status() != psutil.STATUS_ZOMBIE:
                return process.pid
    return None


def end_left(known: Known, say: Callable[[str], Any] = lambda line: None) -> list[int]:
    """End the processes that a killed manager left of the trials that will start again; returns their ids.

    A trial's processes have NNI's variables in their environment, whatever its command is and whatever it started.

    Raises
    ------
    ExperimentError
        When one of them is still there after ten seconds.
    """
    unfinished = {trial.id for trial in from_database(known.folder) if trial.status not in ENDED}
    told = False

    def find() -> list[psutil.Process]:
        nonlocal told
        found = trials(known.id, lambda variables: variables.get("NNI_TRIAL_JOB_ID") in unfinished)
        if found and not told:
            say(f"ending what the last manager left of its trials: {len(found)} processes")
            told = True
        return found

    ended, stubborn = end(find)
    if stubborn:
        raise ExperimentError(
            f"process {stubborn[0]} of an unfinished trial of experiment {known.id} does not end; "
            "stop it, then resume the experiment"
        )
    return ended


def _running(known: Known) -> str:
    where = f" on port {known.port}" if known.port is not None else ""
    if where:
        return f"experiment {known.id} still runs{where}; `nnictl stop {known.id}` stops it"
    return f"experiment {known.id} is being resumed by another process; `nni-plugins status {known.id}` shows it"


def _as_it_is(known: Known) -> Known:
    from nni_plugins.experiment.manifest import known_experiments

    return next((one for one in known_experiments() if one.id == known.id), known) if known.listed else known


@contextmanager
def _listed_as_starting(known: Known) -> Iterator[None]:
    """Let NNI's list say that the experiment is no longer stopped, so that ``nnictl resume`` leaves it alone."""
    from nni.tools.nnictl.config_utils import Experiments

    listed = Experiments()
    before = listed.get_all_experiments().get(known.id)
    if before is None:
        yield
        return
    listed.update_experiment(known.id, "pid", os.getpid())
    listed.update_experiment(known.id, "status", "INITIALIZED")
    try:
        yield
    finally:
        now = Experiments().get_all_experiments().get(known.id, {})
        if now.get("pid") == os.getpid():  # no manager came in its place
            listed.update_experiment(known.id, "status", before.get("status"))
            listed.update_experiment(known.id, "pid", before.get("pid"))
