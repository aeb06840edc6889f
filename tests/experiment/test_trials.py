"""One trial reads the same over REST and from the database."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.follow import describe, summary
from nni_plugins.experiment.trials import Trial, from_database, from_rest, profile_from_database, ranked

PARAMETERS = {"prune.sparsity": 0.4}
HYPER = json.dumps({"parameter_id": 0, "parameter_source": "algorithm", "parameters": PARAMETERS, "parameter_index": 0})
FINAL = json.dumps(json.dumps({"default": 0.9, "accuracy": 0.95}))


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A stopped experiment: one trial succeeded, one failed, one was cut off; as NNI stores them."""
    (tmp_path / "db").mkdir()
    for name in ("aa", "bb", "cc"):
        (tmp_path / name).mkdir()
    with sqlite3.connect(tmp_path / "db" / "nni.sqlite") as database:
        database.execute(
            "create table TrialJobEvent (timestamp integer, trialJobId text, event text, data text, logPath text, "
            "sequenceId integer, message text, environmentId text)"
        )
        database.execute(
            "create table MetricData (timestamp integer, trialJobId text, parameterId text, type text, "
            "sequence integer, data text)"
        )
        database.execute(
            "create table ExperimentProfile (params text, id text, execDuration integer, startTime integer, "
            "endTime integer, logDir text, nextSequenceId integer, revision integer)"
        )
        for stamp, trial, event, sequence in (
            (1000, "aa", "WAITING", 0),
            (2000, "aa", "RUNNING", 0),
            (2500, "bb", "RUNNING", 1),
            (9000, "aa", "SUCCEEDED", 0),
            (9500, "bb", "FAILED", 1),
            (9900, "", "IMPORT_DATA", None),
            (9950, "cc", "RUNNING", 2),
        ):
            values = (stamp, trial, event, HYPER, str(tmp_path / trial), sequence, None, None)
            database.execute("insert into TrialJobEvent values (?,?,?,?,?,?,?,?)", values)
        database.execute("insert into MetricData values (8000,'aa','0','PERIODICAL',0,'\"0.1\"')")
        database.execute("insert into MetricData values (8900,'aa','0','FINAL',0,?)", (FINAL,))
        for revision in (1, 2):
            profile = (json.dumps({"revision": revision}), "x", 12, 1000, 2000, "", 3, revision)
            database.execute("insert into ExperimentProfile values (?,?,?,?,?,?,?,?)", profile)
    return tmp_path


def test_database_tells_what_rest_told(experiment: Path) -> None:
    first, second, third = from_database(experiment)
    answer = {
        "trialJobId": "aa",
        "status": "SUCCEEDED",
        "hyperParameters": [HYPER],
        "startTime": 2000,
        "endTime": 9000,
        "logPath": str(experiment / "aa"),
        "sequenceId": 0,
        "finalMetricData": [{"data": FINAL}],
    }
    assert from_rest([answer]) == [first]
    assert first.metrics == {"default": 0.9, "accuracy": 0.95}
    assert first.parameters == PARAMETERS
    assert (second.status, second.ended) == ("FAILED", 9.5)
    assert third.status == "UNFINISHED"
    assert profile_from_database(experiment)["params"] == {"revision": 2}


def test_a_number_is_a_metric_too() -> None:
    (trial,) = from_rest([{"trialJobId": "a", "status": "SUCCEEDED", "finalMetricData": [{"data": '"0.5"'}]}])
    assert trial.default == 0.5


def test_being_ranked_needs_success_and_its_files(experiment: Path) -> None:
    trials = from_database(experiment)
    assert ranked(trials) == []
    (experiment / "aa" / "metrics.json").write_text('{"macs": 1}', encoding="utf-8")
    assert [trial.id for trial in ranked(trials)] == ["aa"]


def test_a_folder_without_an_experiment_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"db/nni\.sqlite is missing"):
        from_database(tmp_path)
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "nni.sqlite").write_bytes(b"not a database at all")
    with pytest.raises(ExperimentError, match="cannot be read"):
        from_database(tmp_path)


def test_progress_in_words(experiment: Path) -> None:
    trials = from_database(experiment)
    assert summary(trials) == "best 0.9000, 1 failed, 1 succeeded, 1 unfinished"
    assert describe(trials[0]) == "default 0.9000, accuracy 0.9500"
    assert describe(trials[1]).startswith("failed: ")
    assert describe(Trial("d", 3, "EARLY_STOPPED")) == "early stopped"


@pytest.mark.parametrize(
    "statement",
    [
        "drop table ExperimentProfile",
        "update ExperimentProfile set params='not json'",
        "alter table ExperimentProfile rename column params to other",
    ],
)
def test_a_database_that_is_not_as_nnis_is_one_line(experiment: Path, statement: str) -> None:
    with sqlite3.connect(experiment / "db" / "nni.sqlite") as database:
        database.execute(statement)
    with pytest.raises(ExperimentError, match=r"nni\.sqlite: NNI's database is damaged, or none of NNI's"):
        profile_from_database(experiment)


def test_a_damaged_database_is_one_line(experiment: Path) -> None:
    path = experiment / "db" / "nni.sqlite"
    content = bytearray(path.read_bytes())
    content[4200:] = b"\x55" * (len(content) - 4200)
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match="database"):
        from_database(experiment)


def test_folders_may_have_any_name(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    odd = tmp_path_factory.mktemp("x") / "50% of #1?"
    shutil.copytree(experiment, odd)
    assert len(from_database(odd)) == 3


def test_what_nni_calls_accuracy_has_its_own_name(tmp_path: Path) -> None:
    assert Trial("aa", 0, "SUCCEEDED").quality == "accuracy"
    (tmp_path / "metrics.json").write_text('{"metric": "mse", "accuracy": 0.2}', encoding="utf-8")
    assert Trial("aa", 0, "SUCCEEDED", folder=tmp_path).quality == "mse"
