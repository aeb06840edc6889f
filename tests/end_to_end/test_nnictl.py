"""A real ``nnictl`` experiment, from config.yml to DONE, read through NNI's REST API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import yaml

FILES = ("compact.safetensors", "masks.safetensors", "plan.json", "metrics.json", "recipe.yml")


def test_experiment_runs_to_done_and_its_results_are_in_nni(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_experiment()
    experiment = nni_home.create(folder / "config.yml", port)
    root = tmp_path / "experiments" / experiment
    while not any(job["status"] == "SUCCEEDED" for job in nni_home.get(port, "trial-jobs")):
        time.sleep(0.2)
    early = json.loads(nni_home.run("nni-plugins", "report", "--output", str(tmp_path / "early"), "--json").stdout)
    if early["state"] == "running":  # on a quick machine it may be over
        assert early["compact"]["test"] is None
        assert not (root / "test.json").exists()
        assert "still running" in (tmp_path / "early" / "report.html").read_text(encoding="utf-8")
    nni_home.wait(port)

    jobs = nni_home.get(port, "trial-jobs")
    assert [job["status"] for job in jobs] == ["SUCCEEDED"] * 4
    intermediate = [one for one in nni_home.get(port, "metric-data") if one["type"] == "PERIODICAL"]
    for job in jobs:
        (final,) = job["finalMetricData"]
        text = json.loads(final["data"])
        metrics = json.loads(text)
        assert text.startswith('{"default"')
        assert {"accuracy", "macs", "params", "latency_ms", "max_error"} <= set(metrics)
        assert metrics["relative_error"] < 1e-5
        assert all(type(value) in (int, float) for value in metrics.values())  # what the web page can draw
        assert metrics["excess"] == 0
        assert sum(one["trialJobId"] == job["trialJobId"] for one in intermediate) == 2
        # what NNI shows as a trial's parameters is what the trial worked with
        output = Path(job["logPath"])
        assert all((output / name).is_file() for name in FILES)
        left = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        assert left["macs"] == metrics["macs"] <= 0.6 * left["dense"]["macs"]
        shown = json.loads(job["hyperParameters"][-1])["parameters"]
        recipe = yaml.safe_load((output / "recipe.yml").read_text(encoding="utf-8"))
        assert recipe["prune"]["sparsity"] == shown["prune.sparsity"]
        assert recipe["finetune"]["learning_rate"] == shown["finetune.learning_rate"]

    # the dense model was trained once, by one of the trials
    assert len(list((root / "dense").glob("*/weights.safetensors"))) == 1
    logs = [(Path(job["logPath"]) / "trial.log").read_text(encoding="utf-8") for job in jobs]
    assert sum("dense epoch 2/2" in log for log in logs) == 1

    # a bare nnictl listens on every address, without a password; `nni-plugins run` does not
    assert requests.get(f"http://127.0.0.2:{port}/api/v1/nni/check-status", timeout=60).ok
    status = json.loads(nni_home.run("nni-plugins", "status", "--json").stdout)
    assert (status["id"], status["status"], status["port"]) == (experiment, "DONE", port)

    nni_home.run("nnictl", "stop", experiment)
    output = tmp_path / "report"
    answer = json.loads(nni_home.run("nni-plugins", "report", experiment, "--output", str(output), "--json").stdout)
    assert answer["compact"]["macs"] <= 0.6 * answer["dense"]["macs"]
    assert answer["stock"]["same_shapes"]
    assert answer["stock"]["max_error"] < 1e-5
    assert answer["stock"]["note"] == ""
    assert {path.name for path in output.iterdir()} == {
        *("report.html", "report.md", "report.json", "pareto.png", "plots", "best")
    }
    assert (output / "best" / "compact.safetensors").is_file()
    assert [len(one["curve"]) for one in answer["candidates"]] == [2] * 4
    assert answer["layers"][0]["kept"] < answer["layers"][0]["size"]
    assert answer["tested"] == [answer["chosen"]]

    # the same from a folder that was moved, in which NNI's paths lead nowhere
    moved = tmp_path / "moved"
    root.rename(moved)
    again = json.loads(nni_home.run("nni-plugins", "report", str(moved), "--output", str(output), "--json").stdout)
    assert again["notes"] == []
    for name in ("chosen", "layers", "environment", "tested", "state"):
        assert again[name] == answer[name]
    assert again["compact"]["test"] == answer["compact"]["test"]


def test_trials_that_start_together_keep_their_own_parameters(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    """NNI hands parameters to whoever asks first; here the trial with the lower number always asks last."""
    folder = write_experiment(trialCommand=f"{__import__('sys').executable} late.py", maxTrialNumber=4)
    (folder / "late.py").write_text(
        "import os, time, nni_plugins\n"
        "time.sleep(3 if int(os.environ['NNI_TRIAL_SEQ_ID']) % 2 == 0 else 0)\n"
        "import nni\n"
        "value = nni.get_next_parameter()['prune.sparsity']\n"
        "time.sleep(1)\n"
        "nni.report_final_result({'default': value})\n",
        encoding="utf-8",
    )
    nni_home.create(folder / "config.yml", port)
    nni_home.wait(port)  # without the remedy the tuner dies, and the experiment never ends
    for job in nni_home.get(port, "trial-jobs"):
        shown = json.loads(job["hyperParameters"][-1])["parameters"]["prune.sparsity"]
        assert json.loads(json.loads(job["finalMetricData"][0]["data"]))["default"] == shown


def test_an_assessor_can_stop_a_trial(nni_home: Any, port: int, write_experiment: Callable[..., Path]) -> None:
    """It sees each epoch, and the trial that it stops counts as stopped, not as failed.

    NNI calls it USER_CANCELED: it notes that a trial is to be stopped early only after the trial has ended.
    """
    folder = write_experiment(
        recipe={"finetune": {"epochs": 200}},
        maxTrialNumber=1,
        assessor={"codeDirectory": str(nni_home.home), "className": "strict.Strict"},
    )
    (nni_home.home / "strict.py").write_text(
        "from nni.assessor import Assessor, AssessResult\n"
        "class Strict(Assessor):\n"
        "    def assess_trial(self, trial, history):\n"
        "        return AssessResult.Bad if len(history) >= 2 else AssessResult.Good\n",
        encoding="utf-8",
    )
    nni_home.create(folder / "config.yml", port)
    nni_home.wait(port)
    (job,) = nni_home.get(port, "trial-jobs")
    assert job["status"] in ("EARLY_STOPPED", "USER_CANCELED")
    assert 2 <= len(nni_home.get(port, "metric-data")) < 200
    assert not (Path(job["logPath"]) / "failure.json").exists()


def test_status_says_that_the_tuner_of_a_bare_nnictl_died(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    (nni_home.home / "broken.py").write_text(
        "from nni.tuner import Tuner\n"
        "class Broken(Tuner):\n"
        "    def update_search_space(self, space): pass\n"
        "    def generate_parameters(self, number, **_): raise ValueError('the surrogate is singular')\n"
        "    def receive_trial_result(self, number, parameters, value, **_): pass\n",
        encoding="utf-8",
    )
    folder = write_experiment(tuner={"codeDirectory": str(nni_home.home), "className": "broken.Broken"})
    nni_home.run("nnictl", "create", "--config", str(folder / "config.yml"), "--port", str(port))
    deadline = time.monotonic() + 300
    problem = ""
    while not problem and time.monotonic() < deadline:
        time.sleep(0.5)
        told = json.loads(nni_home.run("nni-plugins", "status", "--json").stdout)
        problem = told["problem"]
    assert told["status"] == "RUNNING"  # NNI notices nothing
    assert problem == "the tuner died: ValueError: the surrogate is singular"
