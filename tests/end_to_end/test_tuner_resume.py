"""An experiment's manager is killed and resumed: the tuner has every trial once, and its front is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nni_plugins.search.journal import Journal

TRIALS = 9
GROUPS = ("layer1", "layer2.0.conv1", "layer2.0.conv2", "layer3")
TRIAL = """
import time, nni_plugins, nni
values = nni.get_next_parameter()
sparsity = [value for value in values.values()]
time.sleep(1)
accuracy = 1 - sum((s - 0.2 * i) ** 2 for i, s in enumerate(sparsity)) / 4
nni.report_final_result({'default': accuracy, 'accuracy': accuracy, 'macs': 1 - sum(sparsity) / 4})
"""
RECIPE = {"model": {"name": "resnet8"}, "prune": {"target": "channels", "sparsity": 0.4}, "objective": {"macs": 0.5}}
SPACE = {f"prune.groups.{name}": {"_type": "uniform", "_value": [0.0, 0.8]} for name in GROUPS}
TWO = [{"name": "accuracy", "direction": "maximize"}, {"name": "macs", "direction": "minimize"}]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Optuna", {"sampler": "nsga2", "objectives": TWO, "sampler_args": {"population_size": 4}, "seed": 0}),
        ("AMC", {"recipe": "recipe.yml", "warmup": 4, "seed": 0}),
    ],
)
def test_a_killed_manager_loses_nothing(
    name: str,
    arguments: dict[str, Any],
    nni_home: Any,
    port: int,
    write_experiment: Callable[..., Path],
    tmp_path: Path,
) -> None:
    nni_home.environment["NNI_CONFIG_DIR"] = str(tmp_path / "nni")
    code = "from nni_plugins.search.registration import register_all; register_all()"
    subprocess.run([sys.executable, "-c", code], env=nni_home.environment, check=True, timeout=300)
    folder = write_experiment(
        SPACE,
        RECIPE,
        trialCommand=f"{sys.executable} trial.py",
        maxTrialNumber=TRIALS,
        tuner={"name": name, "classArgs": arguments},
    )
    (folder / "trial.py").write_text(TRIAL, encoding="utf-8")
    experiment = start(nni_home, port, "create", "--config", str(folder / "config.yml"))
    wait_for(lambda: finished(nni_home, port) >= 4)
    manager = psutil.Process(nni_home.managers()[0]["pid"])
    others = manager.children(recursive=True)
    manager.kill()
    psutil.wait_procs([manager], timeout=60)
    for process in others:  # trials that run on are not what this is about
        with suppress(psutil.NoSuchProcess):
            process.kill()

    assert start(nni_home, port, "resume", experiment) == experiment
    nni_home.wait(port)
    jobs = nni_home.get(port, "trial-jobs")
    assert [job["status"] for job in jobs] == ["SUCCEEDED"] * TRIALS
    home = tmp_path / "experiments" / experiment
    results = [json.loads(json.loads(job["finalMetricData"][0]["data"])) for job in jobs]
    parameters = [json.loads(job["hyperParameters"][-1])["parameters"] for job in jobs]
    assert len({json.dumps(one, sort_keys=True) for one in parameters}) == TRIALS  # it did not begin again

    (journal,) = (home / "checkpoint").glob("*.jsonl")
    wait_for(lambda: len(Journal(journal).done()) == TRIALS)  # NNI is done a moment before its tuner
    tuner = reread(name, arguments, home, folder)
    done = tuner.journal.done()
    assert sorted(json.dumps(r.value, sort_keys=True) for r in done) == sorted(
        json.dumps(one, sort_keys=True) for one in results
    )
    if name == "Optuna":
        front = {(one["accuracy"], one["macs"]) for one in results if not any(beats(two, one) for two in results)}
        wait_for(lambda: pareto(home)["finished"] == TRIALS)
        state = pareto(home)
        assert {(one["values"]["accuracy"], one["values"]["macs"]) for one in state["front"]} == front
    else:
        assert sorted(episode.reward for episode in tuner.memory) == sorted(one["default"] for one in results)
        assert (home / "checkpoint" / "amc.safetensors").is_file()
        assert all(tuner.environment.load([one[n] for n in tuner.environment.names]) <= 1.0001 for one in parameters)


def pareto(home: Path) -> Any:
    return json.loads((home / "pareto.json").read_text(encoding="utf-8"))


def reread(name: str, arguments: dict[str, Any], home: Path, folder: Path) -> Any:
    """The tuner as a third process would find it."""
    from nni_plugins.search import AMCTuner, OptunaTuner

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNI_CHECKPOINT_DIRECTORY", str(home / "checkpoint"))
        patch.chdir(folder)
        tuner: Any = AMCTuner(**arguments) if name == "AMC" else OptunaTuner(**arguments)
        tuner.update_search_space(SPACE)
    return tuner


def start(nni_home: Any, port: int, *command: str) -> str:
    """``nnictl create`` or ``resume``; returns the experiment's id once a further trial has ended."""
    nni_home.run("nnictl", *command, "--port", str(port))
    before = finished(nni_home, port)
    wait_for(lambda: finished(nni_home, port) > before or status(nni_home, port) in ("ERROR", "DONE"))
    assert status(nni_home, port) != "ERROR", nni_home.get(port, "check-status")
    return str(nni_home.get(port, "experiment")["id"])


def status(nni_home: Any, port: int) -> str:
    return str(nni_home.get(port, "check-status")["status"])


def beats(two: dict[str, float], one: dict[str, float]) -> bool:
    return two != one and two["accuracy"] >= one["accuracy"] and two["macs"] <= one["macs"]


def finished(nni_home: Any, port: int) -> int:
    return sum(job["status"] == "SUCCEEDED" for job in nni_home.get(port, "trial-jobs"))


def wait_for(happens: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, os.times()
        time.sleep(0.3)
