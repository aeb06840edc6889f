"""What happens to an experiment, on a real one each: every row of the table in docs/faults.md is a test here or beside it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

FAULTY = """
import os, resource, signal, sys, time
from nni_plugins.trial import as_trial

def work(output, parameters):
    import nni
    parameters.update(nni.get_next_parameter())
    nni.report_intermediate_result(0.5)
    fault = parameters["fault"]
    if fault == "exception":
        raise ValueError("no such layer: layer9")
    if fault == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        bytearray(64 << 30)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "silent":
        sys.exit(0)
    if fault == "own end":  # as torchrun ends when it is stopped
        signal.signal(signal.SIGINT, lambda *_: sys.exit(3))
    if fault in ("slow", "own end"):
        time.sleep(600)
    nni.report_final_result({"nan": float("nan"), "text": "high"}.get(fault, 1.0))

sys.exit(as_trial(work))
"""
PATIENT = """
import os, sys, time
from pathlib import Path
from nni_plugins.trial import as_trial

def work(output, parameters):
    import nni
    parameters.update(nni.get_next_parameter())
    with (output / "writers").open("a") as file:
        print("begin", os.getpid(), time.time(), file=file, flush=True)
        time.sleep(float(os.environ.get("TRIAL_SECONDS", "2")))
        print("end", os.getpid(), time.time(), file=file, flush=True)
    nni.report_final_result(parameters["x"])

sys.exit(as_trial(work))
"""
SPACE = {"x": {"_type": "uniform", "_value": [0, 1]}}


def status(nni_home: Any, experiment: str) -> dict[str, Any]:
    return json.loads(nni_home.run("nni-plugins", "status", experiment, "--json").stdout)


def until(happens: Callable[[], Any], seconds: float = 300) -> Any:
    """What `happens` returns once it is true; NNI's server may not be there yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = happens()
        except (OSError, AssertionError):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.2)


def script(write_experiment: Callable[..., Path], text: str, **config: Any) -> Path:
    """An experiment whose trials are a script."""
    folder = write_experiment(
        **{"trialCommand": f"{sys.executable} faulty.py", "tuner": {"name": "Random"}, "space": SPACE, **config}
    )
    (folder / "faulty.py").write_text(text, encoding="utf-8")
    return folder


