"""Following an experiment ends in every case, and says why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nni_plugins.experiment.errors import ExperimentError, Interrupted
from nni_plugins.experiment.follow import LineDisplay, LiveDisplay, wait
from nni_plugins.experiment.trials import Trial

DONE = Trial("aa", 0, "SUCCEEDED", metrics={"default": 0.9})
RUNNING = Trial("bb", 1, "RUNNING")


class Script:
    """An experiment that goes through these states; the last one stays."""

    id, folder, resume_command = "abcd1234", Path("/e/abcd1234"), "nnictl resume abcd1234"

    def __init__(self, *states: tuple[Any, Iterable[Trial]]) -> None:
        self.manager = self
        self._states: Iterator[tuple[Any, Iterable[Trial]]] = iter(states)
        self._now: tuple[Any, Iterable[Trial]] = ("INITIALIZED", [])

    def status(self) -> tuple[str, list[str]]:
        self._now = next(self._states, self._now)
        if self._now[0] is None:
            raise ExperimentError("no answer")
        return self._now[0], ["disk full"]

    def trials(self) -> list[Trial]:
        return list(self._now[1])

    def alive(self) -> bool:
        return self._now[0] is not None


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes in pauses only, however busy the machine is."""
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: passed[0], sleep=sleep, time=time.time)
    monkeypatch.setattr("nni_plugins.experiment.follow.time", clock)


def follow(script: Script, **options: Any) -> list[Trial]:
    return wait(script, lambda trials: None, lambda: False, poll_seconds=0.001, **options)  # type: ignore[arg-type]


def test_it_returns_when_nni_says_done() -> None:
    assert follow(Script(("RUNNING", [RUNNING]), ("DONE", [DONE]))) == [DONE]


def test_an_error_of_nni_is_passed_on_with_the_way_back() -> None:
    with pytest.raises(ExperimentError, match=r"disk full.*nnictl resume abcd1234"):
        follow(Script(("ERROR", [DONE])))


def test_it_returns_when_the_tuner_has_no_more_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nni_plugins.experiment.follow.EXHAUSTED_SECONDS", 0.05)
    still = Script(("TUNER_NO_MORE_TRIAL", [DONE, RUNNING]), ("TUNER_NO_MORE_TRIAL", [DONE]))
    assert follow(still) == [DONE]
    later = Script(*[("TUNER_NO_MORE_TRIAL", [DONE])] * 3, ("RUNNING", [DONE, RUNNING]), ("DONE", [DONE, DONE]))
    assert follow(later) == [DONE, DONE]


def test_a_dead_manager_and_a_dead_tuner_are_noticed() -> None:
    with pytest.raises(ExperimentError, match=r"manager of experiment abcd1234 is gone"):
        follow(Script(("RUNNING", [RUNNING]), (None, [])))
    with pytest.raises(ExperimentError, match=r"its tuner died; see .*dispatcher\.log"):
        follow(Script(("RUNNING", [DONE])), idle_seconds=0.05)
    with pytest.raises(ExperimentError, match=r"its tuner died"):  # before it gave a first trial
        follow(Script(("RUNNING", [])), idle_seconds=0.05)


def test_an_interrupt_ends_it() -> None:
    with pytest.raises(Interrupted):
        wait(Script(("RUNNING", [RUNNING])), lambda trials: None, lambda: True)  # type: ignore[arg-type]


@pytest.mark.parametrize("display", [LineDisplay, LiveDisplay])
def test_every_trial_is_told_once(display: Any) -> None:
    console = Console(record=True, width=100, force_terminal=display is LiveDisplay)
    failed = Trial("cc", 2, "FAILED")
    with display(console, 3) as show:
        show([DONE, RUNNING])
        show([DONE, RUNNING, failed])
        show([DONE, RUNNING, failed])
    text = console.export_text()
    assert text.count("trial 3/3 cc failed") == 1
    assert "default 0.9000" in text or "best 0.9000" in text
