"""Going on with a stopped experiment: NNI reads its own stored configuration, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.resume import change_stored, load_stopped
from nni_plugins.experiment.trials import profile_from_database
from tests.experiment.stored import store


def test_more_trials_than_before_are_stored_where_nni_reads_them(tmp_path: Path) -> None:
    folder = store(tmp_path / "abcd1234", [])
    before = profile_from_database(folder)
    change_stored(folder, {"maxTrialNumber": 9})
    after = profile_from_database(folder)
    assert after["params"].pop("maxTrialNumber") == 9
    assert before["params"].pop("maxTrialNumber") == 3
    assert after == before


def test_what_cannot_be_resumed_is_one_line(tmp_path: Path) -> None:
    running = Known("abcd1234", "small", "RUNNING", 8080, tmp_path)
    with pytest.raises(ExperimentError, match="still runs on port 8080; `nnictl stop abcd1234`"):
        load_stopped(running)
    search = Known("nas12345", "nas", "STOPPED", None, store(tmp_path / "nas12345", [], {"experimentType": "nas"}))
    with pytest.raises(ExperimentError, match="is an architecture search; give its folder too"):
        load_stopped(search)
    with pytest.raises(ExperimentError, match="no experiment of NNI's is stored here"):
        load_stopped(Known("gone1234", "gone", "STOPPED", None, tmp_path / "gone1234"))
