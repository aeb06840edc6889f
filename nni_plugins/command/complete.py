"""Tab completion: what may follow, from files and names alone. Nothing here imports torch or NNI.

A shell asks at every press of the key, so each function answers in milliseconds, and says nothing where it fails.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_NNI_PLUGINS_COMPLETE"
Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def script(shell: str, group: click.Group) -> str:
    """Return what a shell has to read so that it completes ``nni-plugins``."""
    made = get_completion_class(shell)
    assert made is not None
    source = made(group, {}, "nni-plugins", VARIABLE).source()
    for before, after in MENDED.get(shell, {}).items():
        source = source.replace(before, after)
    return source


MENDED = {
    "zsh": {"    compdef _": "    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n    compdef _"},
    "fish": {
        'string split "," $completion': 'string split --max 1 "," $completion',  # a description may hold more of them
        "complete --no-files --command": "complete --no-files --keep-order --command",
    },
}
"""What click's scripts leave out, for shells as they come."""


def _quiet(complete: Completer) -> Completer:
    @functools.wraps(complete)
    def answer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return complete(ctx, param, incomplete)
        except Exception:  # nobody wants a traceback in the line that is being typed
            return []

    return answer


@_quiet
def complete_experiment(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of the experiments that NNI knows here, and folders."""
    path = Path(os.path.expanduser("~")) / "nni-experiments" / ".experiment"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    newest = sorted(known.values(), key=lambda entry: entry.get("startTime") or 0, reverse=True)
    ids = [CompletionItem(one["id"], help=_when(one)) for one in newest]
    return [item for item in ids if item.value.startswith(incomplete)] or _folders(incomplete)


def _when(entry: dict[str, Any]) -> str:
    """Its name and when it began; zsh would put those of one name together, and lose their order."""
    began = entry.get("startTime")
    day = time.strftime("%d %b %H:%M:%S", time.localtime(began / 1000)) if isinstance(began, (int, float)) else ""
    return ", ".join(part for part in (str(entry.get("experimentName") or ""), day) if part)


@_quiet
def complete_experiment_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders that hold a ``config.yml``, and those on the way."""
    return _folders(incomplete, "config.yml")


@_quiet
def complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders that a compression left, or ``file.py:function``."""
    return _folders(incomplete, "best/compact.safetensors", "compact.safetensors") + _functions(incomplete)


@_quiet
def complete_import(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``file.py:function``."""
    return _functions(incomplete)


@_quiet
def complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``digits``, ``random``, a folder, or ``file.py:function``."""
    names = [CompletionItem(name) for name in ("digits", "random") if name.startswith(incomplete)]
    return names + _folders(incomplete) + _functions(incomplete)


@_quiet
def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``file.py:function``, or a recipe."""
    return _recipes(incomplete) + _functions(incomplete)


@_quiet
def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Recipes, and folders on the way to them."""
    return _recipes(incomplete) + _folders(incomplete)


@_quiet
def complete_recipe_field(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Fields of a recipe, and after the ``=`` what the field may be."""
    from nni_plugins.pruners import PRUNERS
    from nni_plugins.training.recipe import Recipe
    from nni_plugins.training.schema import field_paths

    name, mark, value = incomplete.partition("=")
    fields = {path: field for path, _, field in field_paths(Recipe)}
    if not mark:
        found = [path for path in fields if path.startswith(name)]
        return [CompletionItem(f"{path}=", help=fields[path].metadata["doc"]) for path in found]
    choices = fields[name].metadata.get("choices") or ()
    if name in ("prune.pruner", "supernet.pruner"):
        choices = tuple(PRUNERS)
    return [CompletionItem(f"{name}={choice}") for choice in choices if choice.startswith(value)]


def _recipes(incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(text) for text, path in _listed(incomplete).items() if path.suffix in (".yml", ".yaml")]


def _listed(incomplete: str) -> dict[str, Path]:
    """What stands in the folder that is being typed and begins so, by the text that names it."""
    parent, mark, start = incomplete.rpartition("/")
    folder = Path(os.path.expanduser(parent + mark or "."))
    items = sorted(item for item in folder.iterdir() if item.name.startswith(start))
    return {f"{parent}{mark}{one.name}": one for one in items if start.startswith(".") or not one.name.startswith(".")}


def _folders(incomplete: str, *marks: str) -> list[CompletionItem]:
    """Folders: first those that hold one of the marks, then, ending in a slash, those that may lead to one."""
    found = {text: path for text, path in _listed(incomplete).items() if path.is_dir()}
    right = [text for text, path in found.items() if any((path / mark).exists() for mark in marks)]
    return [CompletionItem(text) for text in right] + [
        CompletionItem(f"{text}/") for text in found if text not in right
    ]


def _functions(incomplete: str) -> list[CompletionItem]:
    """Functions and classes of a Python file, read without running it."""
    name, mark, start = incomplete.rpartition(":")
    if not mark:
        return [CompletionItem(f"{text}:") for text, path in _listed(incomplete).items() if path.suffix == ".py"]
    tree = ast.parse(Path(os.path.expanduser(name)).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [CompletionItem(f"{name}:{one}") for one in names if one.startswith(start) and not one.startswith("_")]
