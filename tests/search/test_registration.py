"""NNI knows the tuners by name, in a configuration folder of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nni_plugins.search.errors import SearchError
from nni_plugins.search.registration import META, check_tuner, register_all, registered


def nnictl(folder: Path, *command: str) -> str:
    environment = {**os.environ, "NNI_CONFIG_DIR": str(folder), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [str(Path(sys.executable).parent / "nnictl"), *command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_nnictl_registers_and_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = nnictl(tmp_path, "algo", "register", "--meta", str(META / "amc.yml"))
    assert "AMC registered" in answer
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path))
    assert registered() == {"AMC": True, "LeGR": False, "Optuna": False}
    assert register_all() == ["AMC", "LeGR", "Optuna"]
    lines = nnictl(tmp_path, "algo", "list").splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines if "user" in line}
    assert set(rows) == {"AMC", "LeGR", "Optuna"}
    assert rows["LeGR"][4:6] == ["LeGRTuner", "nni_plugins.search.legr"]


def test_they_are_made_by_name_with_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path))
    with pytest.raises(SearchError, match="not registered") as caught:
        check_tuner("legr", None, {})
    assert str(META / "legr.yml") in str(caught.value)
    assert all((META / f"{name.lower()}.yml").is_file() for name in register_all())
    from nni.tools.package_utils.tuner_factory import create_builtin_class_instance, create_validator_instance

    made: Any = create_builtin_class_instance("optuna", {"sampler": "nsga2", "seed": 3}, "tuners")
    made.update_search_space({"x": {"_type": "uniform", "_value": [0, 1]}})
    assert 0 <= made.generate_parameters(0)["x"] <= 1
    assert create_builtin_class_instance("AMC", {"recipe": "recipe.yml"}, "tuners").name == "amc"
    for name in ("AMC", "LeGR", "Optuna"):
        with pytest.raises(SearchError, match="nonsense is not a class argument"):
            create_validator_instance("tuners", name).validate_class_args(nonsense=1)
        with pytest.raises(SearchError, match="nonsense is not a class argument"):
            check_tuner(name, None, {"nonsense": 1})
    check_tuner("TPE", None, {"nonsense": 1})  # NNI's own
    check_tuner(None, "optuna_tuner.OptunaTuner", {"sampler": "gp"})


def test_a_tuner_starts_without_torch() -> None:
    code = (
        "import sys, nni_plugins.search.amc, nni_plugins.search.legr, nni_plugins.search.optuna_tuner as o;"
        "o.OptunaTuner(); nni_plugins.search.amc.AMCTuner('recipe.yml'); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.stdout.strip() == "False", answer.stderr
