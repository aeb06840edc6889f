"""``nni-plugins run``: trials that cannot work, Ctrl-C and resume."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests


def test_trials_that_cannot_work_fail_alone_and_say_why(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    space = {
        "prune.sparsity": {"_type": "choice", "_value": [0.5, 0.98]},
        "finetune.learning_rate": {"_type": "choice", "_value": [0.02, 1e30]},
    }
    recipe = {"prune": {"max_sparsity": 0.6}}
    folder = write_experiment(space=space, recipe=recipe, maxTrialNumber=4, tuner={"name": "GridSearch"})
    output = tmp_path / "report"
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), "--output", str(output), "--json")
    findings = json.loads(answer.stdout)
    by_status = {one["status"]: one for one in findings["candidates"]}
    assert sorted(one["status"] for one in findings["candidates"]) == ["FAILED"] * 3 + ["SUCCEEDED"]
    assert findings["chosen"] == by_status["SUCCEEDED"]["id"]
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in answer.stderr

    status = json.loads(nni_home.run("nni-plugins", "status", "--json").stdout)
    assert status["status"] == "STOPPED"
    for trial in status["trials"]:
        if trial["status"] == "SUCCEEDED":
            continue
        written = json.loads((Path(trial["folder"]) / "failure.json").read_text(encoding="utf-8"))
        assert trial["reason"] == written["reason"]
        assert written["parameters"] == trial["parameters"]
        assert trial["reason"] in (Path(trial["folder"]) / "trial.log").read_text(encoding="utf-8")
        assert trial["reason"] in (output / "report.md").read_text(encoding="utf-8").replace("\\|", "|")
        if trial["parameters"]["prune.sparsity"] == 0.98:
            assert "sparsity 0.98 of macs is out of reach" in trial["reason"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process")
def test_ctrl_c_stops_and_nnictl_resumes(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_experiment(maxTrialNumber=4, trialConcurrency=1)
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            jobs = nni_home.get(port, "trial-jobs")
        except OSError:  # the server is not there yet
            jobs = []
        if any(job["status"] == "SUCCEEDED" for job in jobs) and any(job["status"] == "RUNNING" for job in jobs):
            break
        time.sleep(0.3)
    with pytest.raises(requests.ConnectionError):  # it has no password: from this machine only
        requests.get(f"http://127.0.0.2:{port}/api/v1/nni/check-status", timeout=60)
    (entry,) = nni_home.managers()
    trials = [child for child in psutil.Process(entry["pid"]).children(recursive=True) if "node" not in child.name()]
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=300)
    assert command.returncode == 130
    experiment = entry["id"]
    assert f"nni-plugins run --resume {experiment}" in errors
    assert "Traceback" not in errors
    assert not psutil.pid_exists(entry["pid"])
    _, left = psutil.wait_procs(trials, timeout=120)  # what ends the trials ends after them
    assert not left
    assert nni_home.managers()[0]["status"] == "STOPPED"
    stopped = json.loads(nni_home.run("nni-plugins", "status", experiment, "--json").stdout)
    assert {trial["status"] for trial in stopped["trials"]} == {"SUCCEEDED", "UNFINISHED"}

    nni_home.resume(experiment, port)
    nni_home.wait(port)
    jobs = nni_home.get(port, "trial-jobs")
    assert [job["status"] for job in jobs] == ["SUCCEEDED"] * 4
    before = {trial["id"] for trial in stopped["trials"]}
    assert before <= {job["trialJobId"] for job in jobs}
    nni_home.run("nnictl", "stop", experiment)


def test_a_taken_port_is_one_line(nni_home: Any, write_experiment: Callable[..., Path]) -> None:
    folder = write_experiment()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), check=False)
    assert answer.returncode == 1
    assert answer.stderr == f"nni-plugins: port {port} is taken by another program; choose another one with --port\n"
    assert nni_home.managers() == []
