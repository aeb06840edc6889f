"""The Python code of every page is run: block by block, in one namespace a page, in a temporary folder."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_plugins.channels.rules.registry import RULES, _found
from tests.docs.given import FASTER, FRESH, LINKED, Fresh, given
from tests.docs.pages import PAGES, ROOT, Block, blocks, name_of

#: Packages that a page may need and an installation may lack.
OPTIONAL = ("torchvision", "timm", "transformers", "torch_pruning", "pytorch_lightning")
#: Run by tests of their own, which say more.
ELSEWHERE = {"docs/how-to/new-pruner.md": "test_new_pruner.py"}

CODE = {
    name_of(page): [block for block in blocks(page) if block.language == "python"]
    for page in PAGES
    if name_of(page) not in ELSEWHERE
}
CASES = [
    pytest.param(page, number, id=f"{page}:{block.line}")
    for page, found in CODE.items()
    for number, block in enumerate(found)
]


class Page:
    """A page that is run from top to bottom, as far as anyone asks."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.names: dict[str, Any] = Fresh(__name__="page") if name in FRESH else given(name)
        self.said: dict[int, BaseException | None] = {}
        for link in LINKED:
            (folder / link).symlink_to(ROOT / link)
        for block in blocks(ROOT / name):
            if block.file:
                (folder / block.file).write_text(block.text, encoding="utf-8")

    def run(self, number: int) -> None:
        """Run a block, those before it first; raise what it raised."""
        for earlier in range(number + 1):
            if earlier not in self.said:
                self.said[earlier] = self._run(CODE[self.name][earlier])
        said = self.said[number]
        if said is not None:
            raise said

    def _run(self, block: Block) -> BaseException | None:
        missing = _missing(block)
        if missing:
            return pytest.skip.Exception(f"{self.name}:{block.line} needs {missing}")
        if block.file:
            return None  # imported by a later block, or by a command
        text = block.text
        for slow, fast in FASTER.items():
            text = text.replace(slow, fast)
        if isinstance(self.names, Fresh):
            self.names.renew()
        try:
            torch.manual_seed(0)
            exec(compile("\n" * block.line + text, str(ROOT / self.name), "exec"), self.names)
        except Exception as error:
            return error
        return None


def _missing(block: Block) -> str:
    wanted = re.findall(r"^\s*(?:import|from) (\w+)", block.text, re.MULTILINE)
    used = [name for name in OPTIONAL if name in wanted or re.search(rf"\b{name}\.", block.text)]
    return ", ".join(name for name in used if importlib.util.find_spec(name) is None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Page]]:
    threads, rules = torch.get_num_threads(), dict(RULES)
    torch.set_num_threads(1)
    yield {}
    torch.set_num_threads(threads)
    RULES.clear()  # what a page registered goes, and what was found by it
    RULES.update(rules)
    _found.clear()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_code_runs(
    name: str,
    number: int,
    pages: dict[str, Page],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name not in pages:
        pages[name] = Page(name, tmp_path_factory.mktemp("page"))
    page = pages[name]
    monkeypatch.chdir(page.folder)
    monkeypatch.syspath_prepend(str(page.folder))
    monkeypatch.setenv("NNI_PLUGINS_CACHE", str(page.folder / "cache"))
    for written in page.folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, written.stem, raising=False)  # another test's file of that name
    before = set(sys.modules)
    try:
        page.run(number)
    finally:
        for module in set(sys.modules) - before:
            origin = getattr(sys.modules[module], "__file__", None) or ""
            if origin.startswith(str(page.folder) + os.sep):
                del sys.modules[module]


def test_the_readme_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page("README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    page.run(0)
    printed = capsys.readouterr().out.split()
    said = re.search(r"print\(.*\)\n# (\d+) (\d+) (\S+)", CODE["README.md"][0].text)
    assert said
    assert printed[-3] == said[1]
    assert int(printed[-2]) == pytest.approx(int(said[2]), rel=0.02)
    assert float(printed[-1]) < 1e-5 > float(said[3])


def test_no_page_is_forgotten() -> None:
    assert len(CASES) >= 35
    assert all((ROOT / "tests" / "docs" / test).is_file() for test in ELSEWHERE.values())
