"""Tab completion: right, and quick enough to be asked at every key."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from nni_plugins.cli import commands
from nni_plugins.command.complete import SHELLS


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    known = tmp_path / "nni-experiments" / ".experiment"
    known.parent.mkdir()
    entries = {
        name: {"id": name, "experimentName": f"of {name}", "startTime": n} for n, name in enumerate(("abc1", "abd2"))
    }
    known.write_text(json.dumps(entries), encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yml").touch()
    (tmp_path / "more" / "deeper").mkdir(parents=True)
    (tmp_path / "outputs" / "done" / "best").mkdir(parents=True)
    (tmp_path / "outputs" / "done" / "best" / "compact.safetensors").touch()
    (tmp_path / "net.py").write_text("def build(): ...\nclass Net: ...\ndef _hidden(): ...\nraise SystemExit(1)\n")
    (tmp_path / "recipe.yml").touch()
    return tmp_path


def completed(*words: str) -> list[str]:
    *arguments, incomplete = words
    made = ShellComplete(commands, {}, "nni-plugins", "_NNI_PLUGINS_COMPLETE")
    return [item.value for item in made.get_completions(list(arguments), incomplete)]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("comp",), ["compare", "completion", "compress"]),
        (("status", "a"), ["abd2", "abc1"]),  # the newest first
        (("report", "abc"), ["abc1"]),
        (("compare", "abc1", "abd"), ["abd2"]),
        (("run", "m"), ["mine", "more/"]),
        (("run", "--resume", "abd"), ["abd2"]),
        (("run", "--listen", "127"), ["127.0.0.1"]),
        (("compress", "r"), ["recipe.yml"]),
        (("compress", "recipe.yml", "--set", "prune.sp"), ["prune.sparsity="]),
        (("compress", "recipe.yml", "--set", "prune.pruner=syn"), ["prune.pruner=synaptic"]),
        (("compress", "recipe.yml", "--set", "train.schedule=c"), ["train.schedule=cosine", "train.schedule=constant"]),
        (("compress", "recipe.yml", "--set", "nothing.at=a"), []),
        (("inspect", "n"), ["net.py:"]),
        (("inspect", "net.py:"), ["net.py:build", "net.py:Net"]),
        (("inspect", "nowhere.py:b"), []),
        (("new", "x", "--model", "net.py:b"), ["net.py:build"]),
        (("new", "x", "--data", "di"), ["digits"]),
        (("bench", "outputs/d"), ["outputs/done"]),
        (("export", "./o"), ["./outputs/"]),
        (("completion", "f"), ["fish"]),
    ],
)
def test_what_may_follow(place: Path, words: tuple[str, ...], wanted: list[str]) -> None:
    assert [value for value in completed(*words) if not value.startswith("nni-exp")] == wanted


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell(shell: str) -> None:
    answer = CliRunner().invoke(commands, ["completion", shell])
    assert answer.exit_code == 0
    assert f"_NNI_PLUGINS_COMPLETE={shell}_complete" in answer.stdout


def test_bash_itself_completes(place: Path) -> None:
    tools = place / "bin"
    tools.mkdir()
    (tools / "nni-plugins").write_text(f'#!/bin/sh\nexec {sys.executable} -m nni_plugins.cli "$@"\n')
    (tools / "nni-plugins").chmod(0o755)
    code = (
        'eval "$(nni-plugins completion bash)"\n'
        "COMP_WORDS=(nni-plugins status ab); COMP_CWORD=2\n"
        "_nni_plugins_completion nni-plugins\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    answer = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert answer.stdout.split() == ["abd2", "abc1"], answer.stderr


def test_it_is_quick_and_imports_nothing_heavy(place: Path) -> None:
    code = (
        "import sys; from nni_plugins.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'nni', 'numpy', 'matplotlib', 'rich', 'requests', 'psutil'} & set(sys.modules)\n"
        "print('heavy', heavy, file=sys.stderr)"
    )
    words = "nni-plugins compress recipe.yml --set prune.pruner="
    environment = {**os.environ, "_NNI_PLUGINS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "4"}
    timed = [seconds_of([sys.executable, "-c", code], environment) for _ in range(3)]
    answer = timed[0][1]
    assert "magnitude" in answer.stdout
    assert "heavy set()" in answer.stderr
    bare = min(seconds_of([sys.executable, "-c", "import click, yaml"], environment)[0] for _ in range(3))
    assert min(seconds for seconds, _ in timed) < max(0.3, 4 * bare)  # where Python itself is slow, so is this


def seconds_of(command: list[str], environment: dict[str, str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of the processor that a command takes: what else runs here does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, answer


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_says_whole_descriptions_and_the_newest_experiment_first(place: Path) -> None:
    script = CliRunner().invoke(commands, ["completion", "fish"]).stdout
    bin_folder = Path(sys.executable).parent
    answer = subprocess.run(
        ["fish", "--no-config", "-c", f"{script}\ncomplete -C 'nni-plugins status a'; complete -C 'nni-plugins compr'"],
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, last = [line.split("\t") for line in answer.stdout.splitlines()]
    assert [first[0], second[0]] == ["abd2", "abc1"]
    assert first[1].startswith("of abd2, ")
    assert last == ["compress", "Compress by one recipe, without a tuner."]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_the_script_without_a_configuration(place: Path) -> None:
    script = CliRunner().invoke(commands, ["completion", "zsh"]).stdout
    command = ["zsh", "-f", "-c", f"ZDOTDIR=$PWD; {script}\nprint -r -- $_comps[nni-plugins]"]
    answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert answer.stdout.strip() == "_nni_plugins_completion", answer.stderr
