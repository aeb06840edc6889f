"""A home of its own for NNI, free ports, and the promise that every manager that a test starts is stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

BIN = Path(sys.executable).parent
RECIPE: dict[str, Any] = {
    "model": {"name": "small_cnn"},
    "data": {"name": "digits", "limit": 400},
    "train": {"epochs": 2, "learning_rate": 0.05, "threads": 1},
    "prune": {"pruner": "magnitude", "sparsity": 0.5, "target": "macs"},
    "finetune": {"epochs": 2, "learning_rate": 0.02},
    "objective": {"metric": "accuracy", "macs": 0.6},
}
CONFIG: dict[str, Any] = {
    "experimentName": "small",
    "trialCommand": f"{sys.executable} -m nni_plugins.trial recipe.yml",
    "trialCodeDirectory": ".",
    "trialConcurrency": 2,
    "maxTrialNumber": 4,
    "maxTrialDuration": "3m",
    "tuner": {"name": "TPE", "classArgs": {"optimize_mode": "maximize", "seed": 1}},
    "trainingService": {"platform": "local"},
}
SPACE = {
    "prune.sparsity": {"_type": "uniform", "_value": [0.45, 0.7]},
    "finetune.learning_rate": {"_type": "loguniform", "_value": [0.01, 0.05]},
}


@dataclass
class Nni:
    """NNI with a home folder of its own."""

    home: Path
    experiments: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *command: str, check: bool = True, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a command of the installation to its end; `command[0]` is its name."""
        answer = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or answer.returncode == 0, answer.stdout + answer.stderr
        return answer

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command and let it run."""
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def create(self, config: Path, port: int) -> str:
        """``nnictl create``, again if need be: a busy machine does not always keep the times that NNI gives.

        Its server has four seconds to start, its tuner ten.
        """
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            answer = self.run("nnictl", "create", "--config", str(config), "--port", str(port), check=False)
            if answer.returncode == 0:
                experiment = str(self.get(port, "experiment")["id"])
                if self.tuner_came(port):
                    return experiment
                self.run("nnictl", "stop", experiment)
        raise AssertionError(answer.stdout + answer.stderr)

    def resume(self, experiment: str, port: int) -> None:
        """``nnictl resume``, again if need be."""
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            answer = self.run("nnictl", "resume", experiment, "--port", str(port), check=False)
            if answer.returncode == 0:
                return
        raise AssertionError(answer.stdout + answer.stderr)

    def tuner_came(self, port: int) -> bool:
        """Wait for the first trial, or for NNI's word that the tuner was too slow."""
        while not self.get(port, "trial-jobs"):
            answer = self.get(port, "check-status")
            if answer["status"] == "ERROR" and "did not connect" in str(answer["errors"]):
                return False
            assert answer["status"] != "ERROR", answer
            time.sleep(0.3)
        return True

    def get(self, port: int, path: str) -> Any:
        """The answer of NNI's REST API."""
        response = requests.get(f"http://127.0.0.1:{port}/api/v1/nni/{path}", timeout=20)
        response.raise_for_status()
        return response.json()

    def wait(self, port: int, wanted: str = "DONE", timeout: float = 180) -> None:
        """Return when the experiment has this status."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            answer = self.get(port, "check-status")
            if answer["status"] == wanted:
                return
            assert answer["status"] != "ERROR", answer
            time.sleep(0.5)
        raise AssertionError(f"not {wanted} after {timeout:.0f} s: {answer}, {self.get(port, 'trial-jobs')}")

    def managers(self) -> list[dict[str, Any]]:
        """What NNI's list of experiments says."""
        path = self.home / "nni-experiments" / ".experiment"
        return list(json.loads(path.read_text(encoding="utf-8")).values()) if path.exists() else []

    def clean(self) -> None:
        """Stop every process that was started here: by its id, and only those."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for entry in self.managers():
            try:
                manager = psutil.Process(entry["pid"])
                if "node" in manager.name() and str(entry["id"]) in manager.cmdline():
                    children = manager.children(recursive=True)
                    manager.terminate()
                    psutil.wait_procs([manager], timeout=30)
                    for left in [manager, *children]:
                        if left.is_running():
                            left.kill()
            except psutil.Error:
                continue


@pytest.fixture
def nni_home(tmp_path: Path) -> Iterator[Nni]:
    """NNI in a home folder and an experiments folder of its own, emptied of processes afterwards."""
    home, experiments = tmp_path / "home", tmp_path / "experiments"
    home.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NNI_")}
    environment = {
        **inherited,
        "HOME": str(home),
        "USERPROFILE": str(home),
        "OMP_NUM_THREADS": "1",
        "NNI_PLUGINS_EXPERIMENTS_FOLDER": str(experiments),
    }
    nni = Nni(home, experiments, environment)
    try:
        yield nni
    finally:
        nni.clean()


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def write_experiment(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small experiment, changed as it is told, and returns its folder."""

    def write(space: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / "experiment"
        folder.mkdir()
        merged = {key: {**RECIPE.get(key, {}), **(recipe or {}).get(key, {})} for key in {*RECIPE, *(recipe or {})}}
        settings = {
            **CONFIG,
            "searchSpace": space or SPACE,
            "experimentWorkingDirectory": str(tmp_path / "experiments"),
            **config,
        }
        (folder / "recipe.yml").write_text(yaml.safe_dump(merged), encoding="utf-8")
        (folder / "config.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return folder

    return write
