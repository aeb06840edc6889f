"""The main job itself: the digits experiment as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "digits"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_digits_experiment_finds_a_compact_model(nni_home: Any, port: int, tmp_path: Path) -> None:
    output = tmp_path / "report"
    command = ("nni-plugins", "run", str(EXPERIMENT), "--port", str(port), "--output", str(output), "--json")
    findings = json.loads(nni_home.run(*command, timeout=1100).stdout)
    dense, compact = findings["dense"], findings["compact"]
    assert len(findings["candidates"]) == 20
    assert compact["macs"] <= 0.5 * dense["macs"]
    assert findings["relative_error"] < 1e-5
    assert compact["test"] >= dense["test"] - 0.015
    assert findings["stock"]["same_shapes"]
    assert findings["stock"]["max_error"] < 1e-4
    assert {path.name for path in output.iterdir()} >= {"report.md", "report.json", "pareto.png", "best"}
