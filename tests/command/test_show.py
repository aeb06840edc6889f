"""Help by example, results on standard output, progress on standard error with the time left, silence in a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from nni_plugins.cli import commands
from nni_plugins.command.progress import Epochs
from nni_plugins.command.show import progress, results
from nni_plugins.experiment.follow import LiveDisplay, clock, time_left
from nni_plugins.experiment.trials import Trial
from tests.command.test_complete import seconds_of

NET = (
    "from torch import nn\ndef net():\n    print('a word of the user')\n"
    "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))\n"
)
RECIPE = (
    "model: {name: 'net:net'}\ndata: {limit: 100}\ntrain: {epochs: 2, threads: 1}\nfinetune: {epochs: 1}\n"
    "speedup: {keep_masked: false}\n"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path / "nni"))
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    (tmp_path / "r.yml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_help_teaches_by_example(name: str) -> None:
    text = CliRunner().invoke(commands, [name, "--help"], prog_name="nni-plugins").stdout
    examples = text.partition("Examples:\n")[2].strip().splitlines()
    assert 1 <= len(examples) <= 4
    assert all(f"nni-plugins {name}" in line for line in examples)
    assert text.index("Common options:") < text.index("Examples:")
    command = commands.commands[name]
    assert all(param.help for param in command.params if getattr(param, "section", "") == "Common options")


def test_examples_name_options_that_there_are() -> None:
    for name, command in commands.commands.items():
        known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"--help"}
        for line in getattr(command, "examples", ()):
            assert set(re.findall(r"(?<= )--[a-z-]+", line.partition("  # ")[0])) <= known, (name, line)


def test_every_command_has_its_place_in_the_help() -> None:
    text = CliRunner().invoke(commands, ["--help"], prog_name="nni-plugins").stdout
    assert "Commands:" not in text  # what stands in no section
    assert all(re.search(rf"^  {name} .*[^.]\.$", text, re.MULTILINE) for name in commands.commands)
    for code in ("0 done", "1 a mistake", "2 wrong", "70 a defect", "130 Ctrl-C"):
        assert code in text.replace("\n  ", " ")


@pytest.mark.alone
def test_help_is_quick() -> None:
    command = [sys.executable, "-m", "nni_plugins.cli", "--help"]
    runs = [seconds_of(command, dict(os.environ)) for _ in range(3)]
    assert all(answer.returncode == 0 for _, answer in runs)
    assert min(seconds for seconds, _ in runs) < 1.5  # 0.3 s on a machine that does nothing else


@pytest.mark.parametrize(
    "command",
    [
        "status --all",
        "doctor --port 18999",
        "space net.py:net --input 1x1x8x8",
        "inspect net.py:net --input 1x1x8x8 --no-latency",
        "bench net.py:net --input 1x1x8x8 --runtimes eager --batches 1 --seconds 0.05",
        "export net.py:net --input 1x1x8x8 --format pt2",
        "compress r.yml",
        "new mine --model net.py:net",
    ],
)
def test_json_is_one_document_and_nothing_beside_it(place: Path, command: str) -> None:
    answer = CliRunner().invoke(commands, [*command.split(), "--json"], prog_name="nni-plugins")
    assert answer.exit_code == 0, answer.stderr
    assert isinstance(json.loads(answer.stdout), (dict, list))
    assert "\x1b" not in answer.stdout + answer.stderr
    said = set(answer.stderr.splitlines()) - {"a word of the user"}
    assert not said


def test_a_pipe_gets_the_result_and_progress_only_if_asked(place: Path) -> None:
    quiet = CliRunner().invoke(commands, ["compress", "r.yml"], prog_name="nni-plugins")
    assert quiet.exit_code == 0, quiet.stderr
    assert not set(quiet.stderr.splitlines()) - {"a word of the user"}
    assert "epoch" not in quiet.stdout
    assert "\x1b" not in quiet.stdout
    told = CliRunner().invoke(
        commands, ["compress", "r.yml", "--progress", "--set", "seed=1", "--output", "o"], prog_name="nni-plugins"
    )
    assert "dense epoch 2/2" in told.stderr
    assert "fine-tuning epoch 1/1" in told.stderr
    assert "epoch" not in told.stdout


def test_a_terminal_gets_bars_with_the_time_left() -> None:
    screen = io.StringIO()
    with Epochs(Console(file=screen, force_terminal=True, width=120)) as console:
        console.print("dense model: training net for 3 epochs")
        for epoch in (1, 2, 3):
            console.print(f"dense epoch {epoch}/3: accuracy 0.{epoch}000")
        console.print("fine-tuning epoch 1/2: objective 0.5000")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "training net for 3 epochs" in text
    assert re.search(r"dense .*2/3 .*[-\d]:\S+ .*accuracy 0.2000", text)
    assert "dense epoch 2/3" not in text  # the bar says it
    assert "dense epoch 3/3: accuracy 0.3000" in text  # what stays
    assert re.search(r"fine-tuning .*1/2", text)


@pytest.mark.parametrize(
    ("wanted", "default", "shown"), [(None, None, False), (True, None, True), (None, True, True), (False, True, False)]
)
def test_progress_is_for_terminals_unless_asked(wanted: bool | None, default: bool | None, shown: bool) -> None:
    console = progress(wanted, default)
    assert console.stderr
    assert console.quiet != shown


def test_time_left_is_told_from_the_trials_that_ended() -> None:
    ended = [Trial(str(n), n, "SUCCEEDED", started=100.0 * n, ended=100.0 * n + 60) for n in range(3)]
    running = [Trial(str(n), n, "RUNNING", started=1000.0 - 20) for n in (3, 4)]
    assert time_left([*ended, *running], 10, now=1000.0) == pytest.approx((5 * 60 + 2 * 40) / 2)
    assert time_left([*ended, Trial("w", 3, "WAITING")], 4, now=1000.0) == pytest.approx(60)
    assert time_left(ended, 3, now=1000.0) == 0
    assert time_left(ended, None) is None
    assert time_left(running, 10) is None
    assert [clock(seconds) for seconds in (40, 720, 11_100)] == ["40 s", "12 min", "3 h 05 min"]
    console = Console(record=True, width=160, force_terminal=True, file=io.StringIO())
    with LiveDisplay(console, 10) as show:
        show([*ended, Trial("r", 3, "RUNNING", started=time.time())])
    assert re.search(r"\d+ (s|min) left", console.export_text())


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    results().print("net.py:two: Two [bold]")
    assert capsys.readouterr().out == "net.py:two: Two [bold]\n"


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
@pytest.mark.parametrize("bar", [False, True])
def test_a_terminal_that_is_closed_ends_no_work(monkeypatch: pytest.MonkeyPatch, bar: bool) -> None:
    import pty

    from rich.progress import Progress

    reached: list[bool] = []
    master, slave = pty.openpty()
    with contextlib.suppress(OSError), os.fdopen(slave, "w") as terminal:  # closing it writes what is left
        monkeypatch.setattr(sys, "stderr", terminal)
        console = progress(True)
        assert console.is_terminal
        with Progress(console=console, refresh_per_second=50) if bar else contextlib.nullcontext() as shown:
            if shown is not None:
                shown.add_task("trials", total=2)
            console.print("seen")
            time.sleep(0.1)
            assert b"seen" in os.read(master, 10000)
            os.close(master)
            console.print("not seen")
            time.sleep(0.1)
        console.print("nor this")
        with pytest.raises(OSError, match="Input/output error"):
            os.write(slave, b"what the console would do")
        reached.append(True)
    assert reached
