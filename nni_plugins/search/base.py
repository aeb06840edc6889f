"""What the tuners share: NNI's calls in any order and from two threads, saved after each, found again on resume."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from typing import Any

from nni.tuner import Tuner

from nni_plugins.search.journal import DONE, FAILED, RUNNING, Journal, Record
from nni_plugins.search.places import checkpoint_folder

_logger = logging.getLogger(__name__)


class RecordedTuner(Tuner):
    """A tuner that keeps a :class:`Journal` of its trials.

    A method overrides :meth:`_set_space`, :meth:`_suggest` and, as far as it needs them, :meth:`_started`,
    :meth:`_learn` and :meth:`_failed`; all are called under one lock.
    """

    name = "tuner"

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._running: dict[int, Record] = {}
        self._ready = False
        self.journal = Journal()

    # What a method defines

    def _set_space(self, space: dict[str, Any]) -> None:
        """Take a search space, the first one or a new one; raise SearchError where it cannot be used."""
        raise NotImplementedError

    def _suggest(self) -> dict[str, Any]:
        """Return the parameters of one more trial."""
        raise NotImplementedError

    def _started(self, record: Record) -> None:
        """A trial got its number: what :meth:`_suggest` has just returned, or one of an earlier process."""

    def _learn(self, record: Record) -> None:
        """A trial has its result, in ``record.value``; until ``_ready`` it is one of an earlier process."""

    def _learnt(self, results: int) -> None:
        """So many new results have been given to :meth:`_learn`."""

    def _failed(self, record: Record) -> None:
        """A trial ended without a result."""

    def _restored(self) -> None:
        """All that the journal held has been given to the methods above."""

    # What NNI calls

    def update_search_space(self, search_space: dict[str, Any]) -> None:
        """Take the search space; the first time, also what an earlier process of this experiment learnt."""
        with self._lock:
            self._set_space(search_space)
            if self._ready:
                return
            folder = checkpoint_folder()
            self.journal = Journal(folder / f"{self.name}.jsonl" if folder else None)
            for record in self.journal.records:
                self._started(record)
                if record.state == FAILED:
                    self._failed(record)
            for record in self.journal.done():
                self._learn(record)
            if self.journal.records:
                _logger.info("%s: %d trials found again", self.name, len(self.journal.records))
                self._restored()
            self._ready = True

    def generate_parameters(self, parameter_id: int, **kwargs: Any) -> dict[str, Any]:
        """Return the parameters of one more trial."""
        with self._lock:
            parameters = self._suggest()
            record = self.journal.ask(parameters)
            self._running[parameter_id] = record
            self._started(record)
            return parameters

    def receive_trial_result(self, parameter_id: int, parameters: Any, value: Any, **kwargs: Any) -> None:
        """Learn a trial's final result; one for which nobody asked counts too."""
        with self._lock:
            job = kwargs.get("trial_job_id")
            record = self._running.get(parameter_id)
            if record is None or (record.state == DONE and job != record.job):
                record = self.journal.ask(dict(parameters))
                self._started(record)
            elif record.state == DONE:
                return  # twice the same
            self.journal.tell(record, value, job)
            self._learn(record)
            self._learnt(1)

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """Note a trial that failed or was stopped. Its result, if there is one, may come before or after."""
        with self._lock:
            record = self._running.get(parameter_id)
            if record is not None and record.state == RUNNING and not success:
                self.journal.fail(record)
                self._failed(record)

    def import_data(self, data: Any) -> None:
        """Learn results of other trials: of this experiment before it was resumed (which count once), or others."""
        with self._lock:
            before = len(self.journal.done())
            for parameters, value, job in _entries(data):
                record = self.journal.match(parameters, value, job)
                if record is not None and record.state == DONE:
                    self.journal.name(record, job)
                    continue
                if record is None:
                    record = self.journal.ask(parameters)
                    self._started(record)
                self.journal.tell(record, value, job)
                self._learn(record)
            if len(self.journal.done()) > before:
                self._learnt(len(self.journal.done()) - before)

    def load_checkpoint(self) -> None:
        """NNI calls this before the search space is known; the state is read with it."""


def _entries(data: Any) -> Iterable[tuple[dict[str, Any], Any, str | None]]:
    """Yield parameters, result and trial id of what NNI hands to ``import_data``; what has no result is left out."""
    if isinstance(data, str):
        data = json.loads(data)
    for entry in data:
        if isinstance(entry, str):
            entry = json.loads(entry)
        parameters, value = entry.get("parameter", entry.get("parameters")), entry.get("value")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(parameters, dict) or value is None:
            _logger.warning("import_data: an entry without parameters or result is left out: %.80s", entry)
            continue
        yield parameters, value, entry.get("trialJobId")
