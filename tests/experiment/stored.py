"""A stopped experiment as NNI leaves it: its folder with the database, in NNI's own schema, and its trials' folders."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = (
    "create table TrialJobEvent (timestamp integer, trialJobId text, event text, data text, logPath text, "
    "sequenceId integer, message text, environmentId text)",
    "create table MetricData (timestamp integer, trialJobId text, parameterId text, type text, sequence integer, data text)",
    "create table ExperimentProfile (params text, id text, execDuration integer, startTime integer, endTime integer, "
    "logDir text, nextSequenceId integer, revision integer)",
)
CONFIG = {
    "experimentName": "stored",
    "maxTrialNumber": 3,
    "trialCodeDirectory": "/somewhere/else",
    "searchSpace": {"prune.sparsity": {"_type": "uniform", "_value": [0, 1]}},
    "tuner": {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}},
}
RECIPE = "data: {name: digits}\nobjective: {macs: 0.5}\nspeedup: {tolerance: 1.0e-05}\n"


@dataclass
class Job:
    """One trial: its parameters, what it reported, how it ended."""

    id: str
    final: Any = None
    curve: Sequence[Any] = ()
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"prune.sparsity": 0.5})
    status: str = "SUCCEEDED"
    files: Mapping[str, Any] = field(default_factory=dict)


def metrics(accuracy: float, macs: int = 400, **more: Any) -> dict[str, Any]:
    """What a trial of a recipe reports."""
    return {
        "default": accuracy,
        "accuracy": accuracy,
        "macs": macs,
        "params": macs // 10,
        "latency_ms": macs / 100,
        "bytes": macs * 2,
        "max_error": 1e-6,
        "relative_error": 1e-7,
        "feasible": True,
        "finetuned": True,
        "metric": "accuracy",
        "higher_is_better": True,
        "dense": {"accuracy": 0.9, "macs": 1000, "params": 100, "latency_ms": 9.0, "bytes": 2000, "metric": "accuracy"},
        **more,
    }


def recipe_job(name: str, accuracy: float, macs: int = 400, **more: Any) -> Job:
    """A trial of a recipe, with its files."""
    found = metrics(accuracy, macs)
    plan = {"groups": {"conv1": {"size": 4, "kept": [0, 2, 3]}, "conv2": {"size": 8, "kept": [1]}}, "report": {}}
    files = {"metrics.json": found, "plan.json": plan, "recipe.yml": RECIPE, "compact.safetensors": "weights"}
    return Job(name, found, [accuracy / 2, accuracy], **{"files": files, **more})


def store(folder: Path, jobs: Sequence[Job], config: Mapping[str, Any] | None = None, at: Path | None = None) -> Path:
    """Write the experiment into `folder`, as if it had run in the folder `at`."""
    (folder / "db").mkdir(parents=True)
    home = folder if at is None else at
    with sqlite3.connect(folder / "db" / "nni.sqlite") as database:
        for statement in SCHEMA:
            database.execute(statement)
        profile = (json.dumps({**CONFIG, **(config or {})}), folder.name, 90, 1000, 2000, "", len(jobs), 1)
        database.execute("insert into ExperimentProfile values (?,?,?,?,?,?,?,?)", profile)
        for number, job in enumerate(jobs):
            place = Path("environments") / "local-env" / "trials" / job.id
            (folder / place).mkdir(parents=True)
            for name, content in job.files.items():
                text = content if isinstance(content, str) else json.dumps(content)
                (folder / place / name).write_text(text, encoding="utf-8")
            given = json.dumps({"parameter_id": number, "parameters": dict(job.parameters), "parameter_index": 0})
            for stamp, event in ((1000, "WAITING"), (2000, "RUNNING"), (9000, job.status)):
                row = (stamp + number, job.id, event, given, str(home / place), number, None, None)
                database.execute("insert into TrialJobEvent values (?,?,?,?,?,?,?,?)", row)
            reports = [("PERIODICAL", index, value) for index, value in enumerate(job.curve)]
            reports += [("FINAL", 0, job.final)] if job.final is not None else []
            for kind, index, value in reports:
                text = json.dumps(json.dumps(value))
                row2 = (8000 + index, job.id, str(number), kind, index, text)
                database.execute("insert into MetricData values (?,?,?,?,?,?)", row2)
    return folder
