"""The experiments that NNI knows on this machine: ``~/nni-experiments/.experiment``.

NNI keeps this list in the home folder even for experiments whose own folder is elsewhere.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nni_plugins.experiment.curves import Curve, curves_from_database, curves_from_rest
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.folders import read_json
from nni_plugins.experiment.manager import Manager
from nni_plugins.experiment.trials import ENDED, EXHAUSTED, Trial, from_database, profile_from_database

WRITE_SECONDS = 1.0
"""So long a list that cannot be read may still be in the middle of being written."""


@dataclass(frozen=True)
class Known:
    """One experiment of NNI's list.

    Attributes
    ----------
    id, name
        NNI's id, and the ``experimentName`` of its configuration.
    status
        NNI's word, and ``STOPPED`` for one whose manager is gone whatever the list says.
    port
        The port of its web page while it runs, else ``None``.
    folder
        The experiment's own folder.
    prefix
        The ``urlPrefix`` of its web page, if it has one.
    listed
        Whether it is in NNI's list here; one that is not was moved here from elsewhere.
    archive
        Whether its folder came out of an archive: then nothing of it is run, and nothing outside it is read.
    killed
        Whether its manager ended without being stopped.
    """

    id: str
    name: str
    status: str
    port: int | None
    folder: Path
    prefix: str | None = None
    listed: bool = True
    archive: bool = False
    killed: bool = False

    def trials(self) -> list[Trial]:
        """Its trials: asked of the manager while it runs, else from its database."""
        if self.archive:
            return [_within(trial, self.folder.resolve()) for trial in from_database(self.folder)]
        if self.port is None:
            return from_database(self.folder)
        return Manager(self.port, self.prefix, folder=self.folder).trials()

    def profile(self) -> dict[str, Any]:
        """NNI's profile of it, from the same place."""
        return (
            Manager(self.port, self.prefix).profile() if self.port is not None else profile_from_database(self.folder)
        )

    def curves(self) -> dict[str, Curve]:
        """What its trials reported while they ran, by trial."""
        if self.port is None:
            return curves_from_database(self.folder)
        return curves_from_rest(Manager(self.port, self.prefix).get("metric-data"))

    def running(self) -> bool:
        """Whether it has trials to come, or running: NNI's manager is there, and not done."""
        if self.port is None:
            return False
        manager = Manager(self.port, self.prefix)
        status, _ = manager.status()
        if status == EXHAUSTED:  # NNI stays so for ever
            return any(trial.status not in ENDED for trial in manager.trials())
        return status not in ("DONE", "STOPPED", "VIEWED", "ERROR")


def _within(trial: Trial, folder: Path) -> Trial:
    """The trial, without a folder that lies outside the experiment's."""
    inside = trial.folder is not None and trial.folder.resolve().is_relative_to(folder)
    return trial if inside else replace(trial, folder=None)


def manifest_path() -> Path:
    """NNI's list of experiments."""
    return Path(os.path.expanduser("~")) / "nni-experiments" / ".experiment"


def known_experiments() -> list[Known]:
    """Every experiment in NNI's list, the newest first."""
    entries = _entries(manifest_path())
    valid = [entry for entry in entries.values() if isinstance(entry, dict) and "id" in entry]
    return [_known(entry) for entry in sorted(valid, key=lambda entry: entry.get("startTime") or 0, reverse=True)]


def _entries(path: Path) -> dict[str, Any]:
    """What is in NNI's list, which NNI does not write whole: who reads meanwhile finds an empty file, or half of it."""
    deadline = time.monotonic() + WRITE_SECONDS
    while True:
        entries = read_json(path)
        if entries is not None or not path.is_file() or time.monotonic() > deadline:
            return entries or {}
        time.sleep(0.02)


def find_experiment(name: str | None, experiments_folder: Path | None = None) -> Known:
    """The experiment with this id (or its folder's path, or the start of its id); without a name, the newest one.

    Parameters
    ----------
    name
        An id, the beginning of one, or an experiment's folder.
    experiments_folder
        Where to look besides NNI's list.

    Raises
    ------
    ExperimentError
        When there is none, or more than one.
    """
    known = known_experiments()
    if name is None:
        if not known:
            raise ExperimentError(f"NNI knows no experiment on this machine ({manifest_path()})")
        return known[0]
    matches = [one for one in known if one.id == name] or [one for one in known if name and one.id.startswith(name)]
    if len(matches) > 1:
        raise ExperimentError(f"{name} is the beginning of {len(matches)} ids: {', '.join(one.id for one in matches)}")
    if matches:
        return matches[0]
    for folder in (Path(name), *([experiments_folder / name] if experiments_folder else [])):
        if (folder / "db" / "nni.sqlite").is_file():
            resolved = folder.resolve()
            listed = [one for one in known if one.folder.resolve() == resolved]
            return listed[0] if listed else moved(resolved)
    raise ExperimentError(f"{name}: no such experiment; `nni-plugins status --all` lists those that NNI knows here")


def moved(folder: Path, archive: bool = False) -> Known:
    """The experiment in a folder that NNI does not list here, under its own id and name.

    Raises
    ------
    ExperimentError
        When its database is none of NNI's.
    """
    profile = profile_from_database(folder)
    name = profile["params"].get("experimentName") if isinstance(profile["params"], dict) else None
    identity = str(profile["id"] or folder.name)
    return Known(identity, str(name or folder.name), "STOPPED", None, folder, listed=False, archive=archive)


def _known(entry: dict[str, Any]) -> Known:
    status, port, prefix = str(entry.get("status", "UNKNOWN")), entry.get("port"), entry.get("prefixUrl")
    killed = status != "STOPPED" and not _alive(entry.get("pid"), entry["id"])
    if status == "STOPPED" or killed or not isinstance(port, int):
        status, port = "STOPPED", None
    folder = Path(entry.get("logDir") or manifest_path().parent) / entry["id"]
    return Known(entry["id"], str(entry.get("experimentName") or ""), status, port, folder, prefix, killed=killed)


def _alive(pid: Any, experiment: str) -> bool:
    """Whether the process is the manager of this experiment: after a restart, the number may be another program's."""
    if not isinstance(pid, int):
        return False
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and experiment in process.cmdline()
    except psutil.Error:
        return False
