"""Where a trial writes, and how its reason is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nni_plugins.experiment.folders import dense_folder, failure_reason, read_json, trial_output, write_failure


def test_trials_of_one_experiment_share_one_dense_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_EXP_ID", "abcd1234")
    root = tmp_path / "abcd1234"
    outputs = [root / "environments" / "local-env" / "trials" / name for name in ("one", "two")]
    assert {dense_folder(output) for output in outputs} == {root / "dense"}


def test_outside_nni_everything_stays_under_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NNI_OUTPUT_DIR", raising=False)
    monkeypatch.delenv("NNI_EXP_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    assert trial_output() == Path("outputs/trial")
    assert dense_folder(trial_output()) == tmp_path / "outputs" / "dense"


def test_reason_is_the_written_one_then_the_last_words(tmp_path: Path) -> None:
    assert "trial.log" in failure_reason(tmp_path)
    (tmp_path / "trial.stderr").write_text("Traceback\nImportError: no such thing\n", encoding="utf-8")
    assert failure_reason(tmp_path) == "ImportError: no such thing"
    with (tmp_path / "trial.stderr").open("r+b") as file:  # a trial that printed 100 GB, none of which is on the disk
        file.truncate(100 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last words\n")
    assert failure_reason(tmp_path) == "the last words"
    (tmp_path / "trial.stderr").unlink()
    write_failure(tmp_path, "budget out of reach", ValueError("budget"), {"prune.sparsity": 0.99})
    assert failure_reason(tmp_path) == "budget out of reach"
    assert read_json(tmp_path / "failure.json") == {
        "reason": "budget out of reach",
        "error": "ValueError",
        "parameters": {"prune.sparsity": 0.99},
    }
    assert "not on this machine" in failure_reason(None)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_broken_file_reads_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json") is None
