"""Whatever is wrong with the input, the answer is one line that names it, an exit code, and no traceback."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from nni_plugins.cli import commands
from tests.command.case import Case
from tests.command.wrong import CASES


def contents(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {name for name in found if "__pycache__" not in name}


def baseline(folder: Path) -> set[str]:
    """A dense model that was trained before the mistake could be seen, whole: the next run reads it."""
    return (
        {name for name in contents(folder) if name.startswith("outputs")}
        if any(folder.glob("outputs/dense/*/baseline.json"))
        else set()
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, a home folder in which NNI has run nothing, and no way to start an experiment."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path.parent / "nni"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path.parent))
    monkeypatch.setenv("COLUMNS", "80")  # a line is not broken for it
    monkeypatch.setattr("nni_plugins.experiment.session.followed", started)
    return tmp_path


def started(*_: object) -> None:
    raise AssertionError("the experiment would have started")


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name[:70]) for case in CASES])
def test_wrong_input_is_answered_in_one_line(case: Case, place: Path) -> None:
    case.write(place)
    before = contents(place)
    answer = CliRunner().invoke(commands, shlex.split(case.command), prog_name="nni-plugins")
    said = answer.stderr
    assert answer.exit_code == case.code, (said, answer.stdout)
    assert said.startswith("nni-plugins"), said
    assert said.count("\n") == 1, said
    assert said.endswith("\n"), said
    assert "Traceback" not in said + answer.stdout
    assert not [word for word in case.words if word not in said], said
    assert len(said) < 600, said
    assert contents(place) - before == baseline(place)
    assert not os.path.exists("ran-code")


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) > 0.99 * len(CASES)
    told = {word for case in CASES for word in case.command.split()[:1]}
    assert told >= set(commands.commands) - {"completion"}
