"""What stands in the pages of the documentation: blocks of code, commands, tables."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").glob("*/README.md")])
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of the line (`title="net.py"`), its text, and where it begins."""

    language: str
    options: str
    text: str
    line: int

    @property
    def file(self) -> str:
        """The file that it is, if it has a title."""
        found = re.search(r'title="([^"]+)"', self.options)
        return found[1] if found else ""


@dataclass(frozen=True)
class Command:
    """A line of a shell: the page, the line, and its words without pipes, redirections and comments."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, options = match[2].strip().partition(" ")
        found.append(Block(language, options, match[3], text.count("\n", 0, match.start()) + 1))
    return found


def commands(page: Path, program: str) -> list[Command]:
    """Commands of ``program`` in blocks for a shell, and in indented blocks."""
    text = page.read_text(encoding="utf-8")
    lines = text.split("\n")
    inside = {}
    for block in blocks(page):
        for number in range(block.line, block.line + block.text.count("\n") + 2):
            inside[number] = block.language
    found = []
    for number, line in enumerate(lines, 1):
        shell = inside.get(number) in ("sh", "bash", "shell", "console")
        indented = number not in inside and line.startswith("    ")
        plain = line.strip().removeprefix("$ ")
        if not (shell or indented) or not re.match(rf"{program}(?= |$)", plain):
            continue
        found.append(Command(name_of(page), number, _words(plain)))
    return found


def _words(line: str) -> tuple[str, ...]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;<")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if word[0] in "|>&;<":
            break
        words.append(word)
    return tuple(words)


def rows(text: str, first: str) -> dict[str, dict[str, str]]:
    """Rows of all tables whose first column is called ``first``: by the row's name, cells by the column's."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in text.split("\n"):
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not columns:
            columns = cells
        elif columns[0] == first and set(cells[0]) - {"-"}:
            found.setdefault(cells[0], {}).update(zip(columns[1:], cells[1:], strict=False))
    return found
