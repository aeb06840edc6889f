"""The tables of what to write in place of what: every name on both sides exists, with these arguments."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from nni_plugins import channels, pruners, speedup
from tests.docs.pages import ROOT

PAGES = ROOT / "docs" / "moving"


def cells(page: str) -> list[tuple[str, str]]:
    """The code in both columns of the page's first table, row by row."""
    text = (PAGES / page).read_text(encoding="utf-8").partition("\n## ")[0]
    found = [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith("| ")][1:]
    assert all(len(row) == 2 for row in found)
    assert len(found) >= 10
    return [
        (" ".join(re.findall(r"`([^`]*)`", one)), " ".join(re.findall(r"`([^`]*)`", other))) for one, other in found
    ]


def keywords(code: str) -> set[str]:
    return set(re.findall(r"(?<![\w.\"])(\w+)=", code))


@pytest.mark.parametrize("page", ["from-nni.md", "from-torch-pruning.md"])
def test_what_is_ours_exists(page: str) -> None:
    ours = {name: getattr(home, name) for home in (channels, pruners, speedup) for name in home.__all__}
    seen = 0
    for _, code in cells(page):
        for name, arguments in re.findall(r"\b([A-Z]\w+|\w+_compact)\(([^)]*)", code):
            assert name in ours, name
            known = {key for base in getattr(ours[name], "__mro__", [ours[name]]) for key in _parameters(base)}
            assert keywords(arguments) <= known, (name, arguments)
            seen += 1
        alone = re.fullmatch(r"(?:schedule|scope|norm|round_to|target)=.*", code)
        if alone:
            known = _parameters(pruners.GroupPruner) | _parameters(pruners.MagnitudePruner)
            assert keywords(code.partition("(")[0]) <= known, code
    assert seen >= 5


def _parameters(one: object) -> set[str]:
    try:
        return set(inspect.signature(one).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return set()


def test_what_is_nnis_exists() -> None:
    compression = importlib.import_module("nni.compression.pruning")
    for code, _ in cells("from-nni.md"):
        for name, arguments in re.findall(r"\b(\w+Pruner)\(([^)]*)", code):
            known = list(inspect.signature(getattr(compression, name).__init__).parameters)[1:]
            given = [word.strip() for word in arguments.split(",")]
            assert known[: len(given)] == given or "..." in given, (name, given, known)


def test_what_is_torch_prunings_exists() -> None:
    tp = pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    known = set(inspect.signature(tp.pruner.BasePruner.__init__).parameters)
    for code, _ in cells("from-torch-pruning.md"):
        for path in re.findall(r"\btp((?:\.\w+)+)", code):
            found = tp
            for part in path[1:].split("."):
                found = getattr(found, part)
        for name in re.findall(r"\b(\w+Importance)\(", code):
            assert hasattr(tp.importance, name)
        for name in re.findall(r"\bDG\.(\w+)", code):
            assert hasattr(tp.DependencyGraph, name)
        assert keywords(code) <= known | {"p"}, code
