"""Trials read their recipe when they start: one that is edited meanwhile parts an experiment into two."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

RECIPES = "recipes.jsonl"
"""In the experiment's ``log`` folder: the recipe at its start, and as it was changed to; one JSON object a line."""


class RecipeWatch:
    """Says when the recipe of a running experiment is changed.

    Parameters
    ----------
    recipe
        The file that trials read; None where there is none to watch.
    experiment
        The experiment's folder; what an earlier run of it kept there counts.
    say
        Called with a line for each change.
    """

    def __init__(self, recipe: Path | None, experiment: Path, say: Callable[[str], Any]) -> None:
        self._recipe, self._experiment, self._say = recipe, experiment, say
        self._stamp: tuple[int, int] | None = None
        known = recipes(experiment)
        self._last: Any = known[-1]["recipe"] if known else None

    def __call__(self) -> None:
        """Look at it once; costs next to nothing where the file is as it was."""
        if self._recipe is None:
            return
        try:
            found = self._recipe.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            content = yaml.safe_load(self._recipe.read_text(encoding="utf-8")) or {}
            content = json.loads(json.dumps(content, default=str))  # as it will be read again
        except (OSError, ValueError, yaml.YAMLError):
            return  # half written, or not there: a trial says so
        self._stamp = stamp
        if content == self._last:
            return  # a comment, or nothing at all
        if self._last is not None:
            fields = ", ".join(changed(self._last, content))
            self._say(
                f"warning: {self._recipe.name} is not what it was ({fields}): trials from now on run what it says now, "
                "and do not compare with those before"
            )
        self._last = content
        with suppress(OSError), (self._experiment / "log" / RECIPES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "recipe": content}) + "\n")


def recipes(experiment: Path) -> list[dict[str, Any]]:
    """The recipes that an experiment's trials had, with the time from which on."""
    found = []
    with suppress(OSError):
        for line in (experiment / "log" / RECIPES).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and "recipe" in entry and "time" in entry:
                    found.append(entry)
    return found


def said_of_recipes(experiment: Path) -> str:
    """One line on a recipe that was changed while the experiment ran; empty where it was not."""
    found = recipes(experiment)
    if len(found) < 2:
        return ""
    fields = dict.fromkeys(field for one, two in pairwise(found) for field in changed(one["recipe"], two["recipe"]))
    return f"the recipe was changed while the search ran ({', '.join(fields)}): trials before and after do not compare"


def changed(before: Any, after: Any, path: str = "") -> list[str]:
    """The fields, by dotted path, in which two recipes differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys([*before, *after])
        return [
            field
            for name in names
            for field in changed(before.get(name), after.get(name), f"{path}.{name}" if path else str(name))
        ]
    return [] if before == after else [path or "all of it"]
