"""A stranger's own model: one command writes the experiment, the next runs it, the third exports the result."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.conftest import Nni

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""


def test_from_a_file_with_a_model_to_a_compact_one(nni_home: Nni, port: int) -> None:
    (nni_home.home / "net.py").write_text(NET, encoding="utf-8")
    limits = ("--set", "data.limit=300", "--epochs", "2", "--trials", "2")
    made = json.loads(nni_home.run("nni-plugins", "new", "mine", "--model", "net.py:build", *limits, "--json").stdout)
    assert made["files"] == ["README.md", "config.yml", "recipe.yml", "space.yml"]

    answer = nni_home.run("nni-plugins", "run", "mine", "--port", str(port), "--output", "best-of-mine")
    assert "\x1b" not in answer.stdout + answer.stderr  # no colours, no bars in a pipe
    assert "trial" not in answer.stdout.splitlines()[0]
    told = [line for line in answer.stderr.splitlines() if line.startswith("trial ")]
    assert sum("/2 " in line for line in told) == 2
    report = json.loads((nni_home.home / "best-of-mine" / "report.json").read_text(encoding="utf-8"))
    assert report["compact"]["macs"] <= 0.51 * made["macs"]
    assert report["relative_error"] < 1e-5

    files = json.loads(nni_home.run("nni-plugins", "export", "best-of-mine", "--json").stdout)
    assert Path(nni_home.home / files["onnx"]["path"]).is_file()
