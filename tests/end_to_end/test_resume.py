"""Going on after a stop: who comes first has the experiment, and its trials have one writer each, whatever they run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from nni_plugins.experiment.alone import manager_of
from tests.end_to_end.test_faults import SPACE, status, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and shells of POSIX")
SHELL = f"""
{sys.executable} heart.py &
wait
echo the shell goes on
"""
HEART = """
import os, signal, time
import nni

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background processes do
parameters = nni.get_next_parameter()
with open(os.path.join(os.environ["NNI_OUTPUT_DIR"], "beats"), "a") as file:
    for _ in range(1200 if os.path.exists("hold") else 40):
        print(os.getpid(), file=file, flush=True)
        time.sleep(0.1)
nni.report_final_result(parameters["x"])
"""


@pytest.fixture
def foreign(write_experiment: Callable[..., Path]) -> Path:
    """An experiment whose trials know nothing of us: a shell, with a child that nobody can interrupt."""
    folder = write_experiment(space=SPACE, trialCommand="bash outer.sh && echo over", maxTrialNumber=3)
    settings = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    (folder / "config.yml").write_text(yaml.safe_dump({**settings, "tuner": {"name": "Random"}}), encoding="utf-8")
    (folder / "outer.sh").write_text(SHELL, encoding="utf-8")
    (folder / "heart.py").write_text(HEART, encoding="utf-8")
    return folder


def beats(experiment: Path) -> dict[str, list[int]]:
    """The processes that wrote into each trial's folder, in the order in which they did."""
    found = experiment.glob("environments/local-env/trials/*/beats")
    return {path.parent.name: [int(line) for line in path.read_text(encoding="utf-8").split()] for path in found}


def killed(nni_home: Any, port: int, folder: Path, also_heir: bool) -> tuple[str, list[psutil.Process]]:
    """Run it until its trials write, and kill its manager; returns its id and the processes of its trials.

    They go on for two minutes unless somebody ends them, and those that are started later for four seconds.
    """
    (folder / "hold").touch()
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))
    until(lambda: len(beats(nni_home.experiments / nni_home.get(port, "experiment")["id"])) == 2)
    (entry,) = nni_home.managers()
    manager = psutil.Process(entry["pid"])
    below = manager.children(recursive=True)
    heirs = [one for one in manager.children() if "read -r sign group" in " ".join(one.cmdline())]
    assert len(heirs) == 1
    hearts = [one for one in below if "heart.py" in one.cmdline()]
    assert len(hearts) == 2
    if also_heir:
        heirs[0].kill()
        time.sleep(0.5)  # the manager does not notice before it starts its next trial
    os.kill(entry["pid"], signal.SIGKILL)
    command.communicate(timeout=300)
    (folder / "hold").unlink()
    return entry["id"], hearts


def one_writer_each(experiment: Path) -> bool:
    """Whether nobody wrote between the lines of another."""
    return all(
        writers == sorted(writers, key=list(dict.fromkeys(writers)).index) for writers in beats(experiment).values()
    )


def test_a_trial_of_any_command_ends_with_a_killed_manager_and_nnictl_beside_us_is_one_too_many(
    nni_home: Any, port: int, foreign: Path
) -> None:
    experiment, hearts = killed(nni_home, port, foreign, also_heir=False)
    _, alive = psutil.wait_procs(hearts, timeout=60)
    assert alive == []
    ours = nni_home.start("nni-plugins", "run", "--resume", experiment, "--port", str(port))
    theirs = nni_home.start("nnictl", "resume", experiment, "--port", str(port + 4))
    theirs.communicate(timeout=300)
    errors = ours.communicate(timeout=400)[1]  # once the experiment is over, or at once
    if manager_of(experiment) is not None:  # theirs
        assert ours.returncode == 1
        assert "goes on with it" in errors or "is being resumed by another process" in errors or "still runs" in errors
        nni_home.wait(port + 4)
        nni_home.run("nnictl", "stop", experiment)
    assert [one["status"] for one in status(nni_home, experiment)["trials"]] == ["SUCCEEDED"] * 3
    assert one_writer_each(nni_home.experiments / experiment)


def test_of_two_that_resume_at_once_one_wins_and_ends_what_was_left(nni_home: Any, port: int, foreign: Path) -> None:
    experiment, hearts = killed(nni_home, port, foreign, also_heir=True)
    assert [one for one in hearts if one.is_running()] == hearts  # nobody ended them
    both = [
        nni_home.start("nni-plugins", "run", "--resume", experiment, "--port", str(port + shift)) for shift in (0, 4)
    ]
    errors = [one.communicate(timeout=400)[1] for one in both]
    assert sorted(one.returncode for one in both) in ([0, 1], [1, 1])  # a foreign trial leaves no model to report on
    lost = [text for text in errors if "is being resumed by another process" in text or "still runs on port" in text]
    assert len(lost) == 1
    assert len(lost[0].strip().splitlines()) == 1
    won = next(text for text in errors if text not in lost)
    assert "ending what the last manager left of its trials" in won
    assert [one for one in hearts if one.is_running()] == []
    assert [one["status"] for one in status(nni_home, experiment)["trials"]] == ["SUCCEEDED"] * 3
    assert one_writer_each(nni_home.experiments / experiment)
    assert manager_of(experiment) is None
