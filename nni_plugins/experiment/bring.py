"""While an experiment runs on remote machines: each trial's files are brought here as soon as it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.fetch import Fetcher
from nni_plugins.experiment.folders import FAILURE
from nni_plugins.experiment.health import CUT, bad_metrics, why_ended, why_waiting
from nni_plugins.experiment.machines import Machine, machines_of_profile
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.node import events
from nni_plugins.experiment.trials import ENDED, Trial
from nni_plugins.files import write_json

LOST = "lost with its machine"


class Bringing:
    """Shows trials, says why none starts, and brings the files of those that ended on remote machines.

    Parameters
    ----------
    machines
        The remote machines.
    experiment
        The experiment's folder here.
    show
        Called with the trials.
    say
        Called with one line on what could not be brought, and on why no trial starts.
    limit
        ``maxTrialDuration``, as in the configuration.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        experiment: Path,
        show: Callable[[list[Trial]], None],
        say: Callable[[str], Any],
        limit: Any = None,
    ) -> None:
        self._machines = machines
        self._limit = limit
        self._experiment = experiment
        self._show = show
        self._say = say
        self._asked: set[str] = set()
        self._later: list[Trial] = []
        self._waiting = ""
        self._fetcher = Fetcher(machines, experiment)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch") if machines else None

    def __enter__(self) -> Bringing:
        return self

    def __call__(self, trials: list[Trial]) -> None:
        for trial in trials:
            if trial.status in ENDED and trial.id not in self._asked:
                self._asked.add(trial.id)
                if self._pool is not None:
                    self._pool.submit(self._bring, trial)
                else:
                    self._keep(trial)
        self._show(trials)
        waiting = why_waiting(self._experiment)
        if waiting != self._waiting:
            self._say(f"waiting: {waiting}" if waiting else "waiting no more")
            self._waiting = waiting

    def __exit__(self, *_: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        for trial in self._later:
            try:
                self._keep(trial, self._fetcher.trial(trial.id))
            except ExperimentError as error:
                self._say(f"warning: {error}")
        self._fetcher.__exit__()

    def _bring(self, trial: Trial) -> None:
        try:
            folder = self._fetcher.trial(trial.id)
        except ExperimentError:
            if not keep_loss(self._experiment, trial):
                self._later.append(trial)
        else:
            if not keep_loss(self._experiment, trial):
                self._keep(trial, folder)

    def _keep(self, trial: Trial, folder: Path | None = None) -> None:
        """Write why NNI ended a trial, or why its result does not count, into its folder and its log."""
        folder = folder or trial.folder
        reason = why_ended(trial, bad_metrics(self._experiment), self._limit)
        if folder is None or not reason or (folder / FAILURE).exists():
            return
        try:
            _write(folder, reason, "Stopped" if trial.status != "SUCCEEDED" else "NoResult", trial)
        except OSError as error:
            self._say(f"warning: {folder}: {error.strerror}")


def keep_loss(experiment: Path, trial: Trial) -> bool:
    """Write why a trial was lost into its folder here, if it was lost with its machine; returns whether it was."""
    for event in events(experiment):
        if event["kind"] == "lost" and trial.id in (event.get("trials") or []) and trial.status in CUT:
            folder = trial.folder or experiment / "environments" / str(event["environment"]) / "trials" / trial.id
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, f"{LOST}: the SSH connection to {event.get('machine')} ended", "MachineLost", trial)
            return True
    return False


def _write(folder: Path, reason: str, error: str, trial: Trial) -> None:
    failure = {"reason": reason, "error": error, "parameters": trial.parameters}
    write_json(folder / FAILURE, failure)
    with (folder / "trial.log").open("a", encoding="utf-8") as log:
        log.write(f"{reason}\n")


def bring_missing(known: Known, trials: Sequence[Trial], say: Callable[[str], Any]) -> list[Trial]:
    """Bring what is missing here of a remote experiment, also one that a bare ``nnictl`` ran.

    Returns
    -------
    list of Trial
        The trials again, with the folders that are here now.
    """
    machines = machines_of_profile(known.profile())
    missing = [trial for trial in trials if trial.status in ENDED and trial.folder is None]
    if not machines or not missing:
        return list(trials)
    with Fetcher(machines, known.folder) as fetcher:
        for trial in missing:
            try:
                fetcher.trial(trial.id)
            except ExperimentError as error:
                say(f"warning: {error}")
    return known.trials()


def bring_dense(known: Known, trial: str) -> None:
    """Bring the dense baseline here that `trial` was pruned from, where a remote machine trained it."""
    machines = machines_of_profile(known.profile())
    if machines and not any((known.folder / "dense").glob("*/weights.safetensors")):
        with Fetcher(machines, known.folder) as fetcher:
            fetcher.dense(trial)
