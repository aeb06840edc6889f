"""docs/compat.md tells of every patch, in the patch's own words."""

from pathlib import Path

from nni_plugins.compat import patches

PAGE = Path(__file__).parents[2] / "docs" / "compat.md"


def row(patch):
    return f"| `{patch.name}` | `{patch.module}` | {patch.mends.replace('|', chr(92) + '|')} |"


def test_the_table_has_a_row_for_each_patch_and_no_other():
    section = PAGE.read_text(encoding="utf-8").split("## What each patch mends")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table == [row(patch) for patch in patches()]
