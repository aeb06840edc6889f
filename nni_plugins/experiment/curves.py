"""What trials reported while they ran: over REST while the manager runs, from NNI's database when it does not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nni_plugins.experiment.trials import _metrics, reading

Curve = list[float | None]
LONGEST = 2000
"""A longer curve is thinned to so many points."""


def curves_from_rest(answer: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """The curves in the answer of ``GET /metric-data``, by trial."""
    return _curves(
        (item.get("trialJobId"), item.get("sequence"), item.get("data"))
        for item in sorted(answer, key=lambda item: item.get("timestamp") or 0)
        if item.get("type") == "PERIODICAL"
    )


def curves_from_database(experiment: Path) -> dict[str, Curve]:
    """The curves of a stopped experiment, by trial.

    Raises
    ------
    ExperimentError
        When there is no database, or it is damaged, or none of NNI's.
    """
    wanted = "select trialJobId, sequence, data from MetricData where type='PERIODICAL' order by timestamp, rowid"
    with reading(experiment) as database:
        return _curves(database.execute(wanted))


def _curves(found: Iterable[tuple[Any, Any, Any]]) -> dict[str, Curve]:
    """By trial and number; of a trial that began again, the later report of each number counts."""
    points: dict[str, dict[int, float | None]] = {}
    for trial, sequence, data in found:
        if trial and isinstance(sequence, int):
            points.setdefault(str(trial), {})[sequence] = _value(data)
    return {trial: _thin([values[key] for key in sorted(values)]) for trial, values in points.items()}


def _value(data: Any) -> float | None:
    try:
        value = _metrics(data).get("default")
    except (TypeError, ValueError):
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _thin(curve: Curve) -> Curve:
    step = -(-len(curve) // LONGEST)
    return curve[::step] if step > 1 else curve
