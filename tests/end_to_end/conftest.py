"""A home of its own for NNI, free ports, and the promise that every manager that a test starts is stopped."""

from __future__ import annotations

import json
import os
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

from tests.end_to_end.ports import free_ports

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
NNICTL = """
from nni.experiment import launcher
from nni.tools.nnictl.nnictl import parse_args
check = launcher._check_rest_server
launcher._check_rest_server = lambda port, retry=3, url_prefix=None: check(port, 150, url_prefix)
parse_args()
"""
"""``nnictl`` as it is, but for the four seconds that it gives its server, which a busy machine does not keep."""
TUNER = """
const { setTimeout } = globalThis;
const patient = (call, time, ...rest) => setTimeout(call, String(call).includes('did not connect') ? 150000 : time, ...rest);
globalThis.setTimeout = Object.defineProperties(patient, Object.getOwnPropertyDescriptors(setTimeout));
"""
"""Loaded into the manager that a bare ``nnictl`` starts: it gives its tuner ten seconds."""
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

    def call(self, name: str, *arguments: str) -> dict[str, Any]:
        """How a command of the installation is called by its name."""
        if name != "nnictl":
            return {"args": [str(BIN / name), *arguments], "env": self.environment, "cwd": self.home}
        preload = self.home / "patient.js"
        preload.write_text(TUNER, encoding="utf-8")
        environment = {**self.environment, "NODE_OPTIONS": f"--require {json.dumps(str(preload))}"}
        return {"args": [sys.executable, "-c", NNICTL, *arguments], "env": environment, "cwd": self.home}

    def run(self, *command: str, check: bool = True, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run a command of the installation to its end; `command[0]` is its name."""
        answer = subprocess.run(
            **self.call(*command),
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
            **self.call(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def create(self, config: Path, port: int) -> str:
        """``nnictl create``; returns the experiment's id once it has a trial."""
        self.run("nnictl", "create", "--config", str(config), "--port", str(port))
        while not self.get(port, "trial-jobs"):
            answer = self.get(port, "check-status")
            assert answer["status"] != "ERROR", answer
            time.sleep(0.3)
        return str(self.get(port, "experiment")["id"])

    def resume(self, experiment: str, port: int) -> None:
        """``nnictl resume``."""
        self.run("nnictl", "resume", experiment, "--port", str(port))

    def get(self, port: int, path: str) -> Any:
        """The answer of NNI's REST API."""
        response = requests.get(f"http://127.0.0.1:{port}/api/v1/nni/{path}", timeout=60)
        response.raise_for_status()
        return response.json()

    def wait(self, port: int, wanted: str = "DONE", timeout: float = 400) -> None:
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
        for _ in range(100):
            try:
                return list(json.loads(path.read_text(encoding="utf-8")).values()) if path.exists() else []
            except ValueError:  # it is being written
                time.sleep(0.02)
        raise AssertionError(path.read_text(encoding="utf-8"))

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
    """The first of eight ports that are free."""
    return free_ports(8)


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
