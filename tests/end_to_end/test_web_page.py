"""NNI's web page in a real browser: headless Chromium on a running experiment of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here; CI has one")
PICTURES = os.environ.get("NNI_PLUGINS_SCREENSHOTS")
"""A folder to keep screenshots in; docs/images has those of the documentation."""


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of the browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(90_000)
        yield page
        browser.close()


def keep(page: Any, name: str) -> None:
    if PICTURES:
        page.wait_for_timeout(800)  # the graphs move into place
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def test_the_page_shows_our_metrics_the_recipes_names_and_a_failed_trials_log(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], page: Any
) -> None:
    space = {
        "prune.sparsity": {"_type": "choice", "_value": [0.4, 0.5, 0.98]},
        "finetune.learning_rate": {"_type": "choice", "_value": [0.02]},
    }
    folder = write_experiment(
        space=space, recipe={"prune": {"max_sparsity": 0.6}}, maxTrialNumber=3, tuner={"name": "GridSearch"}
    )
    experiment = nni_home.create(folder / "config.yml", port)
    nni_home.wait(port)
    jobs = {job["status"]: job for job in nni_home.get(port, "trial-jobs")}
    assert set(jobs) == {"SUCCEEDED", "FAILED"}

    page.goto(f"http://127.0.0.1:{port}/oview")
    page.get_by_text(experiment).first.wait_for()
    page.get_by_text("Best metric").first.wait_for()
    keep(page, "web-overview")

    # the default metric is a graph, and the other keys of a trial's result can be chosen
    page.goto(f"http://127.0.0.1:{port}/detail")
    page.get_by_text("Default metric").first.wait_for()
    page.locator("canvas").first.wait_for()
    page.get_by_role("combobox").filter(has_text="default").first.click()
    options = page.get_by_role("option")
    options.first.wait_for()
    assert {"default", "accuracy", "macs", "params", "latency_ms", "max_error"} <= set(options.all_inner_texts())
    options.filter(has_text="macs").first.click()
    page.get_by_role("combobox").filter(has_text="macs").first.wait_for()
    keep(page, "web-metrics")

    # the graph of hyper-parameters has the recipe's names
    page.get_by_text("Hyper-parameter").first.click()
    for name in space:
        page.get_by_text(name, exact=True).first.wait_for()
    keep(page, "web-parameters")

    # a failed trial's detail has its parameters, and its log says why
    row = page.get_by_role("row").filter(has_text="FAILED").first
    row.locator("[data-automation-key=_expand] i").click()
    page.get_by_text("prune.sparsity").last.wait_for()
    page.get_by_role("tab", name="Log").click()
    button = page.get_by_role("button", name="View trial error").or_(page.get_by_text("View trial error"))
    button.first.wait_for()
    keep(page, "web-failed-trial")
    with page.expect_popup() as opened:
        button.first.click()
    log = opened.value
    log.get_by_text("sparsity 0.98 of macs is out of reach").first.wait_for()
    nni_home.run("nnictl", "stop", experiment)


def test_the_browser_is_a_browser() -> None:
    assert CHROMIUM is not None
    assert "Chrom" in subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True).stdout
