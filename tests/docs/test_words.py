"""What pages quote is what there is: messages that the code prints, figures that scripts wrote."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import strangers_path
from nni_plugins.search.spaces import check_space
from nni_plugins.training.recipe import Recipe, recipe_from_dict
from nni_plugins.training.schema import field_paths
from tests.docs.pages import PAGES, ROOT, blocks, name_of, rows

DOCS = ROOT / "docs"
TROUBLE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", TROUBLE, flags=re.DOTALL), re.MULTILINE)


def templates() -> list[str]:
    """Every text of the package that could be a message, with a hole where it has a value."""
    found = []
    for path in (ROOT / "nni_plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text for text in found if len(text.replace("\0", "").strip()) >= 10]


@pytest.fixture(scope="module")
def known() -> list[re.Pattern[str]]:
    return [re.compile(r".*".join(map(re.escape, text.split("\0"))), re.DOTALL) for text in templates()]


@pytest.mark.parametrize("line", QUOTED)
def test_the_code_prints_what_troubleshooting_quotes(line: str, known: list[re.Pattern[str]]) -> None:
    """A line is made of messages in the code: what they leave over is short."""
    spans = [match.span() for pattern in known for match in [pattern.search(line)] if match]
    covered = {place for start, end in spans for place in range(start, end)}
    assert len(covered) >= 0.7 * len(line), [line[start:end] for start, end in spans]


def test_reasons_that_troubleshooting_explains_are_given() -> None:
    reasons = re.findall(r"^\| `([^`]+)` \|", TROUBLE, re.MULTILINE)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nni_plugins" / "channels").rglob("*.py"))
    assert len(reasons) >= 5
    assert [reason for reason in reasons if reason not in source] == []


def test_the_tables_to_choose_by_are_those_that_were_measured() -> None:
    """Accuracies of `choose.md` are those of `pruners-digits.md`, which a script writes."""
    digits = (DOCS / "pruners-digits.md").read_text(encoding="utf-8")
    measured = rows(digits.partition("### mlp")[0], "method")
    compared = 0
    for method, cells in rows((DOCS / "guides" / "choose.md").read_text(encoding="utf-8"), "method").items():
        for column, cell in cells.items():
            if "±" in cell:
                assert cell == measured[method][column], (method, column)
                compared += 1
    assert compared >= 25


@pytest.mark.parametrize("source", ["docs/export.md", "docs/search-tuners.md", "docs/pruners.md"])
def test_figures_to_choose_by_stand_in_the_page_that_measured_them(source: str) -> None:
    chosen = (DOCS / "guides" / "choose.md").read_text(encoding="utf-8")
    text = (ROOT / source).read_text(encoding="utf-8")
    wanted = {
        "docs/export.md": [*re.findall(r"\d\d\.\d\d% ± 0\.\d\d", chosen), *re.findall(r"\d\.\dx smaller", chosen)],
        "docs/search-tuners.md": re.findall(r"0\.9\d{3}", chosen),
        "docs/pruners.md": re.findall(r"\d+ to \d+%(?= while|;| \|)", chosen),
    }[source]
    assert len(wanted) >= 3
    assert [figure for figure in wanted if figure not in text] == []


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w./-]+\.md)", nav))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_api_pages_name_packages(tmp_path: Path) -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert (ROOT / name.replace(".", "/")).is_dir() or (ROOT / f"{name.replace('.', '/')}.py").is_file()


SECTIONS = {path.partition(".")[0] for path, *_ in field_paths(Recipe)}
YAML = [
    pytest.param(block.text, id=f"{name_of(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language in ("yaml", "yml")
]


@pytest.mark.parametrize("text", YAML)
def test_recipes_and_spaces_are_valid(text: str) -> None:
    """A block is YAML; one whose fields are all a recipe's is a recipe, and names with dots are a search space."""
    tree = yaml.safe_load(text)
    assert isinstance(tree, dict)
    space = tree.get("searchSpace") or {name: value for name, value in tree.items() if "." in name}
    if set(tree) <= SECTIONS:
        recipe_from_dict(tree)
    if space:
        check_space(space)
        assert {name for name in space if name.partition(".")[0] not in SECTIONS} == set()


def test_there_are_recipes_to_look_at() -> None:
    assert sum(set(yaml.safe_load(case.values[0])) <= SECTIONS for case in YAML) >= 3


def test_the_strangers_path_is_the_one_that_was_timed() -> None:
    shown = (DOCS / "strangers-path.md").read_text(encoding="utf-8")
    found = json.loads(strangers_path.RESULTS.read_text(encoding="utf-8"))
    assert strangers_path.table(found) in shown
    assert [step["command"] for step in found["own"]["steps"]] == strangers_path.own_commands()
