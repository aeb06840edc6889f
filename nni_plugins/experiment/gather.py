"""What an experiment's trials found, as a report's findings: read from NNI and from their folders; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from nni_plugins.experiment.best_trials import FINETUNED
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.folders import METRICS, read_json
from nni_plugins.experiment.health import exhausted
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.trials import Trial, ranked
from nni_plugins.report.environment import ENVIRONMENT, environment
from nni_plugins.report.findings import Candidate, Findings, Layer, ModelFigures

PLAN, RECIPE, MASKS = "plan.json", "recipe.yml", "masks.safetensors"
COSTS = ("macs", "params", "latency_ms")
BOUNDS = ("macs", "params", "bytes", "latency_ms")
KNOWN_FIGURES = frozenset(
    (*("default", "accuracy", "float_accuracy", "excess", "max_error", "relative_error"), *COSTS, "bytes")
)
LONGEST_NOTE = 500


def gather(known: Known, trials: Sequence[Trial], curves: Mapping[str, Any], running: bool) -> Findings:
    """Read what is known of an experiment.

    Parameters
    ----------
    known
        The experiment.
    trials
        All its trials.
    curves
        What they reported while they ran, by trial.
    running
        Whether more trials are to come.

    Returns
    -------
    Findings
        With figures of validation only, and without those that need a model to run.
    """
    profile = _profile(known)
    config = profile.get("params")
    config = config if isinstance(config, dict) else {}
    search = search_of(config)
    read = {trial.id: metrics_of(trial) for trial in trials}
    chosen = best_of(trials, search["maximize"])
    metrics = read[chosen.id] if chosen is not None else {}
    plan = plan_of(chosen.folder if chosen is not None else None)
    recipe = _text(chosen.folder / RECIPE) if chosen is not None and chosen.folder is not None else ""
    wanted = config.get("maxTrialNumber")
    ended = sum(trial.status not in ("WAITING", "RUNNING", "UNKNOWN", "UNFINISHED") for trial in trials)
    stopped = isinstance(wanted, int) and ended < wanted and not (ended == len(trials) and exhausted(known.folder))
    higher = metrics.get("higher_is_better")
    if not isinstance(higher, bool):
        higher = not negated(metrics) if "accuracy" in metrics else search["maximize"]
    return Findings(
        title=known.name or known.id,
        metric=metric_name(metrics),
        higher_is_better=higher,
        dense=dense_in(metrics),
        compact=replace(compact_figures(metrics, None), latency_ms=None) if is_ours(metrics) else None,
        chosen=chosen.id if chosen is not None else "",
        candidates=[candidate(trial, read[trial.id], curves.get(trial.id, ())) for trial in trials],
        max_error=number(metrics.get("max_error")),
        relative_error=number(metrics.get("relative_error")),
        **limits_of(recipe),
        seconds=number(profile.get("execDuration")),
        environment=environment_of(known, chosen),
        commands=commands(known, config),
        recipe=recipe,
        experiment=named(known, profile),
        state="running" if running else "stopped" if stopped else "finished",
        trials_wanted=wanted if isinstance(wanted, int) else None,
        maximize=search["maximize"],
        layers=plan[0],
        blocks=plan[1],
        search=search,
    )


def named(known: Known, profile: Mapping[str, Any]) -> dict[str, str]:
    """NNI's id of the experiment, its folder, and when it began."""
    found = {"id": known.id, "folder": known.folder.name if known.archive else str(known.folder)}
    began = number(profile.get("startTime"))
    if began is not None:
        found["started"] = f"{datetime.fromtimestamp(began / 1000, timezone.utc):%Y-%m-%d %H:%M} UTC"
    return found


def _profile(known: Known) -> dict[str, Any]:
    try:
        return known.profile()
    except ExperimentError:  # an experiment that never came so far
        return {}


