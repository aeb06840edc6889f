"""Searches as a user runs them: quick trials whose best are fine-tuned at the end, our tuners by class name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_best_of_a_quick_search_are_fine_tuned_once(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    space = {
        "prune.groups.stage1": {"_type": "uniform", "_value": [0.1, 0.8]},
        "prune.pruner": {
            "_type": "choice",
            "_value": [
                {"_name": "magnitude", "prune.arguments.norm": {"_type": "choice", "_value": ["l1", "l2"]}},
                {"_name": "random"},
            ],
        },
    }
    recipe = {"search": {"mode": "quick", "finetune_best": 2}, "speedup": {"recalibrate_batches": 3}}
    tuner = {"className": "nni_plugins.search.OptunaTuner", "codeDirectory": ".", "classArgs": {"seed": 3}}
    folder = write_experiment(space=space, recipe=recipe, maxTrialNumber=5, tuner=tuner)
    output = tmp_path / "report"
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), "--output", str(output), "--json")
    findings = json.loads(answer.stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 5
    tuned = [one["id"] for one in findings["candidates"] if one["note"] == "fine-tuned at the end"]
    assert len(tuned) == 2
    assert findings["chosen"] in tuned
    metrics = json.loads((output / "best" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["finetuned"] is True
    assert metrics["relative_error"] < 1e-5
    experiment = Path(findings["experiment"]["folder"])
    trials = experiment / "environments" / "local-env" / "trials"
    for name in tuned:
        assert json.loads((trials / name / "metrics.json").read_text(encoding="utf-8"))["finetuned"] is False
    assert answer.stderr.count("fine-tuning trial") == 2

    again = nni_home.run("nni-plugins", "report", findings["experiment"]["id"], "--output", str(output), "--json")
    assert "fine-tuning trial" not in again.stderr
    assert json.loads(again.stdout)["compact"]["test"] == findings["compact"]["test"]
