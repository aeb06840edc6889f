"""A trial of several processes: ``torchrun`` inside NNI, masks in step, one report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over POSIX sockets")
def test_two_processes_train_one_trial_and_report_once(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    space = {"prune.pruner": {"_type": "choice", "_value": ["dynamic_sparse", "hybrid"]}}
    folder = write_experiment(
        space=space,
        recipe={"train": {"epochs": 4}, "prune": {"sparsity": 0.5, "arguments": {"total_steps": 12}}},
        trialCommand=f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 "
        "-m nni_plugins.trial recipe.yml",
        maxTrialNumber=2,
        trialConcurrency=1,
        tuner={"name": "GridSearch"},
    )
    output = tmp_path / "report"
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), "--output", str(output), "--json")
    findings = json.loads(answer.stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 2, answer.stderr
    assert findings["dense"]["validation"] > 0.5  # two parts of a batch make one step, not two
    here = Path(findings["experiment"]["folder"])
    for trial in findings["candidates"]:
        (found,) = here.glob(f"environments/*/trials/{trial['id']}")
        log = (found / "trial.log").read_text(encoding="utf-8")
        assert log.count("parameters: {'prune.pruner'") == 2  # both processes had the tuner's values
        recipe = yaml.safe_load((found / "recipe.yml").read_text(encoding="utf-8"))
        assert recipe["prune"]["pruner"] == trial["parameters"]["prune.pruner"]
        assert json.loads((found / "metrics.json").read_text(encoding="utf-8"))["relative_error"] < 1e-5