def search_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The search as it was configured: tuner, objectives, direction of ``default``, space; nothing of machines."""
    tuner = config.get("tuner")
    tuner = tuner if isinstance(tuner, dict) else {}
    arguments = tuner.get("classArgs")
    arguments = arguments if isinstance(arguments, dict) else {}
    name = str(tuner.get("name") or tuner.get("className") or "")
    mode = arguments.get("optimize_mode", "minimize" if name in ("TPE", "Anneal") else "maximize")
    objectives = arguments.get("objectives")
    shown = ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "objectives")
    return {
        "tuner": f"{name} ({shown})" if shown else name,
        "maximize": mode != "minimize",
        "objectives": objectives if isinstance(objectives, list) else [],
        "space": config.get("searchSpace") or {},
    }


def best_of(trials: Sequence[Trial], maximize: bool = True) -> Trial | None:
    """The best trial: one that left a model before one that did not, among those fine-tuned where any was."""
    succeeded = [trial for trial in trials if trial.status == "SUCCEEDED" and trial.default is not None]
    if order := [trial for trial in ranked(succeeded) if is_ours(metrics_of(trial))]:
        tuned = [trial for trial in order if trial.folder is not None and trial.folder.parent.name == FINETUNED]
        return (tuned or order)[0]
    sign = 1.0 if maximize else -1.0
    order = sorted(succeeded, key=lambda trial: (-sign * (trial.default or 0.0), trial.sequence))
    return order[0] if order else None


def metrics_of(trial: Trial) -> dict[str, Any]:
    """What a trial found: its ``metrics.json``, else what it told NNI."""
    return (read_json(trial.folder / METRICS) if trial.folder else None) or trial.metrics


def is_ours(metrics: Mapping[str, Any]) -> bool:
    """Whether these are the metrics of a recipe, with its dense model beside the compact one."""
    return isinstance(metrics.get("dense"), dict) and all(number(metrics.get(name)) is not None for name in COSTS)


def metric_name(metrics: Mapping[str, Any]) -> str:
    """What the metric of a trial is called; ``default`` for a bare number."""
    name = metrics.get("metric")
    if isinstance(name, str) and name:
        return name
    if "accuracy" not in metrics:
        return "default"
    return "metric" if negated(metrics) else "accuracy"


def negated(metrics: Mapping[str, Any]) -> bool:
    """Whether ``default`` is the metric with the other sign: then less of it is better."""
    return (
        metrics.get("default") is not None and metrics.get("default") == -(number(metrics.get("accuracy")) or 0.0) != 0
    )


def candidate(trial: Trial, metrics: Mapping[str, Any] | None = None, curve: Sequence[float | None] = ()) -> Candidate:
    """One trial as the report shows it."""
    metrics = metrics_of(trial) if metrics is None else metrics
    finished = trial.status == "SUCCEEDED"
    broken = metrics.get("broken_bounds")
    dense = metrics.get("dense")
    note = trial.reason[:LONGEST_NOTE]
    if finished and isinstance(broken, dict) and broken:
        note = "over the bound on " + ", ".join(broken) + ("" if metrics.get("finetuned", True) else ", not fine-tuned")
    elif finished and trial.folder is not None and trial.folder.parent.name == FINETUNED:
        note = "fine-tuned at the end"
    found = {name: number(metrics.get(name)) if finished else None for name in (*COSTS, "bytes")}
    accuracy = number(metrics.get("accuracy"))
    return Candidate(
        id=trial.id,
        sequence=trial.sequence,
        status=trial.status,
        metric=(trial.default if accuracy is None else accuracy) if finished else None,
        macs=whole(found["macs"]),
        default=trial.default,
        parameters=trial.parameters,
        note=note,
        feasible=bool(metrics.get("feasible", not number(metrics.get("excess")))),
        latency_ms=found["latency_ms"],
        params=whole(found["params"]),
        file_bytes=whole(found["bytes"]),
        curve=tuple(curve),
        seconds=trial.ended - trial.started if trial.ended and trial.started else None,
        finetuned=bool(metrics.get("finetuned", True)),
        dense_macs=whole(number(dense.get("macs"))) if isinstance(dense, dict) else None,
        others=_others(metrics) if finished and not is_ours(metrics) else {},
    )


def _others(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Further numbers of a trial that is not a recipe's."""
    values = {str(name): number(value) for name, value in metrics.items() if name not in KNOWN_FIGURES}
    return {name: value for name, value in values.items() if value is not None}


