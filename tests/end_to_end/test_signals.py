"""A terminal that is closed, and a user who does not wait: the experiment stops in order, or at once, and goes on later."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nni_plugins.experiment.alone import manager_of
from tests.end_to_end.conftest import BIN
from tests.end_to_end.test_faults import script, status, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")
STUBBORN = """
import os, signal, sys, time
import nni

signal.signal(signal.SIGINT, signal.SIG_IGN)
parameters = nni.get_next_parameter()
time.sleep(600 if os.environ.get("SLOW") else 0)
nni.report_final_result(parameters["x"])
"""


def trials_of(experiment: str) -> list[psutil.Process]:
    """The processes of its trials."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("NNI_EXP_ID") == experiment and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def in_terminal(command: list[str], environment: dict[str, str], folder: Path) -> tuple[int, int]:
    """Start a command that has a terminal of its own; returns its process and the other end of that terminal."""
    import pty

    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(command[0], command, environment)

    def read() -> None:
        with suppress(OSError):
            while os.read(terminal, 4096):
                pass

    threading.Thread(target=read, daemon=True).start()
    return process, terminal


def test_a_closed_terminal_stops_in_order_and_the_second_ctrl_c_at_once(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    folder = script(write_experiment, STUBBORN, maxTrialNumber=2)
    nni_home.environment["SLOW"] = "1"
    command = [str(BIN / "nni-plugins"), "run", str(folder), "--port", str(port)]
    process, terminal = in_terminal(command, nni_home.environment, nni_home.home)
    until(lambda: [one["status"] for one in nni_home.get(port, "trial-jobs")] == ["RUNNING"] * 2)
    (entry,) = nni_home.managers()
    os.close(terminal)
    psutil.Process(process).wait(60)
    told = status(nni_home, entry["id"])
    assert told["status"] == "STOPPED"
    assert told["problem"] == ""  # nobody was killed
    assert told["resume"] == f"nni-plugins run --resume {entry['id']}"
    assert trials_of(entry["id"]) == []

    again = nni_home.start("nni-plugins", "run", "--resume", entry["id"], "--port", str(port))
    left = until(lambda: len(found := trials_of(entry["id"])) >= 2 and found)
    time.sleep(3)  # they have said that they cannot be interrupted
    again.send_signal(signal.SIGINT)
    time.sleep(1.5)  # its trials take five seconds to end
    again.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, errors = again.communicate(timeout=60)
    assert time.monotonic() - begun < 3
    assert again.returncode == 130
    assert f"experiment {entry['id']} was ended at once" in errors
    assert manager_of(entry["id"]) is None
    assert psutil.wait_procs(left, timeout=20)[1] == []

    del nni_home.environment["SLOW"]
    last = nni_home.run("nni-plugins", "run", str(folder), "--resume", entry["id"], "--port", str(port), check=False)
    assert f"{folder / 'config.yml'} is not read again" in last.stderr
    assert [one["status"] for one in status(nni_home, entry["id"])["trials"]] == ["SUCCEEDED"] * 2
