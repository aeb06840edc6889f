"""A manager that is killed with its trials on other machines: there too, each folder has one writer after a resume."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.end_to_end.machines import SSHD, Daemon
from tests.end_to_end.test_faults import SPACE, status, until
from tests.end_to_end.test_remote import left_running, machines, remote  # noqa: F401

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="SSH daemons of POSIX"),
    pytest.mark.skipif(SSHD is None and not os.environ.get("CI"), reason="no sshd here; CI has one"),
]
HEART = """
import os, signal, time
import nni

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background processes do
parameters = nni.get_next_parameter()
with open(os.path.join(os.environ["NNI_OUTPUT_DIR"], "beats"), "a") as file:
    for _ in range(20 if os.path.exists(MARK) else 3000):
        print(os.getpid(), file=file, flush=True)
        time.sleep(0.1)
nni.report_final_result(parameters["x"])
"""


def beats(machine: Daemon) -> dict[str, list[int]]:
    """The processes that wrote into each trial's folder on a machine, in the order in which they did."""
    found = machine.home.glob("nni-experiments/*/environments/*/trials/*/beats")
    return {path.parent.name: [int(line) for line in path.read_text(encoding="utf-8").split()] for path in found}


def hearts(machine: Daemon) -> list[psutil.Process]:
    """The processes of trials that run on a machine."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "heart.py" in process.cmdline() and process.environ().get("HOME") == str(machine.home):
                found.append(process)
    return found


def test_a_killed_manager_leaves_no_second_writer_on_any_machine(
    nni_home: Any,
    port: int,
    write_experiment: Callable[..., Path],
    machines: list[Daemon],  # noqa: F811
    tmp_path: Path,
) -> None:
    mark = tmp_path / "short"
    folder = write_experiment(space=SPACE, maxTrialNumber=3, **remote(machines, "bash outer.sh && echo over"))
    settings = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    (folder / "config.yml").write_text(yaml.safe_dump({**settings, "tuner": {"name": "Random"}}), encoding="utf-8")
    (folder / "outer.sh").write_text(f"{sys.executable} heart.py &\nwait\n", encoding="utf-8")
    (folder / "heart.py").write_text(HEART.replace("MARK", repr(str(mark))), encoding="utf-8")
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))
    silent, speaking = machines
    until(lambda: beats(silent) and beats(speaking))
    before = {machine.port: hearts(machine) for machine in machines}
    assert [len(found) for found in before.values()] == [1, 1]
    (entry,) = nni_home.managers()

    silent.freeze()  # hears nothing of its manager's end, as if that had lost its power
    os.kill(entry["pid"], signal.SIGKILL)
    silent.answer_anew()
    command.communicate(timeout=120)
    _, alive = psutil.wait_procs(before[speaking.port], timeout=40)
    assert alive == []  # by itself
    assert all(one.is_running() for one in before[silent.port])

    mark.touch()
    answer = nni_home.run("nni-plugins", "run", "--resume", entry["id"], "--port", str(port), check=False)
    assert not any(one.is_running() for one in before[silent.port])
    after = status(nni_home, entry["id"])["trials"]
    assert [one["status"] for one in after] == ["SUCCEEDED"] * 3, answer.stderr
    wrote = {name: found for machine in machines for name, found in beats(machine).items()}
    assert wrote.keys() == {one["id"] for one in after}
    assert sorted(len(set(found)) for found in wrote.values()) == [1, 2, 2]
    for name, writers in wrote.items():  # nobody wrote between the lines of another
        assert writers == sorted(writers, key=list(dict.fromkeys(writers)).index), name
    assert not any(process for process in left_running(machines))
