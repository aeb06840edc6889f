"""One trial as NNI tells of it: over REST while its manager runs, from NNI's database when it does not.

The database is never opened while the manager runs: a reader's lock can make NNI's writer fail, which ends the
experiment.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.folders import FAILURE, METRICS, failure_reason, read_json

ENDED = ("SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED")
UNFINISHED = "UNFINISHED"
EXHAUSTED = "TUNER_NO_MORE_TRIAL"
"""Where an experiment stays for ever when its tuner has tried all there is before ``maxTrialNumber`` is reached."""
STATUS_EVENTS = ("WAITING", "RUNNING", "UNKNOWN", *ENDED)


@dataclass(frozen=True)
class Trial:
    """One trial of an experiment.

    Attributes
    ----------
    id, sequence
        NNI's name and number for it.
    status
        NNI's word: ``WAITING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED``, ``EARLY_STOPPED``, ``USER_CANCELED`` …
        ``UNFINISHED`` for a trial that was cut off when its experiment stopped: it runs again on resume.
    parameters
        The tuner's values, by dotted path of the recipe.
    metrics
        The final result (``default``, ``accuracy``, ``macs`` …), empty where there is none yet.
    started, ended
        Seconds since the epoch, or ``None``.
    folder
        The trial's output folder, where it is on this machine.
    """

    id: str
    sequence: int
    status: str
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    folder: Path | None = None

    @property
    def default(self) -> float | None:
        """What the tuner maximises, or ``None`` for a trial without a final result."""
        value = self.metrics.get("default")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return None
        return float(value)

    @property
    def quality(self) -> str:
        """What its quality is called: NNI is told of it as ``accuracy``, which may be an error instead."""
        known = read_json(self.folder / METRICS) if self.folder is not None else None
        return str((known or {}).get("metric") or "accuracy")

    @property
    def reason(self) -> str:
        """Why the trial failed, was lost with its machine, or has no result; empty for one that did well."""
        if self.status == "FAILED":
            return failure_reason(self.folder)
        if self.status in ("USER_CANCELED", "SYS_CANCELED") and self.folder is not None:
            return str((read_json(self.folder / FAILURE) or {}).get("reason", ""))
        if self.status == "SUCCEEDED" and not self.metrics:
            known = read_json(self.folder / FAILURE) if self.folder is not None else None
            return str((known or {}).get("reason") or "it ended without a final result")
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The trial as plain data, for ``--json``."""
        return {
            "id": self.id,
            "sequence": self.sequence,
            "status": self.status,
            "parameters": self.parameters,
            "metrics": self.metrics,
            "started": self.started,
            "ended": self.ended,
            "folder": None if self.folder is None else str(self.folder),
            "reason": self.reason,
        }


def from_rest(answer: Iterable[dict[str, Any]], experiment: Path | None = None) -> list[Trial]:
    """The trials in the answer of ``GET /trial-jobs``, by number; `experiment` is the experiment's folder."""
    return _by_number(
        Trial(
            id=job["trialJobId"],
            sequence=int(job.get("sequenceId", -1)),
            status=job["status"],
            parameters=_parameters((job.get("hyperParameters") or [None])[-1]),
            metrics=_metrics((job.get("finalMetricData") or [{}])[-1].get("data")),
            started=_seconds(job.get("startTime")),
            ended=_seconds(job.get("endTime")),
            folder=_folder(job.get("logPath"), experiment),
        )
        for job in answer
    )


def from_database(experiment: Path) -> list[Trial]:
    """The trials of a stopped experiment, from ``db/nni.sqlite`` in its folder, by number.

    Raises
    ------
    ExperimentError
        When there is no database, or none of NNI's.
    """
    found: dict[str, dict[str, Any]] = {}
    with reading(experiment) as database:
        events = "select timestamp, trialJobId, event, data, logPath, sequenceId from TrialJobEvent"
        for stamp, trial, event, data, folder, sequence in database.execute(f"{events} order by timestamp, rowid"):
            if event not in STATUS_EVENTS or not trial:
                continue
            entry = found.setdefault(trial, {"parameters": {}, "sequence": -1, "started": None, "folder": None})
            entry["status"] = event if event in ENDED else UNFINISHED
            entry["ended"] = _seconds(stamp) if event in ENDED else None
            entry["parameters"] = _parameters(data) or entry["parameters"]
            entry["folder"] = _folder(folder, experiment) or entry["folder"]
            if sequence is not None:
                entry["sequence"] = int(sequence)
            if event == "RUNNING":
                entry["started"] = _seconds(stamp)
        for trial, data in database.execute(
            "select trialJobId, data from MetricData where type='FINAL' order by timestamp"
        ):
            if trial in found:
                found[trial]["metrics"] = _metrics(data)
    return _by_number(Trial(id=trial, **entry) for trial, entry in found.items())


