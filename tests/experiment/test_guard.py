"""A trial dies by the signal that NNI reads, does not outlive its manager, and is alone in its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nni_plugins.experiment.guard import only_writer

CHILD = "from nni_plugins.experiment.guard import die_with_manager; die_with_manager(0.05); import time; {rest}"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither of the signals")


def in_nni() -> dict[str, str]:
    return {**os.environ, "NNI_PLATFORM": "local"}


@POSIX
def test_sigint_ends_a_trial_by_signal_and_without_a_traceback() -> None:
    code = CHILD.format(rest="print('ready', flush=True); time.sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-c", code], env=in_nni(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as trial:
        assert trial.stdout is not None
        trial.stdout.readline()
        trial.send_signal(signal.SIGINT)
        _, errors = trial.communicate(timeout=120)
    assert trial.returncode == -signal.SIGINT
    assert errors == ""


@POSIX
def test_a_trial_ends_when_its_manager_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = CHILD.format(rest=f"open({str(pid_file)!r}, 'w').write(str(__import__('os').getpid())); time.sleep(600)")
    manager = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", manager], env=in_nni(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    trial = int(pid_file.read_text())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and Path(f"/proc/{trial}").exists():
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(trial, 0)


def test_a_second_writer_is_refused_with_the_folder_named(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from nni_plugins.experiment.guard import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(TimeoutError, match=str(tmp_path)), only_writer(tmp_path, wait_seconds=0.1):
            pass
        holder.kill()
    with only_writer(tmp_path, wait_seconds=60):
        assert (tmp_path / ".writer.lock").exists()
