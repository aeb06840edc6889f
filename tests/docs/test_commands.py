"""Every command in the pages is one that there is: its options exist and its values fit; the cheap ones run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from nni_plugins.cli import commands as cli
from nni_plugins.report import figures
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands, name_of

OURS = "nni-plugins"


def inline(page: Path, start: str) -> list[Command]:
    """Commands within a line of text."""
    found = []
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        for text in re.findall(rf"`({start}[^`]*)`", line):
            if "..." not in text and "'" not in text:
                found.append(Command(name_of(page), number, tuple(text.split())))
    return found


def shown(program: str) -> list[Command]:
    every = [command for page in PAGES for command in commands(page, program)]
    return [command for command in every if len(command.words) == 1 or not command.words[1].endswith(":")]


def parse(words: tuple[str, ...]) -> click.Context:
    """Parse as the command line does; nothing is run."""
    group = cli.make_context(OURS, list(words[1:]))
    held = getattr(group, "_protected_args", None) or getattr(group, "protected_args", [])  # by click's version
    name, command, rest = cli.resolve_command(group, [*held, *group.args])
    assert command is not None
    return command.make_context(name, rest, parent=group)


@pytest.mark.parametrize("command", [pytest.param(one, id=str(one)) for one in shown(OURS)])
def test_a_command_in_a_block_parses(command: Command) -> None:
    parse(command.words)


def test_there_are_commands_to_look_at() -> None:
    assert len(shown(OURS)) >= 45


def test_commands_within_a_line_exist() -> None:
    wrong = []
    for page in PAGES:
        for command in inline(page, f"{OURS} "):
            if command.words[1].isupper() or "--help" in command.words:  # nni-plugins COMMAND --help
                continue
            try:
                parse(command.words)
            except click.MissingParameter:
                pass  # the name of a command alone
            except click.UsageError as error:
                wrong.append(f"{command}: {error.format_message()}")
    assert not wrong


def test_scripts_and_their_options_exist() -> None:
    wrong = []
    for page in PAGES:
        for command in [*commands(page, "python"), *inline(page, "python ")]:
            words = command.words
            path = ROOT / words[1] if words[1] != "-m" else ROOT / f"{words[2].replace('.', '/')}"
            if words[1] == "-m" and words[2].split(".")[0] not in ("benchmarks", "nni_plugins"):
                continue
            found = next((p for p in (path, path.with_suffix(".py"), path / "__main__.py") if p.is_file()), None)
            if found is None:
                wrong.append(f"{command}: there is no {path.relative_to(ROOT)}")
                continue
            text = found.read_text(encoding="utf-8") + "".join(
                other.read_text(encoding="utf-8") for other in found.parent.glob("*/*.py") if "zoo" in found.name
            )
            wrong += [f"{command}: no {word}" for word in words if word.startswith("--") and word not in text]
    assert not wrong


def test_targets_of_make_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {
        c.words[1] for page in PAGES for c in [*commands(page, "make"), *inline(page, "make ")] if len(c.words) > 1
    }
    assert asked <= known


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page on one's own model shows."""
    for block in blocks(ROOT / "docs" / "guides" / "own-model.md"):
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    (tmp_path / "recipe.yml").write_text("model: {name: small_cnn}\n", encoding="utf-8")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NNI_PLUGINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", 3)  # fonts for print take as long as all plots
    torch.set_num_threads(1)
    return tmp_path


def run(command: Command, *more: str) -> str:
    answer = CliRunner().invoke(cli, [*command.words[1:], *more], prog_name=OURS)
    assert answer.exit_code == 0, (str(command), answer.output, answer.exception)
    return answer.stdout


def test_the_commands_for_ones_own_model_run(place: Path) -> None:
    ours = {" ".join(c.words[1:3]): c for c in commands(ROOT / "docs" / "guides" / "own-model.md", OURS)}
    assert "Groups" in run(ours["inspect net.py:build"], "--no-latency")
    run(ours["new mine"], "--epochs", "1", "--argument", "width=4")
    assert {path.name for path in (place / "mine").iterdir()} >= {"recipe.yml", "space.yml", "config.yml"}
    run(ours["compress mine/recipe.yml"])  # the second of its name, with two --set
    assert "compact" in run(ours["bench outputs/compress-mine"], "--seconds", "0.02", "--runtimes", "eager")
    shutil.copytree("outputs/compress-mine", "outputs/mine")  # `run` takes minutes; both leave the same kind of folder
    run(ours["export outputs/mine"])
    assert (place / "outputs" / "mine" / "best" / "compact.onnx").is_file()


def test_the_cheap_commands_of_other_pages_run(place: Path) -> None:
    cheap = ("space recipe.yml", "completion ", "status --all")
    ran = [command for command in shown(OURS) if " ".join(command.words[1:]).startswith(cheap)]
    assert len(ran) >= 3
    for command in ran:
        assert run(command)
