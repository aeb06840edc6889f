"""What commands print: results on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPED = 200
"""Width where there is no terminal: a row of a table stays one line, for grep and awk."""


def results() -> Console:
    """Where results go: plain text without colours when it is no terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # names and paths may hold brackets
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED
    return console


def progress(wanted: bool | None, default: bool | None = None) -> Console:
    """Where progress goes: standard error, so that standard output is the result and nothing else.

    Parameters
    ----------
    wanted
        ``--progress`` or ``--no-progress``; None where neither was given.
    default
        What holds then; None for a terminal only.
    """
    from rich.console import Console

    console = Console(file=cast(IO[str], _Lasting()), stderr=True, markup=False, emoji=False)
    shown = wanted if wanted is not None else console.is_terminal if default is None else default
    console.quiet = not shown
    return console


PROXIED = "rich_proxied_file"
"""Where rich keeps standard error, which it replaces while it shows a bar."""


class _Lasting:
    """Standard error, until its terminal is closed; then silence, which stops no work of hours."""

    def __init__(self) -> None:
        self._gone = False

    def write(self, text: str) -> int:
        """Write as a file does."""
        self._do(lambda file: file.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush as a file does."""
        self._do(lambda file: file.flush())

    def _do(self, work: Callable[[Any], Any]) -> None:
        try:
            if not self._gone:
                work(getattr(sys.stderr, PROXIED, sys.stderr))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._gone = True

    def __getattr__(self, name: str) -> Any:
        if name == PROXIED:
            raise AttributeError(name)  # this is the file, not what rich puts before one
        return getattr(sys.stderr, name)


@contextlib.contextmanager
def only_results() -> Iterator[None]:
    """What the user's own code prints meanwhile goes to standard error, not between the results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def as_document(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, default=str))


def show_findings(findings: Any, written: Path, as_json: bool) -> None:
    """Print the table and what was proved, or all of it as JSON."""
    from nni_plugins.report.table import proof_lines, rich_table

    if as_json:
        as_document({**findings.to_dict(), "output": str(written)})
        return
    console = results()
    console.print(rich_table(findings))
    for line in proof_lines(findings):
        console.print(line, highlight=False, soft_wrap=True)
    for note in findings.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"report: {written / 'report.html'}, report.md", highlight=False, soft_wrap=True)


def show_comparison(comparison: Any, written: Path, as_json: bool) -> None:
    """Print both models side by side, or all of it as JSON; warnings go to standard error."""
    from nni_plugins.report.compare_page import comparison_table, volume_words

    for warning in comparison.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        as_document({**comparison.to_dict(), "output": str(written)})
        return
    console = results()
    console.print(comparison_table(comparison))
    for line in filter(None, [volume_words(comparison)]):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"comparison: {written / 'compare.html'}, compare.md", highlight=False, soft_wrap=True)


def show_checks(findings: Sequence[Any], as_json: bool) -> None:
    """Print what ``doctor`` found."""
    if as_json:
        as_document([finding.to_dict() for finding in findings])
        return
    for finding in findings:
        mark = "ok   " if finding.ok and not finding.warning else "note " if finding.ok else "WRONG"
        click.echo(f"{mark} {finding.name}: {finding.message}")
        if finding.remedy:
            click.echo(f"      {finding.remedy}")


def show_scaffold(made: Any, as_json: bool) -> None:
    """Print what ``new`` wrote, and what to do with it."""
    if as_json:
        as_document(made.to_dict())
        return
    click.echo(f"{made.folder}: {', '.join(made.files)}")
    click.echo(
        f"{made.macs:,} MACs, {made.params:,} parameters; {made.groups} channel groups can lose units, "
        f"{len(made.fields)} fields are searched; at least {100 * made.least_macs:.2g}% of the MACs stay"
    )
    click.echo(f"next: nni-plugins run {made.folder}")
