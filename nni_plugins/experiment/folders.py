"""Where a trial writes, and what is found there afterwards.

A trial's output folder is the one that NNI names in ``NNI_OUTPUT_DIR``::

    <experiments folder>/<experiment id>/
        dense/                                   the dense baseline, trained once, shared by the trials
        environments/local-env/trials/<trial>/   compact.safetensors, masks.safetensors, plan.json, metrics.json,
                                                 recipe.yml, failure.json (why it failed), trial.log, trial.stderr
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nni_plugins.files import write_json

FAILURE = "failure.json"
METRICS = "metrics.json"
STANDALONE = Path("outputs/trial")
LAST = 1 << 16
"""Bytes at the end of what a trial printed, among which its last words are."""


def trial_output() -> Path:
    """The output folder of the trial that this process is: ``NNI_OUTPUT_DIR``, or ``outputs/trial`` outside NNI."""
    return Path(os.environ.get("NNI_OUTPUT_DIR") or STANDALONE)


def dense_folder(output: Path) -> Path:
    """The folder of the dense baseline that the trial writing to `output` shares with its experiment.

    Parameters
    ----------
    output
        A trial's output folder. The experiment's folder is its ancestor named ``NNI_EXP_ID``; a trial outside NNI keeps
        the baseline next to its own folder.
    """
    experiment = os.environ.get("NNI_EXP_ID")
    for parent in output.resolve().parents:
        if parent.name == experiment:
            return parent / "dense"
    return output.resolve().parent / "dense"


TOLD = ("default", "accuracy", "float_accuracy", "macs", "params", "bytes", "latency_ms", "max_error", "relative_error")


def told_to_nni(metrics: dict[str, Any]) -> dict[str, Any]:
    """A trial's final result for NNI: the numbers that its web page can draw, and ``excess``.

    ``excess`` is how far the bounds are broken, the relative excesses added up; 0 where they hold. Everything else
    stays in ``metrics.json``: the page would show it as ``[object Object]``.
    """
    told = {name: metrics[name] for name in TOLD if isinstance(metrics.get(name), (int, float))}
    broken = metrics.get("broken_bounds") or {}
    return {**told, "excess": float(sum(broken.values()))}


def write_failure(output: Path, reason: str, error: BaseException, parameters: dict[str, Any]) -> None:
    """Keep the reason why the trial failed, and with which parameters, in ``failure.json`` of its folder."""
    output.mkdir(parents=True, exist_ok=True)
    failure = {"reason": reason, "error": type(error).__name__, "parameters": parameters}
    write_json(output / FAILURE, failure)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or ``None`` where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def failure_reason(output: Path | None) -> str:
    """Why a trial failed, in one line: its ``failure.json``, else the last words on its standard error."""
    if output is None:
        return "its output folder is not on this machine"
    failure = read_json(output / FAILURE)
    if failure is not None and failure.get("reason"):
        return str(failure["reason"])
    for name in ("trial.stderr", "stderr"):
        try:
            with (output / name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST))  # a trial may print gigabytes
                lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
        except OSError:
            continue
        if lines:
            return lines[-1].strip()
    return f"it ended without a word; see {output / 'trial.log'}"
