"""An experiment over two machines: real SSH daemons on loopback, with keys and home folders of their own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from nni_plugins.experiment.node import events
from tests.end_to_end import test_nas
from tests.end_to_end.machines import SSHD, Daemon, make_daemon
from tests.end_to_end.test_faults import PATIENT, script, status, until

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="SSH daemons of POSIX"),
    pytest.mark.skipif(SSHD is None and not os.environ.get("CI"), reason="no sshd here; CI has one"),
]


@pytest.fixture
def machines(nni_home: Any, tmp_path: Path) -> Iterator[list[Daemon]]:
    """Two machines that the user of `nni_home` knows."""
    found = [make_daemon(tmp_path / f"machine{number}", nni_home.home / ".ssh" / "known_hosts") for number in (1, 2)]
    try:
        for one in found:
            one.start()
        yield found
    finally:
        for one in found:
            one.clean()


def remote(machines: list[Daemon], command: str = "python -m nni_plugins.trial recipe.yml") -> dict[str, Any]:
    """What differs in a remote configuration."""
    return {
        "trialCommand": command,
        "trainingService": {"platform": "remote", "machineList": [one.entry() for one in machines]},
    }


def test_an_experiment_runs_over_two_machines_and_its_files_come_home(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], machines: list[Daemon], tmp_path: Path
) -> None:
    folder = write_experiment(**remote(machines))
    output = tmp_path / "report"
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), "--output", str(output), "--json")
    findings = json.loads(answer.stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 4
    assert findings["compact"]["macs"] <= 0.6 * findings["dense"]["macs"]
    assert (output / "best" / "compact.safetensors").is_file()
    for machine in machines:  # each was looked at, trained a baseline of its own, and ran trials
        assert f"127.0.0.1:{machine.port}: Python" in answer.stderr
        experiment = machine.home / "nni-experiments" / findings["experiment"]["id"]
        assert list(experiment.glob("dense/*/weights.safetensors"))
        assert list(experiment.glob("environments/*/trials/*/compact.safetensors"))
    here = Path(findings["experiment"]["folder"])
    for trial in findings["candidates"]:
        (found,) = here.glob(f"environments/*/trials/{trial['id']}")
        (there,) = (
            path
            for machine in machines
            for path in machine.home.glob(f"nni-experiments/{here.name}/environments/*/trials/{trial['id']}")
        )
        assert (found / "compact.safetensors").read_bytes() == (there / "compact.safetensors").read_bytes()
        assert (found / "trial.log").is_file()
    assert not any(process for process in left_running(machines))


def test_a_machine_that_is_lost_costs_its_running_trial_and_no_more(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], machines: list[Daemon], tmp_path: Path
) -> None:
    folder = write_experiment(recipe={"finetune": {"epochs": 60}}, maxTrialNumber=3, **remote(machines))
    command = nni_home.start(
        "nni-plugins", "run", str(folder), "--port", str(port), "--output", str(tmp_path / "report"), "--json"
    )
    deadline = time.monotonic() + 300
    running: list[Any] = []
    while time.monotonic() < deadline:
        try:
            jobs = nni_home.get(port, "trial-jobs")
        except OSError:
            jobs = []
        running = [job for job in jobs if job["status"] == "RUNNING" and "worker1" in job["logPath"]]
        if running and len(jobs) == 2:
            break
        time.sleep(0.3)
    (lost,) = running
    machines[0].kill()
    output, errors = command.communicate(timeout=400)
    assert command.returncode == 0, errors
    findings = json.loads(output)
    by_id = {one["id"]: one for one in findings["candidates"]}
    assert by_id[lost["trialJobId"]]["status"] == "USER_CANCELED"
    assert [one["status"] for name, one in by_id.items() if name != lost["trialJobId"]] == ["SUCCEEDED"] * 2
    status = json.loads(nni_home.run("nni-plugins", "status", findings["experiment"]["id"], "--json").stdout)
    (reason,) = (trial["reason"] for trial in status["trials"] if trial["id"] == lost["trialJobId"])
    assert reason == f"lost with its machine: the SSH connection to 127.0.0.1:{machines[0].port} ended"
    kinds = [event["kind"] for event in events(Path(findings["experiment"]["folder"]))]
    assert kinds.count("ready") == 2
    assert "lost" in kinds


@pytest.mark.slow
def test_a_machine_that_falls_silent_holds_up_nothing(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], machines: list[Daemon]
) -> None:
    folder = script(write_experiment, PATIENT, maxTrialNumber=6, **remote(machines, "python faulty.py"))
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))
    until(lambda: len([job for job in nni_home.get(port, "trial-jobs") if job["status"] == "SUCCEEDED"]) >= 2)
    machines[0].freeze()
    begun = time.monotonic()
    command.communicate(timeout=240)
    assert time.monotonic() - begun < 150  # NNI by itself waits for ever for the machine's answer
    (entry,) = nni_home.managers()
    told = status(nni_home, entry["id"])["trials"]
    lost = [one for one in told if one["status"] == "USER_CANCELED"]
    assert [one["status"] for one in told if one not in lost] == ["SUCCEEDED"] * (6 - len(lost))
    assert len(lost) <= 2
    for one in lost:
        assert one["reason"].startswith("lost with its machine")
    assert "lost" in [event["kind"] for event in events(nni_home.experiments / entry["id"])]


@pytest.mark.slow
def test_an_architecture_search_runs_over_two_machines(
    nni_home: Any, port: int, machines: list[Daemon], tmp_path: Path
) -> None:
    folder, output = tmp_path / "experiment", tmp_path / "report"
    folder.mkdir()
    (folder / "net.py").write_text(test_nas.SPACE, encoding="utf-8")
    (folder / "recipe.yml").write_text(yaml.safe_dump(test_nas.RECIPE), encoding="utf-8")
    nas = {**test_nas.CONFIG["nas"], "strategy": {"name": "Random"}}
    config = {**test_nas.CONFIG, "nas": nas, "trialConcurrency": 2, **remote(machines)}
    del config["trialCommand"]
    (folder / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["nni-plugins", "run", str(folder), "--port", str(port), "--output", str(output), "--json"]
    findings = json.loads(nni_home.run(*command).stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 3
    assert (output / "top" / "2" / "compact.safetensors").is_file()
    for machine in machines:
        assert list(machine.home.glob("nni-experiments/*/environments/*/trials/*/compact.safetensors"))


@pytest.mark.slow
def test_amc_runs_over_two_machines(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], machines: list[Daemon]
) -> None:
    space = {
        f"prune.groups.{name}": {"_type": "uniform", "_value": [0.0, 0.8]} for name in ("stage1", "stage2", "stage3")
    }
    folder = write_experiment(
        space=space,
        recipe={"search": {"mode": "quick"}, "finetune": {"epochs": 1}, "prune": {"target": "channels"}},
        maxTrialNumber=6,
        tuner={
            "className": "nni_plugins.search.AMCTuner",
            "codeDirectory": ".",
            "classArgs": {"recipe": "recipe.yml", "warmup": 2},
        },
        **remote(machines),
    )
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), "--json")
    findings = json.loads(answer.stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 6
    assert findings["compact"]["macs"] <= 0.6 * findings["dense"]["macs"]
    for machine in machines:
        assert list(machine.home.glob("nni-experiments/*/environments/*/trials/*/metrics.json"))


def left_running(machines: list[Daemon]) -> Iterator[psutil.Process]:
    """Processes of NNI's on the machines, after a while in which they may end."""
    deadline = time.monotonic() + 120
    while True:
        found = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(machine.home) in word for machine in machines for word in process.info["cmdline"] or [])
        ]
        if not found or time.monotonic() > deadline:
            yield from found
            return
        time.sleep(0.5)
