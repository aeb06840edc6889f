"""The command line: quick to answer, and one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from nni_plugins.cli import commands, parse_change

COMMANDS = (
    *("new", "run", "status", "report", "compare"),
    *("inspect", "space", "compress", "bench", "export", "doctor"),
)


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(commands, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in which NNI has run nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_help_imports_neither_torch_nor_nni() -> None:
    code = (
        "import sys; from nni_plugins.cli import commands\n"
        "try: commands(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'nni', 'numpy', 'matplotlib', 'rich', 'requests'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert all(name in answer.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    code, text, _ = invoke(name, "--help")
    assert code == 0
    assert "--json" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "nowhere"), "no experiment here"),
        (("status",), "NNI knows no experiment"),
        (("status", "abc"), "no such experiment"),
        (("report", "abc"), "no such experiment"),
        (("compress", "nowhere.yml"), "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(arguments: tuple[str, ...], words: str) -> None:
    code, _, errors = invoke(*arguments)
    assert code == 1
    assert errors.startswith("nni-plugins: ")
    assert words in errors
    assert errors.count("\n") == 1


def test_a_wrong_recipe_field_is_named_with_the_closest_one(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("prune: {sparsty: 0.5}\n", encoding="utf-8")
    code, _, errors = invoke("compress", str(recipe))
    assert code == 1
    assert "recipe.yml: prune.sparsty" in errors
    assert "prune.sparsity" in errors
    recipe.write_text("prune: {sparsity: 0.5}\n", encoding="utf-8")
    code, _, errors = invoke("compress", str(recipe), "--set", "prune.sparsity=2")
    assert code == 1
    assert "prune.sparsity is 2" in errors


def test_changes_are_read_as_yaml() -> None:
    assert parse_change("prune.sparsity=0.7") == ("prune.sparsity", 0.7)
    assert parse_change("model.checkpoint=null") == ("model.checkpoint", None)
    code, _, errors = invoke("compress", "recipe.yml", "--set", "sparsity")
    assert code == 2
    assert "FIELD=VALUE" in errors


def test_status_lists_experiments_as_json(empty_home: Path) -> None:
    assert json.loads(invoke("status", "--all", "--json")[1]) == {"experiments": []}
    manifest = empty_home / "nni-experiments" / ".experiment"
    manifest.parent.mkdir()
    entry = {
        "id": "abcd1234",
        "experimentName": "x",
        "status": "RUNNING",
        "pid": 2**22 - 3,
        "port": 8080,
        "logDir": "/e",
    }
    manifest.write_text(json.dumps({"abcd1234": entry}), encoding="utf-8")
    (listed,) = json.loads(invoke("status", "--all", "--json")[1])["experiments"]
    assert listed == {
        "id": "abcd1234",
        "name": "x",
        "status": "STOPPED",
        "port": None,
        "folder": str(Path("/e/abcd1234")),
    }


@pytest.mark.parametrize("half", ["", '{"abcd1234": {"id": "ab'])
def test_a_list_that_nni_is_writing_is_read_again(empty_home: Path, half: str) -> None:
    manifest = empty_home / "nni-experiments" / ".experiment"
    manifest.parent.mkdir()
    manifest.write_text(half, encoding="utf-8")
    done = threading.Timer(0.1, manifest.write_text, ['{"abcd1234": {"id": "abcd1234"}}', "utf-8"])
    done.start()
    (listed,) = json.loads(invoke("status", "--all", "--json")[1])["experiments"]
    done.join()
    assert listed["id"] == "abcd1234"


def test_compress_writes_the_model_and_says_what_it_found(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "model: {name: small_cnn}\ndata: {name: digits, limit: 300}\ntrain: {epochs: 2, threads: 1}\n"
        "prune: {sparsity: 0.5, target: macs}\nfinetune: {epochs: 1}\n",
        encoding="utf-8",
    )
    output = tmp_path / "out"
    code, text, _ = invoke("compress", str(recipe), "--output", str(output), "--json", "--set", "prune.pruner=random")
    assert code == 0
    findings = json.loads(text)
    assert findings["compact"]["macs"] <= 0.51 * findings["dense"]["macs"]
    assert findings["relative_error"] < 1e-5
    assert findings["stock"]["same_shapes"]
    assert "pruner: random" in findings["recipe"]
    assert (output / "best" / "compact.safetensors").is_file()
    assert "](pareto.png)" in (output / "report.md").read_text(encoding="utf-8")


def test_data_without_a_test_split_are_reported_without_it(tmp_path: Path) -> None:
    (tmp_path / "own_untested.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))\n"
        "def data():\n    x = torch.randn(64, 4)\n    part = [(x, (x[:, 0] > 0).long())]\n    return part, part\n",
        encoding="utf-8",
    )
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "model: {name: 'own_untested:model'}\ndata: {name: 'own_untested:data'}\n"
        "train: {epochs: 1, threads: 1}\nfinetune: {epochs: 1}\nspeedup: {keep_masked: false}\n",
        encoding="utf-8",
    )
    code, text, _ = invoke("compress", str(recipe), "--output", str(tmp_path / "out"), "--json")
    assert code == 0
    assert "NaN" not in text  # Python reads it, other readers of JSON do not
    assert json.loads(text)["compact"]["test"] is None
    assert "There is no test split" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
