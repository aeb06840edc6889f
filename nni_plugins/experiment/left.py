"""Processes that an earlier manager left behind: found by NNI's variables in their environment, and ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

END_SECONDS = 10.0


def end(find: Callable[[], list[psutil.Process]], seconds: float = END_SECONDS) -> tuple[list[int], list[int]]:
    """End what `find` finds, and finds again: a shell that is ended may have started one more.

    Parameters
    ----------
    find
        Looks for processes; this one and those above it are left alone.
    seconds
        For all; SIGTERM in the first half of them, SIGKILL in the second.

    Returns
    -------
    The ids of the processes that were found, and of those that are still there.
    """
    import psutil

    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    begun = time.monotonic()
    asked: set[int] = set()
    while left := [process for process in find() if process.pid not in own]:
        late = time.monotonic() - begun
        if late > seconds:
            break
        for process in left:
            with suppress(psutil.Error):
                if late > seconds / 2:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
        asked |= {process.pid for process in left}
        psutil.wait_procs(left, timeout=0.5)
    return sorted(asked), [process.pid for process in left]


def trials(experiment: str, belongs: Callable[[dict[str, str]], bool]) -> list[psutil.Process]:
    """The processes of an experiment's trials, whatever their commands are and whatever those started.

    Parameters
    ----------
    experiment
        Its id.
    belongs
        Which of them count, by their environment.
    """
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            variables = process.environ()
            own = variables.get("NNI_EXP_ID") == experiment and belongs(variables)
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def of_worker(environment: Path) -> list[psutil.Process]:
    """What runs on this machine for a manager elsewhere: NNI's trial keeper, and the trials that it started.

    Parameters
    ----------
    environment
        The worker's folder, ``~/nni-experiments/EXPERIMENT/environments/WORKER``.
    """
    import psutil

    below = str(environment) + os.sep
    keepers = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            own = len(words) > 2 and "trial_keeper" in words[-2] and words[-1].startswith(below)
            if own and process.status() != psutil.STATUS_ZOMBIE:
                keepers.append(process)
    experiment = environment.parent.parent.name
    return keepers + trials(experiment, lambda variables: variables.get("NNI_OUTPUT_DIR", "").startswith(below))
