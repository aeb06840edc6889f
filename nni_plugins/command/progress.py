"""How far a command is, with the time that is left: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EPOCH = re.compile(r"(?P<what>.+) epoch (?P<done>\d+)/(?P<total>\d+): (?P<text>.*)")


def bar_of(console: Console, **settings: Any) -> Progress:
    """A bar with what it is about, how far it is, the time left, and a word on the latest."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    disable = console.quiet or not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=disable, **settings)


class Epochs:
    """Takes the lines that a compression says, and makes bars of ``dense epoch 3/20: ...`` on a terminal.

    It stands in for a console: what is compressed need not know of it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = bar_of(console)
        self._task: Any = None

    def __enter__(self) -> Any:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def is_terminal(self) -> bool:
        """As of the console."""
        return self._console.is_terminal

    def print(self, line: str, **settings: Any) -> None:
        """Print a line, or move the bar."""
        match = EPOCH.fullmatch(str(line))
        if match is None or self._bar.disable:
            self._console.print(line, **settings)
            return
        what, done, total = match["what"], int(match["done"]), int(match["total"])
        if self._task is None or self._bar.tasks[0].description != what:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, text="")
        self._bar.update(self._task, completed=done, text=match["text"], refresh=True)
        if done == total:
            self._console.print(line, **settings)
