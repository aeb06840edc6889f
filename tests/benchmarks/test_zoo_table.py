"""The page of the zoo's results: what is counted, and what is named as not done."""

from __future__ import annotations

from benchmarks.zoo.table import page
from benchmarks.zoo.work import work
from tests.benchmarks.test_zoo_runner import build

COMMON = {"commit": "abc", "when": "2026-01-02 03:04", "machine": "2 cores", "python": "3.11", "torch": "2.14"}
PARTS = [("torchvision, video", "torchvision", ["deep", "nothing", "broken", "absent"])]


def test_the_page_counts_what_is_done_and_names_what_is_not():
    rows = {
        ("torchvision", name, mode): work(
            lambda n=name: build(n), mode, lambda data: None, zoo="torchvision", model=name
        )
        | COMMON
        for name in ("deep", "nothing", "broken")
        for mode in ("exact", "all")
    }
    text = page(rows, PARTS)
    head = "| torchvision, video | 4 | **1** | **1** | 0 |"
    assert head in text
    for line in (
        "| torchvision | absent | both | not run |",
        "| torchvision | broken | both | error at watch ValueError: this model does not run |",
    ):
        assert line in text
    assert "| torchvision | nothing | both | it has no such group: " in text
    assert "| torchvision | deep |" not in text
    groups = rows["torchvision", "deep", "exact"]
    counts = ", ".join(str(groups[f"groups_{kind}"]) for kind in ("exact", "inexact", "frozen"))
    assert f"| deep | {counts} | " in text
    assert "2 cores. python 3.11, torch 2.14" in text
    assert "Results of 2026-01-02, of revisions abc (6)" in text
