"""``nni-plugins status``: the trials of an experiment, each failed one with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.health import bad_metrics, exhausted, lost_machines, why_ended, why_stopped, why_waiting
from nni_plugins.experiment.logs import tuner_error
from nni_plugins.experiment.manager import Manager
from nni_plugins.experiment.manifest import Known, find_experiment, known_experiments
from nni_plugins.experiment.trials import ENDED, Trial

if TYPE_CHECKING:
    from rich.console import Console


def list_experiments() -> dict[str, Any]:
    """Every experiment that NNI knows on this machine, the newest first."""
    return {"experiments": [_head(one) for one in known_experiments()]}


def experiment_status(name: str | None, experiments_folder: Path | None = None) -> dict[str, Any]:
    """One experiment and its trials (see :func:`nni_plugins.experiment.manifest.find_experiment`).

    Beside ``trials``: ``waiting`` (why no trial starts), ``problem`` (why it stopped, or does not go on),
    ``exhausted`` (why there are fewer trials than asked for), ``lost_machines`` and ``resume`` (the command that goes
    on with it); each empty where there is nothing to say.
    """
    known = find_experiment(name, experiments_folder)
    trials, profile = known.trials(), known.profile()
    bad = bad_metrics(known.folder)
    params = profile.get("params") or {}
    told = [{**trial.to_dict(), "reason": why_ended(trial, bad, params.get("maxTrialDuration"))} for trial in trials]
    wanted = params.get("maxTrialNumber")
    ended = sum(trial.status in ENDED for trial in trials)
    fewer = isinstance(wanted, int) and ended < wanted
    spent = fewer and len(trials) == ended and exhausted(known.folder)
    unfinished = known.port is None and (len(trials) > ended or fewer) and not spent
    going = known.port is not None and known.status in ("RUNNING", "INITIALIZED")
    return {
        **_head(known),
        "waiting": why_waiting(known.folder) if going else "",
        "problem": _problem(known, unfinished) or (_standing(known, trials) if going else ""),
        "exhausted": f"its tuner tried all there is in its search space: {ended} of {wanted} trials" if spent else "",
        "lost_machines": lost_machines(known.folder) if going else [],
        "resume": f"nni-plugins run --resume {known.id}" if unfinished and known.listed else "",
        "quality": next((trial.quality for trial in trials if trial.metrics), "accuracy"),
        "trials": told,
    }


def _problem(known: Known, unfinished: bool) -> str:
    """Why the experiment stopped before its end, or does not go on; empty where nothing is known to be wrong."""
    if known.port is not None:
        status, errors = Manager(known.port, known.prefix).status()
        return why_stopped(known.folder, errors) or "NNI does not say why" if status == "ERROR" else ""
    if not unfinished:
        return ""
    why = why_stopped(known.folder)
    if known.killed:
        return f"its manager ended without being stopped{f': {why}' if why else ''}"
    return why if why.startswith(("the tuner died", "the disk", "another process")) else ""


def _standing(known: Known, trials: list[Trial]) -> str:
    """Say that the tuner of a running experiment died, which NNI's manager does not notice."""
    idle = all(trial.status in ENDED for trial in trials)
    error = tuner_error(known.folder) if idle else ""
    return f"the tuner died: {error}" if error else ""


def show(data: dict[str, Any], console: Console) -> None:
    """Print either answer."""
    from rich.table import Table

    if "experiments" in data:
        table = Table("experiment", "name", "status", "port", "folder", box=None, pad_edge=False)
        for one in data["experiments"]:
            table.add_row(one["id"], one["name"], one["status"], str(one["port"] or ""), one["folder"])
        console.print(table if data["experiments"] else "NNI knows no experiment on this machine")
        return
    page = f", http://127.0.0.1:{data['port']}" if data["port"] else ""
    console.print(f"experiment {data['id']} ({data['name']}): {data['status']}{page}", highlight=False)
    console.print(f"folder {data['folder']}", highlight=False, soft_wrap=True)
    lines = {"waiting": "waiting: ", "problem": "stopped: ", "exhausted": "done: ", "resume": "go on with it: "}
    for name, what in lines.items():
        if data[name]:
            console.print(what + data[name], highlight=False, soft_wrap=True)
    for machine in data["lost_machines"]:
        console.print(f"machine {machine} cannot be reached; it is tried for ten minutes", highlight=False)
    table = Table("", "trial", "status", "default", data["quality"], "MACs", "seconds", box=None, pad_edge=False)
    for trial in data["trials"]:
        table.add_row(*_row(trial))
    console.print(table)
    for trial in data["trials"]:
        if trial["reason"]:
            words = "failed" if trial["status"] == "FAILED" else trial["status"].lower().replace("_", " ")
            console.print(
                f"trial {trial['id']} {words}: {trial['reason']}", highlight=False, markup=False, soft_wrap=True
            )


def _head(known: Known) -> dict[str, Any]:
    return {
        "id": known.id,
        "name": known.name,
        "status": known.status,
        "port": known.port,
        "folder": str(known.folder),
    }


def _row(trial: dict[str, Any]) -> list[str]:
    metrics = trial["metrics"]

    def figure(name: str, form: str) -> str:
        value = metrics.get(name)
        return format(value, form) if isinstance(value, (int, float)) else ""

    seconds = trial["ended"] - trial["started"] if trial["ended"] and trial["started"] else None
    return [
        str(trial["sequence"] + 1),
        trial["id"],
        trial["status"],
        figure("default", ".4f"),
        figure("accuracy", ".4f"),
        figure("macs", ",.0f"),
        "" if seconds is None else f"{seconds:.0f}",
    ]
