"""Every end of a command: its exit code, and one line on standard error where it is not 0.

====  ==============================================================================================
code  meaning
====  ==============================================================================================
0     done
1     a mistake in a file or a model, or a task that failed; the line says which and what to do
2     wrong arguments
70    a defect of nni-plugins; the line names the file that holds the traceback
130   stopped by Ctrl-C
====  ==============================================================================================
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import click

from nni_plugins.command.options import Command, write_examples
from nni_plugins.training.errors import where

OK, FAILED, USAGE, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130
EXTRAS = {
    "lightning": ("pytorch_lightning", "lightning"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "vision": ("torchvision",),
    "transformers": ("transformers",),
    "rl": ("tianshou", "gym"),
}
"""Extras of this package, by what they install."""
DEBUG = "NNI_PLUGINS_DEBUG"
"""Set to 1, errors come with their tracebacks; so does ``nni-plugins --debug``."""


class OneLineGroup(click.Group):
    """A group of commands in which every error is one line and an exit code.

    Parameters
    ----------
    sections
        Heading to names of commands, for the help.
    examples
        As of a command.
    """

    command_class = Command

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Sequence[str]] | None = None,
        examples: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.sections, self.examples = sections or {}, examples

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section."""
        placed = {name for names in self.sections.values() for name in names}
        rest = [name for name in self.list_commands(ctx) if name not in placed]
        for heading, names in {**self.sections, "Commands": rest}.items():
            found = [(name, command) for name in names if (command := self.get_command(ctx, name)) is not None]
            if found:
                with formatter.section(heading):
                    formatter.write_dl([(f"{name:<10}", command.get_short_help_str(80)) for name, command in found])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the epilog."""
        write_examples(self.examples, formatter)
        super().format_epilog(ctx, formatter)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; see :meth:`click.Command.main`."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        if not sys.warnoptions:  # of libraries, about what the user did not write; --debug and python -W show them
            warnings.simplefilter("ignore")
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
            sys.stdout.flush()
        except BaseException as error:
            code = exit_code_of(error)
            _let_go_of_stdout()
        sys.exit(code if isinstance(code, int) else OK)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; Ctrl-C is told by :func:`exit_code_of`, not by click."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped from None
        except SystemExit as error:  # no command of ours ends so, but code of the user may, and rich at a closed pipe
            if _raised_in(error, "rich"):
                raise
            raise UserCodeEnded(f"code that is not of nni-plugins ended the process: {where(error)}") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"{name} is no command; {hint}", ctx)
        return super().resolve_command(ctx, args)


class Stopped(BaseException):
    """Ctrl-C during a command."""


class UserCodeEnded(Exception):
    """The user's code called ``sys.exit``."""


def _raised_in(error: BaseException, package: str) -> bool:
    """Whether the innermost frame of an exception is in a package."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).split(".")[0] == package


def exit_code_of(error: BaseException) -> int:
    """Write what happened to standard error, in one line, and return the exit code for it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED if error.code else OK
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader of a pipe, such as head, has enough
        return FAILED
    if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
        click.echo(error.format_message(), err=True)  # type: ignore[attr-defined]
        return USAGE
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    code, text = _said(error)
    click.echo(" ".join(text.split()), err=True)
    return code


def _said(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an exception."""
    if isinstance(error, click.ClickException):
        return error.exit_code, _usage(error)
    if isinstance(error, (Stopped, KeyboardInterrupt, click.Abort)) or type(error).__name__ == "Interrupted":
        return INTERRUPTED, f"nni-plugins: {error if str(error).strip() else 'stopped by Ctrl-C'}"
    if type(error).__module__.startswith("nni_plugins."):  # all of them are written for the user
        return FAILED, f"nni-plugins: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return FAILED, "nni-plugins: out of memory; use a smaller input, batch or model, or a larger machine"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("nni_plugins"):
        package = error.name.partition(".")[0]
        return FAILED, f"nni-plugins: this needs the package {package}: pip install {_package_of(package)}"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return FAILED, f"nni-plugins: {place}{error.strerror}{_remedy(error)}"
    return DEFECT, _defect(error)


def _package_of(module: str) -> str:
    """What to install for a module: our extra where there is one."""
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return module if extra is None else f"'nni-plugins[{extra}]'"


def _usage(error: click.ClickException) -> str:
    """One of click's errors, with the place to read on."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "nni-plugins"
    text = error.format_message().strip().rstrip(".")
    text = text[:1].lower() + text[1:] if text[1:2].islower() else text
    more = f"; see {path} --help" if isinstance(error, click.UsageError) else ""
    return f"{path}: {text}{more}"


def _remedy(error: OSError) -> str:
    remedies = {
        errno.ENOSPC: "; free some space, or choose another place with --output or --experiments-folder",
        errno.EDQUOT: "; free some space, or choose another place with --output or --experiments-folder",
        errno.EACCES: "; give yourself the right, or choose another place",
        errno.EPERM: "; give yourself the right, or choose another place",
        errno.EROFS: "; choose another place",
        errno.EMFILE: "; raise the limit with ulimit -n",
    }
    return remedies.get(error.errno or 0, "")


def _defect(error: BaseException) -> str:
    """The line for an exception that nobody expected; its traceback goes to a file that only the user can read."""
    from nni_plugins import __version__

    words = " ".join(str(error).split())
    words = words if len(words) <= 200 else words[:197] + "..."
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    try:
        handle, path = tempfile.mkstemp(prefix="nni-plugins-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"nni-plugins {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n\n")
            traceback.print_exception(error, file=file)
        where = f"please report it with {path}"
    except OSError:
        where = f"set {DEBUG}=1 to see where"
    return f"nni-plugins: a defect of nni-plugins ({what}); {where} (`nni-plugins --debug ...` shows the traceback)"


def _let_go_of_stdout() -> None:
    """Let the interpreter's last flush find no broken pipe and no full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
