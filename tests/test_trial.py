"""The trial process: outside NNI as inside, and its failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
model: {name: small_cnn}
data: {name: digits, limit: 300}
train: {epochs: 1, threads: 1}
prune: {sparsity: SPARSITY, target: macs, max_sparsity: 0.6}
finetune: {epochs: 2}
"""


def run_trial(folder: Path, sparsity: str) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yml").write_text(RECIPE.replace("SPARSITY", sparsity), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NNI_")}
    return subprocess.run(
        [sys.executable, "-m", "nni_plugins.trial", "recipe.yml"],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_outside_nni_the_recipe_runs_as_it_stands(tmp_path: Path) -> None:
    answer = run_trial(tmp_path, "0.5")
    assert answer.returncode == 0, answer.stderr
    output = tmp_path / "outputs" / "trial"
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert next(iter(metrics)) == "default"
    assert metrics["macs"] <= 0.51 * metrics["dense"]["macs"]
    assert answer.stdout.count("Intermediate result") == 2
    assert answer.stdout.count("Final result") == 1
    assert not (output / "failure.json").exists()
    assert (tmp_path / "outputs" / "dense").is_dir()


@pytest.mark.parametrize(
    ("sparsity", "reason"), [("1.5", "prune.sparsity is 1.5"), ("0.98", "sparsity 0.98 of macs is out of reach")]
)
def test_what_cannot_work_is_one_line_in_the_folder(tmp_path: Path, sparsity: str, reason: str) -> None:
    answer = run_trial(tmp_path, sparsity)
    assert answer.returncode == 1
    written = json.loads((tmp_path / "outputs" / "trial" / "failure.json").read_text(encoding="utf-8"))
    assert reason in written["reason"]
    assert "\n" not in written["reason"]
    assert written["reason"] == answer.stderr.strip().splitlines()[-1]
    assert "Traceback" not in answer.stderr
