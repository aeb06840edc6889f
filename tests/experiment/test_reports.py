"""``report`` and ``compare`` as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nni_plugins.cli import commands
from nni_plugins.experiment.reports import findings_of
from nni_plugins.report import figures
from tests.experiment.stored import Job, recipe_job, store


@pytest.fixture(autouse=True)
def quick_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fonts for print take as long as all plots."""
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", 3)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder in which NNI knows no experiment."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, list(arguments))


def test_report_of_a_folder_as_json(tmp_path: Path) -> None:
    folder = store(tmp_path / "abcd", [Job(f"t{n}", n / 10) for n in range(3)])
    answer = _run("report", str(folder), "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["chosen"] == "t2"
    assert found["output"] == str(Path("outputs") / "stored-abcd")
    assert (tmp_path / "outputs" / "stored-abcd" / "report.html").is_file()


def test_compare_of_an_experiment_and_a_report(tmp_path: Path) -> None:
    first = store(tmp_path / "one", [recipe_job("a", 0.8), recipe_job("b", 0.7, 200)])
    second = store(tmp_path / "two", [recipe_job("a", 0.82, 500)], {"experimentName": "other"})
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "report.json").write_text(json.dumps(findings_of(str(first)).to_dict()), encoding="utf-8")
    answer = _run("compare", "first", str(second), "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["names"] == ["stored", "other"]
    assert [model["compact"]["macs"] for model in found["models"]] == [400, 500]
    folder = tmp_path / "outputs" / "compare-stored-other"
    assert {path.name for path in folder.iterdir()} == {
        f"compare.{end}" for end in ("html", "md", "json", "png", "pdf")
    }
    again = _run("compare", str(tmp_path / "first" / "report.json"), "first", "--output", "same")
    assert again.exit_code == 0, again.output
    assert "Nothing that is known here" in (tmp_path / "same" / "compare.html").read_text(encoding="utf-8")


def test_compare_of_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    first = store(tmp_path / "one", [recipe_job("a", 0.8)])
    second = store(tmp_path / "two", [Job("a", 0.5)])
    answer = _run("compare", str(first), str(second))
    assert answer.exit_code == 1
    assert "cannot be compared: one measures accuracy, the other default" in answer.output
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    answer = _run("compare", "report.json", str(second))
    assert answer.exit_code == 1
    assert "is not a report of nni-plugins" in answer.output
    answer = _run("compare", "nowhere", str(second))
    assert answer.exit_code == 1
    assert "no such experiment" in answer.output
    assert "Traceback" not in answer.output


def test_a_better_trial_whose_folder_was_deleted_is_named(tmp_path: Path) -> None:
    folder = store(tmp_path / "abcd", [recipe_job("a", 0.8), recipe_job("b", 0.9), recipe_job("c", 0.7)])
    assert json.loads(_run("report", str(folder), "--json").stdout)["chosen"] == "b"
    (gone,) = folder.glob("environments/*/trials/b")
    shutil.rmtree(gone)
    found = json.loads(_run("report", str(folder), "--json").stdout)
    assert found["chosen"] == "a"
    (note,) = (note for note in found["notes"] if "trial b was better" in note)
    assert note == "trial b was better (default 0.9000), and its files are not here any more: this report is on a"