def profile_from_database(experiment: Path) -> dict[str, Any]:
    """NNI's profile of a stopped experiment: ``params`` (its configuration), ``startTime``, ``execDuration`` …"""
    with reading(experiment) as database:
        row = database.execute(
            "select params, id, execDuration, startTime, endTime from ExperimentProfile order by revision desc limit 1"
        ).fetchone()
        if row is None:
            raise ExperimentError(f"{experiment}: NNI stored no profile; the experiment never started")
        names = ("params", "id", "execDuration", "startTime", "endTime")
        return dict(zip(names, (json.loads(row[0]), *row[1:]), strict=True))


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The succeeded trials whose metrics are in their folders: the best first, of equal ones the cheapest."""
    succeeded = [trial for trial in trials if trial.status == "SUCCEEDED" and trial.default is not None]
    order = sorted(succeeded, key=lambda trial: (-(trial.default or 0.0), trial.metrics.get("macs", 0), trial.sequence))
    return [trial for trial in order if trial.folder and read_json(trial.folder / METRICS)]


@contextmanager
def reading(experiment: Path) -> Iterator[sqlite3.Connection]:
    """NNI's database of a stopped experiment, for the time of the block.

    Raises
    ------
    ExperimentError
        When there is no database, or it is damaged, or none of NNI's.
    """
    with closing(_connect(experiment)) as database:
        try:
            yield database
        except (sqlite3.Error, ValueError, TypeError) as error:
            path = experiment / "db" / "nni.sqlite"
            raise ExperimentError(f"{path}: NNI's database is damaged, or none of NNI's ({error})") from None


def _connect(experiment: Path) -> sqlite3.Connection:
    path = experiment / "db" / "nni.sqlite"
    if not path.is_file():
        raise ExperimentError(f"{experiment}: no experiment of NNI's is stored here (db/nni.sqlite is missing)")
    try:
        database = sqlite3.connect(f"file:{quote(path.as_posix())}?mode=ro", uri=True, timeout=5)
        database.execute("select 1 from TrialJobEvent limit 1")
    except sqlite3.Error as error:
        raise ExperimentError(f"{path}: NNI's database cannot be read ({error})") from None
    return database


def _by_number(trials: Iterable[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: (trial.sequence, trial.id))


def _parameters(text: str | None) -> dict[str, Any]:
    try:
        record = json.loads(text) if text else {}
    except ValueError:
        return {}
    parameters = record.get("parameters") if isinstance(record, dict) else None
    if not isinstance(parameters, dict):
        return {}
    sample = parameters.get("sample")  # of an architecture search, whose parameters are a whole model space
    return sample if "model_symbol" in parameters and isinstance(sample, dict) else parameters


def _metrics(text: str | None) -> dict[str, Any]:
    """NNI stores a metric as JSON in JSON: a number, or a dictionary with ``default``."""
    try:
        value = json.loads(text) if text else {}
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return {}
    if isinstance(value, dict):
        return value
    try:
        return {"default": float(value)}
    except (TypeError, ValueError):  # whatever a trial of somebody's own reported
        return {}


def _seconds(milliseconds: Any) -> float | None:
    return None if not isinstance(milliseconds, (int, float)) else milliseconds / 1000


IN_EXPERIMENT = re.compile(r"environments[/\\]([\w.-]+)[/\\]trials[/\\]([\w.-]+)[/\\]?$")
"""The end of a trial's path, below its experiment's folder."""


def _folder(path: str | None, experiment: Path | None) -> Path | None:
    """Where a trial's files are on this machine.

    NNI gives a local trial's folder as a path or as ``file://host:path``, and a remote one's as ``host:path``. The
    folder of that name below `experiment` counts first: a remote trial's files are brought there, and there they are
    when the experiment's folder was moved.
    """
    if not path:
        return None
    end = IN_EXPERIMENT.search(path)
    if end and experiment is not None and not {".", ".."} & set(end.groups()):
        folder = experiment / "environments" / end[1] / "trials" / end[2]
        if folder.is_dir():
            return folder
    folder = Path(path.split("://", 1)[1].split(":", 1)[1]) if path.startswith("file://") else Path(path)
    return folder if folder.is_dir() else None
