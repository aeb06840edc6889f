"""Findings from what lies in an experiment's folder: of a recipe's trials, and of anybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.finish import finish, look
from nni_plugins.experiment.folders import told_to_nni
from nni_plugins.experiment.gather import plan_of
from nni_plugins.experiment.manifest import moved
from nni_plugins.report import figures
from nni_plugins.report.findings import Findings
from tests.experiment.stored import Job, metrics, recipe_job, store


@pytest.fixture(autouse=True)
def quick_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fonts for print take as long as all plots."""
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", 3)


def _look(tmp_path: Path, jobs: list[Job], **config: Any) -> Findings:
    return look(moved(store(tmp_path / "abcd", jobs, config)))


def test_what_a_recipes_trials_left_is_read(tmp_path: Path) -> None:
    failed = Job("c", status="FAILED", files={"failure.json": {"reason": "it broke"}})
    found = _look(tmp_path, [recipe_job("a", 0.8), recipe_job("b", 0.85, 300), failed])
    assert (found.title, found.chosen, found.metric, found.state) == ("stored", "b", "accuracy", "finished")
    assert found.dense is not None
    assert found.compact is not None
    assert (found.dense.macs, found.compact.macs, found.compact.validation) == (1000, 300, 0.85)
    assert found.compact.latency_ms is None  # taken while others ran: nothing to compare with
    assert [(layer.name, layer.size, layer.kept) for layer in found.layers] == [("conv1", 4, 3), ("conv2", 8, 1)]
    assert found.bounds == {"macs": 0.5}
    assert [one.curve for one in found.candidates] == [(0.4, 0.8), (0.425, 0.85), ()]
    assert found.candidates[2].note == "it broke"
    assert found.candidates[0].latency_ms == 4.0
    assert found.relative_error == 1e-7


def test_numbers_of_anybodys_trials_are_enough(tmp_path: Path) -> None:
    jobs = [Job(name, value, [value]) for name, value in (("a", 0.3), ("b", 0.1), ("c", 0.2))]
    found = _look(tmp_path, jobs, tuner={"name": "TPE"})  # NNI's TPE minimises unless it is told otherwise
    assert (found.metric, found.maximize, found.higher_is_better, found.chosen) == ("default", False, False, "b")
    assert found.dense is found.compact is None
    assert [one.id for one in found.best_first()] == ["b", "c", "a"]


def test_dictionaries_of_anybodys_trials_keep_their_figures(tmp_path: Path) -> None:
    jobs = [
        Job(f"t{n}", {"default": n / 10, "latency_ms": 5.0 - n, "loss": n, "words": "x", "nan": float("nan")})
        for n in range(4)
    ]
    found = _look(tmp_path, jobs, maxTrialNumber=4)
    assert found.candidates[1].others == {"loss": 1}
    assert found.candidates[1].latency_ms == 4.0
    assert [one.id for one in found.front()] == ["t3"]


@pytest.mark.parametrize("final", ["words", None, [1, 2], {"accuracy": 1}, float("inf")])
def test_results_that_are_none_do_not_end_the_report(tmp_path: Path, final: Any) -> None:
    found = _look(tmp_path, [Job("a", final), Job("b", 0.5)])
    assert found.chosen == "b"
    assert found.candidates[0].default is None


def test_a_search_that_ended_early_is_stopped(tmp_path: Path) -> None:
    assert _look(tmp_path, [Job("a", 0.5)], maxTrialNumber=9).state == "stopped"


