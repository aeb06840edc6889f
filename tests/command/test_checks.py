"""``nni-plugins doctor``: tuners in NNI's list, and servers that others can reach."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from nni_plugins.cli import commands
from nni_plugins.command.checks import all_checks, check_running, check_tuners
from nni_plugins.experiment.manifest import Known


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path / "nni"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_tuners_are_registered_when_asked(config: Path) -> None:
    (before,) = check_tuners()
    assert before.warning
    assert "AMC, LeGR, Optuna: not registered" in before.message
    answer = CliRunner().invoke(commands, ["doctor", "--register", "--port", "18999", "--json"])
    (tuners,) = [one for one in json.loads(answer.stdout) if one["name"] == "tuners"]
    assert not tuners["warning"]
    assert not check_tuners()[0].warning


@pytest.mark.parametrize(("address", "open_to_all"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_server_that_others_can_reach_is_told(
    monkeypatch: pytest.MonkeyPatch, config: Path, address: str, open_to_all: bool
) -> None:
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen()
        port = server.getsockname()[1]
        running = [Known("abc1", "x", "RUNNING", port, config), Known("abc2", "y", "STOPPED", None, config)]
        monkeypatch.setattr("nni_plugins.experiment.manifest.known_experiments", lambda: running)
        (found,) = check_running()
    assert found.ok
    assert found.warning == open_to_all
    assert (f"port {port} is open to whoever" in found.message) == open_to_all
    assert ("nnictl stop abc1" in found.remedy) == open_to_all


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no list\nat all")

    monkeypatch.setattr("nni_plugins.experiment.manifest.known_experiments", fail)
    found = {one.name: one for one in all_checks(config, 18999)}
    assert "the check itself failed (RuntimeError: no list at all)" in found["running"].message
