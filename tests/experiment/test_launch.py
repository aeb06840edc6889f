"""What is checked before NNI's manager starts."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from pathlib import Path

import pytest

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.launch import check_home, check_port, find_config, load_config, own_interpreter
from nni_plugins.experiment.session import check_direction
from nni_plugins.experiment.signals import interruptible
from tests.end_to_end.ports import free_ports

CONFIG = """
experimentName: small
searchSpace: {prune.sparsity: {_type: uniform, _value: [0.1, 0.5]}}
trialCommand: python -m nni_plugins.trial recipe.yml
trialCodeDirectory: .
trialConcurrency: 1
maxTrialNumber: 2
tuner: {name: TPE, classArgs: {optimize_mode: maximize}}
trainingService: {platform: local}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text, encoding="utf-8")
    (folder / "recipe.yml").write_text("", encoding="utf-8")  # all fields have defaults
    return path


def test_config_is_found_in_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG)
    assert find_config(tmp_path) == find_config(path) == path
    with pytest.raises(ExperimentError, match="no experiment here"):
        find_config(tmp_path / "nowhere")


def test_command_line_changes_the_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, CONFIG), tmp_path / "experiments", trials=7, concurrency=3)
    assert config.max_trial_number == 7
    assert config.trial_concurrency == 3
    assert config.experiment_working_directory == str((tmp_path / "experiments").resolve())
    assert config.trial_command.startswith(shlex.quote(sys.executable))
    assert config.trial_code_directory == str(tmp_path.resolve())


def test_shipped_experiment_is_accepted() -> None:
    config = load_config(Path(__file__).parents[2] / "experiments" / "digits" / "config.yml")
    assert config.trial_concurrency == 2
    assert "prune.groups.layer1" in config.search_space
    check_direction(config, Path("config.yml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("trialConcurrency: 1", "trialConcurrency: many"), "trialConcurrency is 'many'.*whole number"),
        (("maxTrialNumber", "maxTrialNumbers"), "maxTrialNumbers is not a field.*did you mean maxTrialNumber"),
        (("experimentName: small", "experimentName: [small"), "cannot be read"),
        ((CONFIG, "just words"), "must be a mapping"),
        (("platform: local", "platform: moon"), "platform is 'moon'.*known: local, remote"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ExperimentError, match=message) as caught:
        load_config(write(tmp_path, CONFIG.replace(*change)))
    assert "\n" not in str(caught.value)
    assert "config.yml" in str(caught.value)


@pytest.mark.parametrize("arguments", ["", "optimize_mode: minimize"])
def test_a_tuner_that_minimises_is_refused(tmp_path: Path, arguments: str) -> None:
    path = write(tmp_path, CONFIG.replace("optimize_mode: maximize", arguments))
    with pytest.raises(ExperimentError, match="optimize_mode: maximize"):
        check_direction(load_config(path), path)


def test_only_a_leading_python_is_replaced() -> None:
    quoted = shlex.quote(sys.executable)
    assert own_interpreter("python3 -m nni_plugins.trial r.yml") == f"{quoted} -m nni_plugins.trial r.yml"
    assert own_interpreter("bash python trial.sh") == "bash python trial.sh"
    assert own_interpreter("python3.12 x.py") == "python3.12 x.py"


def test_a_taken_port_is_named_and_a_free_one_passes() -> None:
    with socket.socket() as server:
        port = free_ports()
        server.bind(("127.0.0.1", port))
        server.listen()
        with pytest.raises(ExperimentError, match=f"port {port} is taken by another program.*--port"):
            check_port(port)
    check_port(port)
    with pytest.raises(ExperimentError, match="does not exist"):
        check_port(70000)


def test_the_first_interrupt_waits_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP there")
def test_a_closed_terminal_is_a_stop_unless_nohup_keeps_it_away() -> None:
    with interruptible() as received:
        for _ in range(2):  # the shell and the system say so
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGHUP] * 2
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    check_home()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "file"))
    with pytest.raises(ExperimentError, match=r"NNI keeps its list of experiments there, .* set HOME to"):
        check_home()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_type: uniform", "_type: unifrom", "unsupported type"),
        ("_value: [0.1, 0.5]", "_value: [0.5]", "must have 2 values"),
        ("trainingService: {platform: local}", "", "write trainingService: {platform: local}"),
    ],
)
def test_what_would_kill_the_tuner_is_refused_before_the_start(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(ExperimentError, match=message) as caught:
        load_config(write(tmp_path, CONFIG.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_choices_of_lists_and_null_are_accepted(tmp_path: Path) -> None:
    space = "{train.milestones: {_type: choice, _value: [[0.5], [0.1, 0.5]]}, data.limit: {_type: choice, _value: [null, 9]}}"
    old = "{prune.sparsity: {_type: uniform, _value: [0.1, 0.5]}}"
    assert old in CONFIG
    assert load_config(write(tmp_path, CONFIG.replace(old, space))).search_space


def test_a_recipe_that_is_not_there_is_said_before_the_start(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG)
    (tmp_path / "recipe.yml").unlink()
    with pytest.raises(ExperimentError, match=r"recipe\.yml cannot be read"):
        load_config(path)