def test_a_moved_experiment_is_reported_on_without_its_code_and_without_its_secrets(tmp_path: Path) -> None:
    objectives = [{"name": "accuracy", "direction": "maximize"}, {"name": "macs", "direction": "minimize"}]
    tuner = {"className": "nni_plugins.search.OptunaTuner", "classArgs": {"seed": 3, "objectives": objectives}}
    service = {"platform": "remote", "machineList": [{"host": "h", "user": "u", "password": "hunter2"}]}
    config = {"tuner": tuner, "trainingService": service}
    jobs = [recipe_job("a", 0.8), recipe_job("b", 0.7)]
    folder = store(tmp_path / "abcd", jobs, config, at=Path("/gone/abcd"))
    (folder / "test.json").write_text('{"trial": "a", "dense": 0.9, "compact": 0.79}', encoding="utf-8")
    findings, output = finish(moved(folder), tmp_path / "out", lambda line: None)
    assert findings.compact is not None
    assert findings.compact.test == 0.79  # as it was read once; not again
    assert any("not run again here" in note for note in findings.notes)
    assert findings.search["tuner"] == "nni_plugins.search.OptunaTuner (seed 3)"
    assert findings.search["objectives"] == objectives
    assert [one.target for one in findings.importance] == ["accuracy", "macs"]
    names = {"report.html", "report.md", "report.json", "pareto.png", "plots", "best"}
    assert {path.name for path in output.iterdir()} == names
    assert (output / "best" / "compact.safetensors").read_text(encoding="utf-8") == "weights"
    assert "79.00%" in (output / "report.html").read_text(encoding="utf-8")
    for path in output.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


def test_files_on_another_machine_are_said_to_be_there(tmp_path: Path) -> None:
    job = recipe_job("a", 0.8)
    findings, output = finish(
        moved(store(tmp_path / "abcd", [Job("a", job.final)])), tmp_path / "out", lambda line: None
    )
    assert findings.compact is not None
    assert findings.compact.macs == 400
    assert not (output / "best").exists()


def test_when_all_failed_there_is_a_page_with_the_reasons_and_an_error(tmp_path: Path) -> None:
    jobs = [Job(name, status="FAILED", files={"failure.json": {"reason": f"<b>{name} broke"}}) for name in "ab"]
    with pytest.raises(
        ExperimentError, match=r"no trial succeeded, 2 of 2 failed; trial a: <b>a broke; .*report\.html"
    ):
        finish(moved(store(tmp_path / "abcd", jobs)), tmp_path / "out", lambda line: None)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;b broke" in page
    assert "No trial has a result" in page


def test_where_no_unit_went_the_weights_that_masks_keep_are_told(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    mask = np.ones((4, 5), dtype=bool)
    mask[:2] = False
    save_file({"a.b.weight": mask, "a.b.bias": np.zeros(4, dtype=bool)}, tmp_path / "masks.safetensors")
    (tmp_path / "plan.json").write_text('{"groups": {"a": {"size": 2, "kept": [0, 1]}}}', encoding="utf-8")
    layers, blocks = plan_of(tmp_path)
    assert [(layer.name, layer.size, layer.kept, layer.kind) for layer in layers] == [("a.b", 20, 10, "weights")]
    assert blocks == []
    (tmp_path / "plan.json").write_text('{"groups": {"a": {"size": 2, "kept": [0]}}}', encoding="utf-8")
    assert [(layer.name, layer.kind) for layer in plan_of(tmp_path)[0]] == [("a", "units")]
    assert plan_of(tmp_path / "nowhere") == ([], [])


def test_what_nni_was_told_is_enough_where_the_files_are_elsewhere(tmp_path: Path) -> None:
    told = [told_to_nni(metrics(0.8)), told_to_nni({**metrics(0.9), "broken_bounds": {"macs": 0.5}, "default": -4.1})]
    found = _look(tmp_path, [Job("a", told[0]), Job("b", told[1]), Job("c", 0.1)])
    assert (found.chosen, found.metric, found.compact) == ("a", "accuracy", None)
    assert [one.feasible for one in found.candidates] == [True, False, True]
    assert found.candidates[0].macs == 400
    assert found.candidates[0].others == {}
    assert [one.id for one in found.front()] == ["a"]


def test_a_result_that_is_the_metric_with_the_other_sign_makes_less_better(tmp_path: Path) -> None:
    jobs = [Job(f"t{n}", {"default": -n, "accuracy": n, "macs": 100 - n}) for n in (3, 1, 2)]
    found = _look(tmp_path, jobs)
    assert (found.chosen, found.metric, found.higher_is_better) == ("t1", "metric", False)
