"""What trials left on remote machines, brought into the experiment's folder here, over SFTP.

NNI's own fetch of a remote trial's output is empty. A trial's folder here has the name that it has there:
``<experiment>/environments/<environment>/trials/<trial>``.
"""

from __future__ import annotations

import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.machines import Machine, connected

if TYPE_CHECKING:
    import paramiko

LARGEST = 4 << 30
"""Bytes of the largest file that is brought here."""
SILENCE_SECONDS = 60.0
"""A machine that is silent for so long in the middle of a file is lost."""
RETRY_SECONDS = 60.0
"""A machine that cannot be reached is tried again after this time, not for each trial."""
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of files and folders that are; anything else stays there."""


class Fetcher:
    """Connections to an experiment's machines, made when needed and kept.

    Parameters
    ----------
    machines
        The machines.
    experiment
        The experiment's folder here; its name is the experiment's id.
    """

    def __init__(self, machines: Sequence[Machine], experiment: Path) -> None:
        self.machines = list(machines)
        self.experiment = experiment
        self._stack = ExitStack()
        self._sessions: dict[Machine, paramiko.SFTPClient] = {}
        self._gone: dict[Machine, tuple[float, str]] = {}

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._sessions.clear()

    def trial(self, trial: str) -> Path | None:
        """Bring a trial's files here; returns their folder, or ``None`` where no machine has any.

        Raises
        ------
        ExperimentError
            When no machine that can be reached has it, and some cannot be reached.
        """
        unreachable = []
        for machine in self.machines:
            try:
                session = self._session(machine)
                found = self._find(session, trial)
                if found is not None:
                    target = self.experiment / "environments" / found[1] / "trials" / trial
                    self._copy(session, found[0], target)
                    return target
            except (OSError, EOFError, ExperimentError) as error:
                self._sessions.pop(machine, None)
                words = str(error) if isinstance(error, ExperimentError) else f"{machine}: {error}"
                self._gone.setdefault(machine, (time.monotonic(), words))
                unreachable.append(words)
        if unreachable:
            raise ExperimentError(f"trial {trial} was not brought here: {'; '.join(unreachable)}")
        return None

    def dense(self, trial: str) -> None:
        """Bring the dense baseline here that this trial was pruned from: each machine trains its own."""
        for machine in self.machines:
            try:
                session = self._session(machine)
                if self._find(session, trial) is None:
                    continue
                root = f"nni-experiments/{self.experiment.name}/dense"
                for name, mode in self._entries(session, root):
                    if stat.S_ISDIR(mode):
                        self._copy(session, f"{root}/{name}", self.experiment / "dense" / name)
                return
            except (OSError, EOFError, ExperimentError):
                continue  # another one may have it; without any it is trained again here

    def _session(self, machine: Machine) -> paramiko.SFTPClient:
        since, words = self._gone.get(machine, (0.0, ""))
        if words and time.monotonic() - since < RETRY_SECONDS:
            raise ExperimentError(words)
        self._gone.pop(machine, None)
        if machine not in self._sessions:
            session = self._stack.enter_context(connected(machine)).open_sftp()
            channel = session.get_channel()
            assert channel is not None
            channel.settimeout(SILENCE_SECONDS)
            self._sessions[machine] = session
        return self._sessions[machine]

    def _find(self, session: paramiko.SFTPClient, trial: str) -> tuple[str, str] | None:
        root = f"nni-experiments/{self.experiment.name}/environments"
        for environment, _ in self._entries(session, root):
            folder = f"{root}/{environment}/trials/{trial}"
            try:
                if stat.S_ISDIR(session.lstat(folder).st_mode or 0):
                    return folder, environment
            except FileNotFoundError:
                continue
        return None

    @staticmethod
    def _entries(session: paramiko.SFTPClient, folder: str) -> Iterator[tuple[str, int]]:
        try:
            entries = session.listdir_attr(folder)
        except FileNotFoundError:
            return
        for entry in entries:
            if SAFE.fullmatch(entry.filename):
                yield entry.filename, session.lstat(f"{folder}/{entry.filename}").st_mode or 0

    def _copy(self, session: paramiko.SFTPClient, source: str, target: Path) -> None:
        """Copy the regular files of one folder; links and folders stay there.

        The folder is here with all of them or not at all, so that one that was cut off is brought again.
        """
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, mode in self._entries(session, source):
            size = session.lstat(f"{source}/{name}").st_size or 0
            if stat.S_ISREG(mode) and size <= LARGEST:
                session.get(f"{source}/{name}", str(part / name))
        target.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.replace(target / file.name)
        part.rmdir()
