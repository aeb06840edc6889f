"""The test split is read once for a winner, counted when there is another one, and not at all where that is asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nni_plugins.experiment import evaluate
from nni_plugins.experiment.evaluate import RECORD, TEST, evaluated
from nni_plugins.experiment.finish import look
from nni_plugins.experiment.manifest import Known, moved
from nni_plugins.report.findings import Findings, StockCheck
from nni_plugins.report.sections import headline
from tests.experiment.stored import Job, store


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of two trials whose models are real."""
    from nni_plugins.training import compress, load_recipe, prepare_dense

    folder = tmp_path_factory.mktemp("experiments") / "abcd"
    recipe_file = tmp_path_factory.mktemp("recipe") / "recipe.yml"
    recipe_file.write_text(
        "model: {name: mlp}\ndata: {name: digits, limit: 120}\ntrain: {epochs: 1, threads: 1}\n"
        "prune: {pruner: magnitude, sparsity: 0.5, target: channels}\nfinetune: {epochs: 1}\n",
        encoding="utf-8",
    )
    recipe = load_recipe(recipe_file)
    trials = folder / "environments" / "local-env" / "trials"
    found = compress(recipe, trials / "a", prepare_dense(recipe, folder / "dense", lambda line: None))
    shutil.copytree(trials / "a", folder.parent / "kept")
    shutil.rmtree(trials)
    dense = folder.parent / "dense"
    (folder / "dense").rename(dense)
    folder.rmdir() if not any(folder.iterdir()) else shutil.rmtree(folder)
    store(folder, [Job("a", found), Job("b", {**found, "default": found["default"] / 2})])
    dense.rename(folder / "dense")
    for name in "ab":
        shutil.copytree(folder.parent / "kept", trials / name, dirs_exist_ok=True)
    return folder


@pytest.fixture
def known(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Known:
    """A copy of it, of which times and NNI's speedup are not asked: they take seconds each."""
    monkeypatch.setattr(evaluate, "latencies", lambda *paths: [2.0, 1.0])
    monkeypatch.setattr(evaluate, "stock_check", lambda *_: StockCheck(True, 0.0))
    shutil.copytree(ran, tmp_path / "abcd")
    return moved(tmp_path / "abcd")


def _evaluated(known: Known, name: str, read_test: bool = True) -> Findings:
    findings = replace(look(known), chosen=name, notes=())
    winner = next(trial for trial in known.trials() if trial.id == name)
    return evaluated(findings, known, winner, lambda line: None, read_test)


def _test(findings: Findings) -> Any:
    assert findings.compact is not None
    return findings.compact.test


def test_once_for_a_winner_and_counted_for_another(known: Known) -> None:
    first = _evaluated(known, "a")
    assert first.notes == ()
    assert first.tested == ["a"]
    assert 0 <= _test(first) <= 1
    assert "was read once, at the end" in headline(first)[1]
    record = json.loads((known.folder / TEST).read_text(encoding="utf-8"))
    (known.folder / TEST).write_text(json.dumps({**record, "compact": 0.123}), encoding="utf-8")
    assert _test(_evaluated(known, "a")) == 0.123  # from the record: not read again
    assert _test(_evaluated(known, "a", read_test=False)) == 0.123
    second = _evaluated(known, "b")
    assert second.tested == ["a", "b"]
    assert _test(second) != 0.123
    assert "was read 2 times" in headline(second)[1]


def test_not_at_all_where_that_is_asked(known: Known) -> None:
    found = _evaluated(known, "a", read_test=False)
    assert _test(found) is None
    assert not (known.folder / TEST).exists()
    assert any("left unread" in note for note in found.notes)
    assert found.compact is not None
    assert (found.compact.latency_ms, found.tested) == (1.0, [])


def test_a_copy_elsewhere_has_what_was_measured(known: Known) -> None:
    here = _evaluated(known, "a")
    assert (known.folder / RECORD).is_file()
    shutil.rmtree(known.folder / "dense")  # so that nothing can be run
    there = look(known)
    assert there.compact == here.compact
    assert there.dense == here.dense
    assert there.stock == here.stock
    assert there.tested == ["a"]
    again = _evaluated(known, "a")
    assert again.compact == here.compact
    assert any("dense model is not in the experiment's folder" in note for note in again.notes)


def test_a_record_that_cannot_be_kept_is_said(known: Known) -> None:
    (known.folder / TEST).mkdir()  # in the way, also of root
    found = _evaluated(known, "a")
    assert any("would be read again each time" in note for note in found.notes)
