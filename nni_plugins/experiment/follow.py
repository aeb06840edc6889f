"""Wait for an experiment and show how far it is: a live bar on a terminal, one line a trial elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from nni_plugins.experiment.errors import ExperimentError, Interrupted
from nni_plugins.experiment.health import why_stopped, why_waiting
from nni_plugins.experiment.launch import Running
from nni_plugins.experiment.logs import tuner_error
from nni_plugins.experiment.trials import ENDED, EXHAUSTED, Trial

FINISHED = ("DONE", "STOPPED", "VIEWED")
SILENCE_SECONDS = 60.0
IDLE_SECONDS = 120.0
"""A tuner that died leaves the experiment in RUNNING, without a trial; NNI does not notice."""
RAISED_SECONDS = 8.0
EXHAUSTED_SECONDS = 3.0
"""A tuner may find more to try after all, as results come in."""


class Display(Protocol):
    """What is told of the trials so far, again and again."""

    def __call__(self, trials: list[Trial]) -> None: ...


def wait(
    running: Running,
    show: Display,
    interrupted: Callable[[], bool],
    poll_seconds: float = 1.0,
    idle_seconds: float = IDLE_SECONDS,
) -> list[Trial]:
    """Return all trials once the experiment is done.

    Parameters
    ----------
    running
        What :func:`nni_plugins.experiment.launch.start` returned.
    show
        Called with the trials after every look.
    interrupted
        Whether the user wants it to end.
    poll_seconds
        Pause between two looks.
    idle_seconds
        How long the experiment may be without a trial before its tuner counts as dead.

    Raises
    ------
    Interrupted
        When `interrupted` says so.
    ExperimentError
        When NNI reports an error of its own, or its manager is gone.
    """
    heard = busy = time.monotonic()
    while True:
        if interrupted():
            raise Interrupted
        try:
            status, errors = running.manager.status()
            trials = running.manager.trials()
            heard = time.monotonic()
        except ExperimentError:
            if not running.alive() or time.monotonic() - heard > SILENCE_SECONDS:
                why = why_stopped(running.folder)
                raise ExperimentError(
                    f"the manager of experiment {running.id} is gone{f': {why}' if why else ''}; "
                    f"see {running.folder / 'log' / 'nnimanager.log'}, then `{running.resume_command}`"
                ) from None
            time.sleep(poll_seconds)
            continue
        show(trials)
        if status == "ERROR":
            reason = why_stopped(running.folder, errors) or "NNI does not say why"
            raise ExperimentError(
                f"experiment {running.id} stopped with an error: {reason}; see {running.folder / 'log'}, "
                f"then `{running.resume_command}`"
            )
        if status in FINISHED:
            return trials
        idle = all(trial.status in ENDED for trial in trials)
        if status == EXHAUSTED and idle and heard - busy > EXHAUSTED_SECONDS:
            return trials
        if status not in ("RUNNING", EXHAUSTED) or not idle:
            busy = heard
        elif heard - busy > min(idle_seconds, _patience_with_tuner(running)) and not why_waiting(running.folder):
            raise ExperimentError(
                f"experiment {running.id} starts no more trials: {why_stopped(running.folder) or 'its tuner died'}; "
                f"see {running.folder}/log/dispatcher.log, then `{running.resume_command}`"
            )
        time.sleep(poll_seconds)


def _patience_with_tuner(running: Running) -> float:
    """Seconds without a trial after which the tuner counts as dead: few, where its log holds a traceback."""
    return RAISED_SECONDS if tuner_error(running.folder) else IDLE_SECONDS


class LiveDisplay:
    """A bar that stays in place, with the counts and the best trial so far."""

    def __init__(self, console: Console, wanted: int | None) -> None:
        columns = (TextColumn("trials"), BarColumn(bar_width=16), TaskProgressColumn(), TimeElapsedColumn())
        words = TextColumn("{task.fields[left]}"), TextColumn("{task.fields[text]}", markup=False)
        self._progress = Progress(*columns, *words, console=console, transient=False)
        self._wanted = wanted
        self._task = self._progress.add_task("", total=wanted, text="", left="")
        self._lines = LineDisplay(self._progress.console, wanted, only_failures=True)

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, trials: list[Trial]) -> None:
        self._lines(trials)
        done = sum(trial.status in ENDED for trial in trials)
        left = time_left(trials, self._wanted)
        words = "" if left is None or done == self._wanted else f"{clock(left)} left"
        self._progress.update(self._task, completed=done, text=summary(trials), left=words, refresh=True)


class LineDisplay:
    """One line for each trial that ended, for logs and pipes."""

    def __init__(self, console: Console, wanted: int | None, only_failures: bool = False) -> None:
        self._console = console
        self._wanted = wanted
        self._only_failures = only_failures
        self._told: set[str] = set()

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, trials: list[Trial]) -> None:
        for trial in trials:
            if trial.status in ENDED and trial.id not in self._told:
                self._told.add(trial.id)
                if trial.status == "FAILED" or not self._only_failures:
                    total = f"/{self._wanted}" if self._wanted else ""
                    text = f"trial {trial.sequence + 1}{total} {trial.id} {describe(trial)}"
                    self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def time_left(trials: list[Trial], wanted: int | None, now: float | None = None) -> float | None:
    """Estimate the seconds until all trials have ended, from those that have.

    Parameters
    ----------
    trials
        All so far.
    wanted
        How many there will be; without it nothing is known.
    now
        The time, in seconds since 1970.

    Returns
    -------
    What is left of the running trials and all of those to come, shared by as many as run at a time; None before the
    first trial has ended.
    """
    now = time.time() if now is None else now
    lengths = [trial.ended - trial.started for trial in trials if trial.ended and trial.started]
    if wanted is None or not lengths:
        return None
    usual = statistics.median(lengths)  # the first trials wait for the dense training
    running = [now - trial.started for trial in trials if trial.started and not trial.ended]
    to_come = max(0, wanted - len(trials) + sum(trial.status not in ENDED and not trial.started for trial in trials))
    work = to_come * usual + sum(max(0.0, usual - passed) for passed in running)
    return work / max(1, len(running))


def clock(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def describe(trial: Trial) -> str:
    """One trial's end in a few words."""
    if trial.status == "FAILED":
        return f"failed: {trial.reason}"
    if trial.default is None:
        word = trial.status.lower().replace("_", " ")
        return f"{word}: {trial.reason}" if trial.reason else word
    metrics = trial.metrics
    parts = [f"default {trial.default:.4f}"]
    if "accuracy" in metrics:
        parts.append(f"{trial.quality} {metrics['accuracy']:.4f}")
    if "macs" in metrics:
        parts.append(f"{metrics['macs']:,.0f} MACs")
    return ", ".join(parts)


def summary(trials: list[Trial]) -> str:
    """The counts, and the best so far."""
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.status] = counts.get(trial.status, 0) + 1
    words = [f"{count} {status.lower().replace('_', ' ')}" for status, count in sorted(counts.items())]
    values = [trial.default for trial in trials if trial.default is not None]
    if values:
        words.insert(0, f"best {max(values):.4f}")
    return ", ".join(words)
