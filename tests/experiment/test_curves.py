"""Curves read the same over REST and from the database."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from nni_plugins.experiment.curves import LONGEST, curves_from_database, curves_from_rest
from tests.experiment.stored import Job, store


def test_database_and_rest_agree(tmp_path: Path) -> None:
    curves = {"a": [0.1, 0.2, 0.9], "b": [{"default": 0.5, "loss": 2}, float("nan"), "words", None, 3]}
    folder = store(tmp_path / "x", [Job(name, 0.5, curve) for name, curve in curves.items()])
    found = curves_from_database(folder)
    assert found == {"a": [0.1, 0.2, 0.9], "b": [0.5, None, None, None, 3.0]}
    with sqlite3.connect(folder / "db" / "nni.sqlite") as database:
        names = ("timestamp", "trialJobId", "parameterId", "type", "sequence", "data")
        answer = [dict(zip(names, row, strict=True)) for row in database.execute("select * from MetricData")]
    assert curves_from_rest(reversed(answer)) == found


def test_of_a_trial_that_began_again_the_later_report_counts() -> None:
    def one(stamp: int, number: int, value: float) -> dict[str, object]:
        data = json.dumps(json.dumps(value))
        return {"timestamp": stamp, "trialJobId": "a", "type": "PERIODICAL", "sequence": number, "data": data}

    assert curves_from_rest([one(9, 0, 0.4), one(1, 0, 0.1), one(2, 1, 0.2), one(10, 1, 0.5)]) == {"a": [0.4, 0.5]}


def test_a_very_long_curve_is_thinned(tmp_path: Path) -> None:
    folder = store(tmp_path / "x", [Job("a", 1.0, range(3 * LONGEST))])
    curve = curves_from_database(folder)["a"]
    assert len(curve) == LONGEST
    assert curve[:3] == [0, 3, 6]
