"""``nni-plugins run`` of an architecture search: real NNI, Ctrl-C, ``--resume``, and the models that come out."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

SPACE = """
import torch
from torch import nn
import nni
from nni.nas.nn.pytorch import ModelSpace, MutableConv2d, MutableLinear
from nni_plugins.search import PrunedSpace


class Net(ModelSpace):
    def __init__(self):
        super().__init__()
        width = nni.choice("width", [8, 12])
        self.first = MutableConv2d(1, width, 3, stride=2)
        self.second = MutableConv2d(width, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def space():
    return PrunedSpace(Net, torch.zeros(1, 1, 8, 8), ratios=(0.5, 1.0))
"""
RECIPE = {
    "data": {"name": "digits", "limit": 300},
    "train": {"epochs": 1, "threads": 1},
    "finetune": {"epochs": 1},
}
CONFIG = {
    "experimentName": "architectures",
    "nas": {"space": "net:space", "strategy": {"name": "RegularizedEvolution", "classArgs": {}}, "top": 2},
    "trialConcurrency": 1,
    "maxTrialNumber": 3,
    "trainingService": {"platform": "local"},
}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process")
def test_an_architecture_search_is_stopped_and_goes_on(nni_home: Any, port: int, tmp_path: Path) -> None:
    folder, output = tmp_path / "experiment", tmp_path / "report"
    folder.mkdir()
    (folder / "net.py").write_text(SPACE, encoding="utf-8")
    (folder / "recipe.yml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    arguments = {"population_size": 2, "sample_size": 2, "mutation_prob": 0.5, "seed": 0}
    CONFIG["nas"]["strategy"]["classArgs"] = arguments  # type: ignore[index]
    (folder / "config.yml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    options = ("--port", str(port), "--output", str(output), "--json")
    command = nni_home.start("nni-plugins", "run", str(folder), *options)
    deadline = time.monotonic() + 240
    jobs: list[Any] = []
    while time.monotonic() < deadline:
        assert command.poll() is None, command.communicate()
        try:
            jobs = nni_home.get(port, "trial-jobs")
        except OSError:  # the server is not there yet
            jobs = []
        if any(job["status"] == "SUCCEEDED" for job in jobs) and any(job["status"] == "RUNNING" for job in jobs):
            break
        time.sleep(0.3)
    (entry,) = nni_home.managers()
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=300)
    assert command.returncode == 130, errors
    assert f"--resume {entry['id']}` goes on with it" in errors
    assert "Traceback" not in errors
    assert not psutil.pid_exists(entry["pid"])
    stopped = json.loads(nni_home.run("nni-plugins", "status", entry["id"], "--json").stdout)
    assert {trial["status"] for trial in stopped["trials"]} == {"SUCCEEDED", "UNFINISHED"}
    assert set(stopped["trials"][0]["parameters"]) == {"width", "keep:first", "keep:second"}

    answer = nni_home.run("nni-plugins", "run", str(folder), *options, "--resume", entry["id"])
    findings = json.loads(answer.stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 3
    assert {trial["id"] for trial in stopped["trials"]} <= {one["id"] for one in findings["candidates"]}
    samples = [json.dumps(one["parameters"], sort_keys=True) for one in findings["candidates"]]
    assert len(set(samples)) == 3  # it knows what was tried before it was stopped
    assert findings["relative_error"] < 1e-5
    assert findings["stock"]["same_shapes"]
    assert (output / "pareto.png").is_file()
    assert answer.stderr.count("loaded again in a process of its own") == 2
    assert {path.name for path in (output / "top").iterdir()} == {"1", "2"}
    best = json.loads((output / "top" / "1" / "metrics.json").read_text(encoding="utf-8"))
    assert best["default"] == max(one["default"] for one in findings["candidates"])
    assert not any(psutil.pid_exists(one["pid"]) for one in nni_home.managers() if one["pid"])

    refused = nni_home.run("nni-plugins", "run", str(folder), *options, "--resume", "none", check=False)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("nni-plugins: none: no such experiment")
