"""``nni-plugins status``: the trials of an experiment, each failed one with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.manifest import Known, find_experiment, known_experiments

if TYPE_CHECKING:
    from rich.console import Console


def list_experiments() -> dict[str, Any]:
    """Every experiment that NNI knows on this machine, the newest first."""
    return {"experiments": [_head(one) for one in known_experiments()]}


def experiment_status(name: str | None, experiments_folder: Path | None = None) -> dict[str, Any]:
    """One experiment and its trials (see :func:`nni_plugins.experiment.manifest.find_experiment`)."""
    known = find_experiment(name, experiments_folder)
    trials = known.trials()
    return {**_head(known), "trials": [trial.to_dict() for trial in trials]}


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
    table = Table("", "trial", "status", "default", "accuracy", "MACs", "seconds", box=None, pad_edge=False)
    for trial in data["trials"]:
        table.add_row(*_row(trial))
    console.print(table)
    for trial in data["trials"]:
        if trial["reason"]:
            console.print(
                f"trial {trial['id']} failed: {trial['reason']}", highlight=False, markup=False, soft_wrap=True
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