def dense_in(metrics: Mapping[str, Any]) -> ModelFigures | None:
    """The dense model as the chosen trial's metrics tell of it; but for its latency, of a moment of its own."""
    dense = metrics.get("dense")
    if not is_ours(metrics) or not isinstance(dense, dict) or number(dense.get("macs")) is None:
        return None
    values = {name: number(dense.get(name)) for name in ("macs", "params", "accuracy", "bytes")}
    return ModelFigures(
        name="dense",
        macs=int(values["macs"] or 0),
        params=int(values["params"] or 0),
        validation=values["accuracy"],
        file_bytes=whole(values["bytes"]),
    )


def compact_figures(metrics: Mapping[str, Any], test: float | None) -> ModelFigures:
    """The compact model in numbers, from its ``metrics.json``."""
    return ModelFigures(
        name="compact",
        macs=metrics["macs"],
        params=metrics["params"],
        latency_ms=metrics["latency_ms"],
        validation=metrics["accuracy"],
        test=test,
        file_bytes=metrics.get("bytes"),
    )


def plan_of(folder: Path | None) -> tuple[list[Layer], list[str]]:
    """What a trial kept of each channel group, by its ``plan.json``, and the blocks that it removed.

    Where no unit went, what its masks kept of the weights of each layer.
    """
    plan = (read_json(folder / PLAN) if folder is not None else None) or {}
    groups, report = plan.get("groups"), plan.get("report")
    rows = [
        Layer(str(name), item["size"], len(item["kept"]))
        for name, item in (groups.items() if isinstance(groups, dict) else ())
        if isinstance(item, dict) and isinstance(item.get("size"), int) and isinstance(item.get("kept"), list)
    ]
    blocks = report.get("removed_blocks") if isinstance(report, dict) else None
    removed = [str(name) for name in blocks] if isinstance(blocks, list) else []
    if folder is not None and not removed and all(layer.kept == layer.size for layer in rows):
        rows = weights_of(folder / MASKS) or rows
    return rows, removed


def weights_of(path: Path) -> list[Layer]:
    """What masks keep of the weights of each layer; nothing where there are none, or none is zero."""
    from safetensors import SafetensorError, safe_open

    layers = []
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                module, _, what = name.rpartition(".")
                mask = file.get_tensor(name)
                if what == "weight" and mask.ndim > 1:
                    layers.append(Layer(module, int(mask.size), int((mask != 0).sum()), "weights"))
    except (OSError, SafetensorError):
        return []
    return layers if any(layer.kept < layer.size for layer in layers) else []


def limits_of(recipe: str) -> dict[str, Any]:
    """The bounds of a recipe's objective, and its tolerance, read without the code that the recipe may name."""
    try:
        found = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    sections = found if isinstance(found, dict) else {}
    objective, speedup = sections.get("objective"), sections.get("speedup")
    limits: dict[str, Any] = {}
    if isinstance(objective, dict):
        bounds = {name: number(objective.get(name)) for name in BOUNDS}
        limits["bounds"] = {name: value for name, value in bounds.items() if value is not None}
    if isinstance(speedup, dict) and number(speedup.get("tolerance")) is not None:
        limits["tolerance"] = float(speedup["tolerance"])
    return limits


def environment_of(known: Known, chosen: Trial | None) -> dict[str, str]:
    """Versions and machine of the chosen trial, as it wrote them; this machine's where it did not, if it ran here."""
    written = read_json(chosen.folder / ENVIRONMENT) if chosen is not None and chosen.folder is not None else None
    if written:
        return {str(name): str(value) for name, value in written.items()}
    return environment() if known.listed else {}


def commands(known: Known, config: Mapping[str, Any]) -> list[str]:
    """How to get the same again."""
    folder = config.get("trialCodeDirectory")
    source = Path(folder) if folder else None
    if source is not None and source.is_relative_to(Path.cwd()):
        source = source.relative_to(Path.cwd())
    return [f"nni-plugins run {source}"] if source is not None else []


def number(value: Any) -> float | None:
    """A finite number, or ``None``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def whole(value: float | None) -> int | None:
    """A count."""
    return None if value is None else int(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
