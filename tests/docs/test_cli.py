"""``docs/cli.md`` names every command, exit code and variable that there is, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from nni_plugins.cli import commands
from nni_plugins.command import errors

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def test_every_command_is_there() -> None:
    table = PAGE.partition("| command |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)(?= |`)", table)) >= set(commands.commands)
    named = set(re.findall(r"nni-plugins ([a-z]+)(?= |`)", PAGE)) - {"run"}
    assert named <= set(commands.commands)


def test_every_exit_code_is_there() -> None:
    table = PAGE.partition("## Exit codes")[2].partition("\n\nAn error")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert codes == {errors.OK, errors.FAILED, errors.USAGE, errors.DEFECT, errors.INTERRUPTED}


def test_every_option_that_is_written_exists() -> None:
    known = {flag for command in commands.commands.values() for param in command.params for flag in param.opts}
    known |= {
        flag for command in commands.commands.values() for param in command.params for flag in param.secondary_opts
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) <= known | {"--help", "--debug"}


def test_every_variable_is_there() -> None:
    used = {param.envvar for command in commands.commands.values() for param in command.params if param.envvar}
    assert {*used, errors.DEBUG} <= set(re.findall(r"`([A-Z_]+)`", PAGE))
