"""What a tuner has asked and learnt, kept so that it outlives the process: one line of JSON for each event.

NNI never calls ``save_checkpoint``. After ``nnictl resume`` it sends the finished trials again through
``import_data``, some with the trial's id and some without, and the results of trials that were cut off in the same
way; parameter ids start anew.
:meth:`Journal.match` says which of its trials such a result belongs to, so that none counts twice.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)

RUNNING, DONE, FAILED = "running", "done", "failed"


@dataclass
class Record:
    """One trial as its tuner knows it.

    Attributes
    ----------
    number
        Counts from 0 and never changes.
    parameters
        What the trial works with.
    state
        ``running``, ``done`` or ``failed``.
    value
        Its final result, a number or a dictionary.
    job
        NNI's id of the trial, as far as it is known.
    resumed
        Whether the process that asked for it is gone.
    """

    number: int
    parameters: dict[str, Any]
    state: str = RUNNING
    value: Any = None
    job: str | None = None
    resumed: bool = False

    @property
    def key(self) -> str:
        """The parameters as text: two trials with one key are one point."""
        return canonical(self.parameters)

    def number_of(self, name: str) -> float | None:
        """Return an entry of the result (a plain number is ``default``) as a finite float; None where there is none."""
        value = self.value.get(name) if isinstance(self.value, dict) else self.value if name == "default" else None
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            return float(value)
        return None


class Journal:
    """The trials of one tuner, in memory and in a file of events that is only ever appended to.

    Parameters
    ----------
    path
        The file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        self._file: Any = None
        self._told: list[Record] = []
        self._by_job: dict[str, Record] = {}
        self._by_key: dict[str, list[Record]] = {}
        for event in _events(path):
            try:
                self._replay(event)
            except (KeyError, IndexError, TypeError):
                _logger.warning("%s: an event that cannot be read is left out: %.80s", path, event)
        for record in self.records:
            record.resumed = True

    def ask(self, parameters: dict[str, Any]) -> Record:
        """Note that a trial starts."""
        record = self._add(Record(len(self.records), parameters))
        self._write(event="asked", parameters=parameters)
        return record

    def tell(self, record: Record, value: Any, job: str | None = None) -> None:
        """Note a trial's final result."""
        self._finish(record, value)
        self._write(event="told", number=record.number, value=value, job=job)
        self.name(record, job)

    def fail(self, record: Record) -> None:
        """Note that a trial ended without a result."""
        record.state = FAILED
        self._write(event="failed", number=record.number)

    def name(self, record: Record, job: str | None) -> None:
        """Note NNI's id of a trial."""
        if job is not None:
            record.job = job
            self._by_job[job] = record

    def match(self, parameters: dict[str, Any], value: Any, job: str | None = None) -> Record | None:
        """Return the trial that an imported result belongs to; it is ``done`` if the result is known already.

        None is returned for a result that is new.
        """
        if job is not None and job in self._by_job:
            return self._by_job[job]
        same = [record for record in self._by_key.get(canonical(parameters), []) if job is None or record.job is None]
        open_ones = [record for record in same if record.state != DONE and record.resumed]
        known = [
            record
            for record in same
            if record.state == DONE and (record.resumed or canonical(record.value) == canonical(value))
        ]  # a trial that was done, but not noted so by NNI, is run again: its times differ
        for record in (*(known if job is not None else open_ones), *(open_ones if job is not None else known)):
            return record
        return None

    def done(self) -> list[Record]:
        """Return the finished trials, in the order in which they finished."""
        return list(self._told)

    def seen(self, parameters: dict[str, Any]) -> bool:
        """Whether these parameters were tried, or are being tried; failed trials do not count."""
        return any(record.state != FAILED for record in self._by_key.get(canonical(parameters), []))

    def _add(self, record: Record) -> Record:
        self.records.append(record)
        self._by_key.setdefault(record.key, []).append(record)
        return record

    def _finish(self, record: Record, value: Any) -> None:
        if record.state != DONE:
            self._told.append(record)
        record.state, record.value = DONE, value

    def _replay(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "asked":
            self._add(Record(len(self.records), event["parameters"]))
            return
        record = self.records[event["number"]]
        if kind == "told":
            self._finish(record, event["value"])
            self.name(record, event.get("job"))
        elif kind == "failed":
            record.state = FAILED

    def _write(self, **event: Any) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                whole = not self.path.exists() or self.path.stat().st_size == 0 or _ends_whole(self.path)
                self._file = self.path.open("a", encoding="utf-8")
                self._file.write("" if whole else "\n")
            self._file.write(json.dumps(event, default=str) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk does not end the search: NNI has the results too
            _logger.error("%s: cannot be written (%s); the search goes on, its state is not saved", self.path, error)


def canonical(value: Any) -> str:
    """Return a value as text that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, default=str)


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _events(path: Path | None) -> Iterable[dict[str, Any]]:
    if path is None or not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(event, dict):
            yield event
