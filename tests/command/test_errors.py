"""How commands end: exit codes, defects, Ctrl-C, pipes that close and disks that are full."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nni_plugins.cli import commands
from nni_plugins.command.errors import DEBUG, EXTRAS
from nni_plugins.experiment.errors import ExperimentError, Interrupted
from tests.command.wrong import CASES

COMMAND = [sys.executable, "-m", "nni_plugins.cli"]


def status(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str) -> Any:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("nni_plugins.experiment.status.experiment_status", fail)
    return CliRunner().invoke(commands, [*options, "status"], prog_name="nni-plugins")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ExperimentError("two\nlines"), 1, "nni-plugins: two lines\n"),
        (Interrupted("experiment ab is stopped"), 130, "nni-plugins: experiment ab is stopped\n"),
        (KeyboardInterrupt(), 130, "nni-plugins: stopped by Ctrl-C\n"),
        (PermissionError(13, "Permission denied", "/etc/x"), 1, "nni-plugins: /etc/x: Permission denied; give "),
        (OSError(28, "No space left on device", "/data/x"), 1, "nni-plugins: /data/x: No space left on device; free "),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 1, "nni-plugins: this needs the package onnx: "),
        (MemoryError(), 1, "nni-plugins: out of memory; "),
    ],
)
def test_each_end_has_its_code_and_its_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    answer = status(monkeypatch, error)
    assert (answer.exit_code, answer.stdout) == (code, "")
    assert answer.stderr.startswith(line)
    assert answer.stderr.count("\n") == 1


def test_extras_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for extra, modules in EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]", text, re.MULTILINE)
        assert all(module in listed.replace("-", "_") for module in modules)


def test_a_defect_names_the_file_with_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer = status(monkeypatch, KeyError("sparsity\nand more"))
    assert answer.exit_code == 70
    assert answer.stderr.count("\n") == 1
    assert "a defect of nni-plugins (KeyError: 'sparsity" in answer.stderr
    assert "--debug" in answer.stderr
    (path,) = tmp_path.iterdir()
    assert str(path) in answer.stderr
    assert "in experiment_status" not in answer.stderr
    assert re.search(r"Traceback[\s\S]+in fail[\s\S]+KeyError", path.read_text(encoding="utf-8"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("how", ["--debug", DEBUG])
def test_tracebacks_are_shown_to_whoever_asks(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv(DEBUG, "1" if how == DEBUG else "0")
    answer = status(monkeypatch, ExperimentError("no trials"), *([how] if how.startswith("--") else []))
    assert answer.exit_code == 1
    assert "Traceback" in answer.stderr
    assert answer.stderr.endswith("nni-plugins: no trials\n")


def test_ctrl_c_while_a_model_trains(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time, torch\n"
        "def net(): return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "class Rows:\n"
        "    def __len__(self): return 1000\n"
        "    def __iter__(self):\n"
        "        for _ in range(1000):\n"
        "            pathlib.Path('trains').touch(); time.sleep(0.05)\n"
        "            yield torch.randn(4, 4), torch.zeros(4, dtype=torch.long)\n"
        "def loaders():\n"
        "    part = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]\n"
        "    return Rows(), part, part\n",
        encoding="utf-8",
    )
    (tmp_path / "r.yml").write_text("model: {name: 'slow:net'}\ndata: {name: 'slow:loaders'}\n", encoding="utf-8")
    process = subprocess.Popen(
        [*COMMAND, "compress", "r.yml"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell runs with & does not hear it
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "trains").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert (text, errors) == ("", "nni-plugins: stopped by Ctrl-C\n")


def test_a_reader_that_has_enough_and_a_disk_that_is_full(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [*COMMAND, "completion", "bash"]
    reading, writing = os.pipe()
    os.close(reading)
    answer = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=180)
    os.close(writing)
    assert (answer.returncode, answer.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        answer = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=180)
    assert answer.returncode == 1
    assert answer.stderr.startswith("nni-plugins: No space left on device")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["work: checkpoint with code", "config: unknown tuner"])
def test_a_process_of_its_own_says_one_line_too(name: str, tmp_path: Path) -> None:
    """No warning and no log line of a library beside it."""
    case = next(one for one in CASES if one.name == name)
    case.write(tmp_path)
    environment = {**os.environ, "HOME": str(tmp_path)}
    answer = subprocess.run(
        [*COMMAND, *case.command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == case.code
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1, answer.stderr
    assert all(word in answer.stderr for word in case.words)