def test_a_trial_that_fails_fails_alone_and_says_why(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    expected = {
        "none": ("SUCCEEDED", ""),
        "exception": ("FAILED", "ValueError: no such layer: layer9"),
        "memory": ("FAILED", "MemoryError"),
        "killed": ("FAILED", "it was killed by SIGKILL; the machine may be out of memory"),
        "silent": ("SUCCEEDED", "it ended without a final result"),
        "nan": ("SUCCEEDED", "it reported NaN or infinity, which NNI cannot keep"),
        "text": (
            "SUCCEEDED",
            'it reported "high"; a result must be a number, or a dictionary with a number as "default"',
        ),
        "slow": ("EARLY_STOPPED", "over the time limit (maxTrialDuration: 20 s)"),
        "own end": ("EARLY_STOPPED", "over the time limit (maxTrialDuration: 20 s)"),
    }
    folder = script(write_experiment, FAULTY, maxTrialNumber=len(expected) + 3, maxTrialDuration="20s")
    settings = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    settings["searchSpace"] = {"fault": {"_type": "choice", "_value": list(expected)}}
    settings["tuner"] = {"name": "GridSearch"}
    (folder / "config.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), check=False)
    assert "Traceback" not in answer.stderr
    (entry,) = nni_home.managers()
    told = status(nni_home, entry["id"])
    assert told["exhausted"] == "its tuner tried all there is in its search space: 9 of 12 trials"
    assert told["exhausted"].removeprefix("its") in answer.stderr  # and NNI by itself waits for ever
    assert told["resume"] == ""
    found = {trial["parameters"]["fault"]: trial for trial in told["trials"]}
    assert found.keys() == expected.keys()
    for fault, (word, reason) in expected.items():
        trial = found[fault]
        assert trial["status"] in ((word, "USER_CANCELED") if word == "EARLY_STOPPED" else (word,)), (fault, trial)
        assert trial["reason"].endswith(reason) if reason else trial["reason"] == "", (fault, trial)
        if reason:  # and in its folder and its log as well
            folder = Path(trial["folder"])
            assert json.loads((folder / "failure.json").read_text(encoding="utf-8"))["reason"] == trial["reason"]
            assert reason.split(";")[0] in (folder / "trial.log").read_text(encoding="utf-8")
    assert found["none"]["metrics"] == {"default": 1.0}


def test_a_killed_manager_is_resumed_and_nothing_is_lost(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    folder = script(write_experiment, PATIENT, maxTrialNumber=6)
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))

    def some_ended_and_some_run() -> bool:
        jobs = nni_home.get(port, "trial-jobs")
        words = [job["status"] for job in jobs]
        return words.count("SUCCEEDED") >= 2 and "RUNNING" in words

    until(some_ended_and_some_run)
    (entry,) = nni_home.managers()
    os.kill(entry["pid"], signal.SIGKILL)
    _, errors = command.communicate(timeout=300)
    assert command.returncode == 1
    assert f"the manager of experiment {entry['id']} is gone" in errors
    assert f"nni-plugins run --resume {entry['id']}" in errors
    before = status(nni_home, entry["id"])
    assert before["status"] == "STOPPED"
    assert before["problem"].startswith("its manager ended without being stopped")
    assert before["resume"] == f"nni-plugins run --resume {entry['id']}"
    done = {trial["id"]: trial["metrics"] for trial in before["trials"] if trial["status"] == "SUCCEEDED"}
    cut = {trial["id"] for trial in before["trials"]} - done.keys()
    assert len(done) >= 2
    assert cut

    again = ["nni-plugins", "run", "--resume", entry["id"][:5], "--port", str(port)]
    nni_home.run(*again, "--trials", "7", check=False)  # one more than it was made for
    after = {trial["id"]: trial for trial in status(nni_home, entry["id"])["trials"]}
    assert [trial["status"] for trial in after.values()] == ["SUCCEEDED"] * 7
    assert [trial["sequence"] for trial in after.values()] == list(range(7))  # no number twice
    assert {name: after[name]["metrics"] for name in done} == done  # kept as they were
    assert cut <= after.keys()  # and these started again, under their names
    for trial in after.values():  # with one process at a time in each folder
        lines = (Path(trial["folder"]) / "writers").read_text(encoding="utf-8").split("\n")[:-1]
        owner = None
        for line in lines:
            word, process, _ = line.split()
            assert word == "begin" or process == owner
            owner = process


def test_a_tuner_that_raises_stops_the_experiment_and_resume_goes_on(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    mended = tmp_path / "mended"
    folder = script(write_experiment, PATIENT, maxTrialNumber=4, trialConcurrency=1)
    (nni_home.home / "fragile.py").write_text(
        "import os\n"
        "from nni.tuner import Tuner\n"
        "class Fragile(Tuner):\n"
        "    count = 0\n"
        "    def update_search_space(self, space): pass\n"
        "    def generate_parameters(self, number, **_):\n"
        "        Fragile.count += 1\n"
        f"        if Fragile.count == 3 and not os.path.exists({str(mended)!r}):\n"
        "            raise ValueError('the surrogate is singular')\n"
        "        return {'x': 0.1 * Fragile.count}\n"
        "    def receive_trial_result(self, number, parameters, value, **_): pass\n"
        "    def import_data(self, data): pass\n",
        encoding="utf-8",
    )
    settings = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    settings["tuner"] = {"codeDirectory": str(nni_home.home), "className": "fragile.Fragile"}
    (folder / "config.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), check=False)
    over = time.time()
    assert answer.returncode == 1
    assert "the tuner died: ValueError: the surrogate is singular" in answer.stderr
    (entry,) = nni_home.managers()
    told = status(nni_home, entry["id"])
    assert told["problem"] == "the tuner died: ValueError: the surrogate is singular"
    assert sum(trial["status"] == "SUCCEEDED" for trial in told["trials"]) >= 1
    assert over - max(trial["ended"] for trial in told["trials"]) < 100  # not the two minutes of one that stands still
    mended.touch()
    nni_home.run("nni-plugins", "run", "--resume", entry["id"], "--port", str(port), check=False)
    assert [one["status"] for one in status(nni_home, entry["id"])["trials"]] == ["SUCCEEDED"] * 4


def test_two_experiments_at_once_and_a_database_that_somebody_reads(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    folder = script(write_experiment, PATIENT, maxTrialNumber=5)
    commands = [nni_home.start("nni-plugins", "run", str(folder), "--port", str(port + shift)) for shift in (0, 2)]
    until(lambda: any(job["status"] == "SUCCEEDED" for job in nni_home.get(port, "trial-jobs")))
    until(lambda: nni_home.get(port + 2, "trial-jobs"))
    experiment = str(nni_home.get(port, "experiment")["id"])
    database = sqlite3.connect(nni_home.experiments / experiment / "db" / "nni.sqlite", timeout=30)
    database.execute("begin exclusive")
    time.sleep(6)  # NNI by itself gives up after one second
    database.rollback()
    database.close()
    for command in commands:
        command.communicate(timeout=400)
    entries = nni_home.managers()
    assert len({entry["id"] for entry in entries}) == 2
    for entry in entries:
        assert [one["status"] for one in status(nni_home, entry["id"])["trials"]] == ["SUCCEEDED"] * 5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB; it takes root to make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the file system is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def test_a_full_disk_stops_the_experiment_and_resume_goes_on(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], small_disk: Path
) -> None:
    folder = script(write_experiment, PATIENT, maxTrialNumber=5, trialConcurrency=1)
    command = nni_home.start(
        "nni-plugins", "run", str(folder), "--port", str(port), "--experiments-folder", str(small_disk)
    )
    until(lambda: any(job["status"] == "SUCCEEDED" for job in nni_home.get(port, "trial-jobs")))
    filler = small_disk / "filler"
    fill(filler)
    _, errors = command.communicate(timeout=400)
    assert command.returncode == 1
    assert f"the disk of {small_disk}" in errors
    assert "Traceback" not in errors
    (entry,) = nni_home.managers()
    told = status(nni_home, entry["id"])
    assert "is full" in told["problem"]
    done = {one["id"]: one["metrics"] for one in told["trials"] if one["status"] == "SUCCEEDED"}
    assert done
    filler.unlink()
    answer = nni_home.run("nni-plugins", "run", "--resume", entry["id"], "--port", str(port), check=False)
    after = {one["id"]: one for one in status(nni_home, entry["id"])["trials"]}
    assert {name: after[name]["metrics"] for name in done} == done, answer.stderr
    assert sum(one["status"] == "SUCCEEDED" for one in after.values()) >= 4, answer.stderr
