"""Why an experiment waits, stands still or stopped, in words: what NNI's web page does not say."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nni_plugins.experiment.logs import manager_error, tuner_error, tuner_has_no_more
from nni_plugins.experiment.node import events
from nni_plugins.experiment.trials import Trial

LEAST_DISK = 8 << 20
"""Bytes; with less than this free, a file system counts as full."""
CUT = ("USER_CANCELED", "EARLY_STOPPED", "SYS_CANCELED")


def why_waiting(experiment: Path) -> str:
    """Why no further trial starts, as the manager last noted it; empty when it does not wait."""
    reason = ""
    for event in _since_start(experiment):
        if event["kind"] in ("waiting", "started"):
            reason = str(event.get("reason", ""))
    return reason


def exhausted(experiment: Path) -> bool:
    """Whether the tuner has no more to try, as that of a grid has when it tried every point; then no resume helps."""
    last = [event["kind"] for event in _since_start(experiment) if event["kind"] in ("running", "exhausted")]
    return last[-1] == "exhausted" if last else tuner_has_no_more(experiment)


def lost_machines(experiment: Path) -> list[str]:
    """The machines (``host:port``) that were lost and are not back."""
    lost: dict[str, bool] = {}
    for event in _since_start(experiment):
        if event["kind"] in ("lost", "given up", "ready"):
            lost[str(event.get("machine"))] = event["kind"] != "ready"
    return [machine for machine, gone in lost.items() if gone]


def _since_start(experiment: Path) -> list[dict[str, Any]]:
    """What the manager noted since it was last started."""
    found = events(experiment)
    starts = [index for index, event in enumerate(found) if event["kind"] == "begun"]
    return found[starts[-1] :] if starts else found


def why_stopped(experiment: Path, errors: list[str] | tuple[str, ...] = ()) -> str:
    """Why the manager or the tuner ended: a full disk, the tuner's own error, or what NNI's log says last."""
    try:
        if shutil.disk_usage(experiment).free < LEAST_DISK:
            return f"the disk of {experiment} is full"
    except OSError:
        pass  # the folder is gone; what NNI said still counts
    said = "; ".join(errors)
    tuner = tuner_error(experiment)
    if tuner and (not said or "uner" in said or "ispatcher" in said):
        return f"the tuner died: {tuner}"
    if "SQLITE_BUSY" in said or "SQLITE_BUSY" in manager_error(experiment):
        return "another process held NNI's database (db/nni.sqlite) for more than a minute"
    return said or manager_error(experiment)


def why_ended(trial: Trial, bad: Mapping[str, str], limit: Any) -> str:
    """Why a trial has no result that counts: its own reason, its time limit, or what it reported.

    Parameters
    ----------
    trial
        One that has ended.
    bad
        Of :func:`bad_metrics`.
    limit
        ``maxTrialDuration``.
    """
    reported = bad.get(trial.id, "") if trial.status == "SUCCEEDED" and not trial.metrics else ""
    return reported or trial.reason or _cut_off(trial, duration_seconds(limit))


def _cut_off(trial: Trial, limit: float | None) -> str:
    """Why NNI stopped a trial: its time limit, where it ran that long."""
    if trial.status in CUT and limit is not None and trial.started is not None and trial.ended is not None:
        seconds = trial.ended - trial.started
        if seconds >= limit:
            return f"stopped after {seconds:.0f} s: over the time limit (maxTrialDuration: {limit:g} s)"
    return ""


def bad_metrics(experiment: Path) -> dict[str, str]:
    """Trials that reported what is not a number, such as NaN or a tensor, and why that did not count."""
    found = {}
    for event in events(experiment):
        if event["kind"] == "bad metric":
            found[str(event.get("trial"))] = str(
                event.get("why") or "it reported NaN or infinity, which NNI cannot keep"
            )
    return found


def duration_seconds(value: Any) -> float | None:
    """Seconds of NNI's ``10m``, ``1h``, ``30s``, ``2d`` or a number; ``None`` for none."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, str) or not value.strip():
        return None
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(value.strip()[-1].lower())
    try:
        return float(value) if unit is None else float(value.strip()[:-1]) * unit
    except ValueError:
        return None
