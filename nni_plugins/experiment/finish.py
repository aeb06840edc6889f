"""The end of a search: choose the winner, read the test split once, prove, and write the report and the model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.ablation import ABLATION, without_teacher
from nni_plugins.experiment.best_trials import FINETUNED, finetune_best
from nni_plugins.experiment.bring import bring_dense, bring_missing
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.folders import METRICS, read_json
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.trials import Trial, ranked
from nni_plugins.report.environment import environment
from nni_plugins.report.findings import Candidate, Findings, ModelFigures, StockCheck

if TYPE_CHECKING:
    from nni_plugins.training import DenseBaseline, Recipe

TEST = "test.json"
REPORT, PLOT, DATA, BEST = "report.md", "pareto.png", "report.json", "best"
EXPORTED = {
    "compact.onnx": "the compact model for onnxruntime and others",
    "int8.onnx": "the same in 8 bits; its test metric is the one above",
    "compact.pt2": "the compact model for `torch.export.load`",
}
"""What an export step leaves, and what it is."""
KEPT = (
    *("compact.safetensors", "masks.safetensors", "masked.safetensors", "plan.json", METRICS, "recipe.yml"),
    *("grids.json", "ranking.json"),
    *EXPORTED,
)
FILES = (
    "`report.md`: this page; `report.json`: the same figures for scripts",
    "`pareto.png`: the plot",
    "`best/compact.safetensors`: the compact model, "
    "for `nni_plugins.speedup.load_compact` (needs torch and safetensors only)",
    "`best/plan.json`: which units were kept; `best/masks.safetensors`, `best/masked.safetensors`: the masked model",
    "`best/recipe.yml`: the recipe with the tuner's values in it",
)


def finish(known: Known, output: Path | None, say: Callable[[str], Any]) -> tuple[Findings, Path]:
    """Report on the trials that an experiment has.

    Parameters
    ----------
    known
        The experiment, running or stopped.
    output
        Where the report goes; ``outputs/NAME-ID`` by default.
    say
        Called with a line on each step that takes time.

    Returns
    -------
    The findings, and the folder that they were written to.

    Raises
    ------
    ExperimentError
        When no trial succeeded, with the first failed trial's reason.
    """
    from nni_plugins.training import load_recipe, prepare_dense
    from nni_plugins.training.errors import NoTestSplit

    trials = bring_missing(known, known.trials(), say)
    order = ranked(trials)
    if not order:
        raise ExperimentError(no_winner(known, trials))
    quick = load_recipe(folder_of(order[0]) / "recipe.yml").search.mode == "quick"
    if quick:
        trials = finetune_best(known, trials, say)
        order = ranked(trial for trial in trials if trial.metrics.get("finetuned")) or ranked(trials)
    winner = order[0]
    recipe = load_recipe(folder_of(winner) / "recipe.yml")
    metrics = read_json(folder_of(winner) / METRICS) or {}
    bring_dense(known, winner.id)
    dense = prepare_dense(recipe, known.folder / "dense", say)
    say(f"trial {winner.id} is the best; reading the test split")
    test: dict[str, float | None] = {"dense": None, "compact": None}
    try:
        test = {**test_figures(recipe, winner, metrics, dense, known.folder / TEST)}
    except NoTestSplit as error:
        say(f"no test figures: {error}")
    ablation = without_teacher(
        recipe, folder_of(winner) / "compact.safetensors", known.folder / ABLATION / winner.id, dense, say
    )
    say("taking it through NNI's own ModelSpeedup")
    latency = latencies(recipe, dense.path, folder_of(winner) / "compact.safetensors")
    findings = Findings(
        title=known.name or known.id,
        metric=str(metrics.get("metric", "accuracy")),
        higher_is_better=bool(metrics.get("higher_is_better", True)),
        dense=replace(dense_figures(dense, test["dense"]), latency_ms=latency[0]),
        compact=replace(compact_figures(metrics, test["compact"]), latency_ms=latency[1]),
        chosen=winner.id,
        candidates=[candidate(trial) for trial in trials],
        max_error=float(metrics["max_error"]),
        relative_error=float(metrics["relative_error"]),
        tolerance=recipe.speedup.tolerance,
        stock=stock_check(recipe, folder_of(winner)),
        bounds=bounds(recipe),
        seconds=duration(known),
        environment=environment(),
        commands=commands(known),
        recipe=(folder_of(winner) / "recipe.yml").read_text(encoding="utf-8"),
        experiment={"id": known.id, "folder": str(known.folder)},
        stages=stages(dense, metrics),
        ablation=ablation,
    )
    return findings, write(findings, output or Path("outputs") / f"{findings.title}-{known.id}", folder_of(winner))


def write(findings: Findings, output: Path, source: Path) -> Path:
    """Write page, plot, figures and the winner's files into `output`; returns it."""
    from nni_plugins.report.page import save_page
    from nni_plugins.report.pareto import save_pareto

    try:
        (output / BEST).mkdir(parents=True, exist_ok=True)
        save_pareto(findings, output / PLOT)
        exported = [f"`best/{name}`: {what}" for name, what in EXPORTED.items() if (source / name).is_file()]
        save_page(findings, output / REPORT, PLOT, (*FILES, *exported))
        (output / DATA).write_text(json.dumps(findings.to_dict(), indent=1, default=str), encoding="utf-8")
        for name in KEPT:
            if source != output / BEST and (source / name).is_file():
                shutil.copyfile(source / name, output / BEST / name)
    except OSError as error:
        raise ExperimentError(f"{output}: the report cannot be written ({error.strerror})") from None
    return output


def test_figures(
    recipe: Recipe, winner: Trial, metrics: dict[str, Any], dense: DenseBaseline, record: Path
) -> dict[str, float]:
    """The test metric of the dense and of the compact model: read once, kept in `record`, then taken from there."""
    from nni_plugins.training import evaluate_test

    known = read_json(record)
    if known is not None and known.get("trial") == winner.id:
        return {"dense": known["dense"], "compact": known["compact"]}
    figures = {
        "dense": float(evaluate_test(recipe, dense.path)["accuracy"]),
        "compact": float(evaluate_test(recipe, folder_of(winner) / shipped(metrics))["accuracy"]),
    }
    record.write_text(json.dumps({"trial": winner.id, **figures}), encoding="utf-8")
    return figures


def latencies(recipe: Recipe, *paths: Path, rounds: int = 5) -> list[float]:
    """Milliseconds of one input for each model, measured here, in turns: trials measure while others train."""
    from nni_plugins.training.artefacts import load_model
    from nni_plugins.training.data import build_data
    from nni_plugins.training.measure import latency_ms

    data = build_data(recipe)
    models = [load_model(recipe, data, path) for path in paths]
    times = [[latency_ms(model, data.example, seconds=0.3) for model in models] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def stock_check(recipe: Recipe, folder: Path) -> StockCheck:
    """The winner through NNI's own speedup; a failure of it is part of the report, not the end of it."""
    from nni_plugins.experiment.stock import through_stock_speedup

    try:
        return through_stock_speedup(recipe, folder)
    except Exception as error:
        words = " ".join(str(error).split())
        return StockCheck(False, float("nan"), f"NNI's code fails on this model ({type(error).__name__}: {words})")


def shipped(metrics: dict[str, Any]) -> str:
    """The file that a trial's figures are of: the compact model, or what it became in 8 bits."""
    return str(metrics.get("final", "compact.safetensors"))


def stages(dense: DenseBaseline, metrics: dict[str, Any]) -> dict[str, float]:
    """The metric on validation after each step that changes it."""
    if "float_accuracy" not in metrics:
        return {}
    return {"dense": dense.accuracy, "compact": metrics["float_accuracy"], "quantised": metrics["accuracy"]}


def folder_of(trial: Trial) -> Path:
    """The folder of a ranked trial, which has one."""
    assert trial.folder is not None
    return trial.folder


def no_winner(known: Known, trials: list[Trial]) -> str:
    """Why there is nothing to report, in one line."""
    if not trials:
        return f"experiment {known.id} has no trials yet; `nni-plugins status {known.id}` shows how far it is"
    failed = [trial for trial in trials if trial.status == "FAILED"]
    if failed:
        return (
            f"experiment {known.id}: no trial succeeded, {len(failed)} of {len(trials)} failed; "
            f"trial {failed[0].id}: {failed[0].reason}"
        )
    return f"experiment {known.id}: none of its {len(trials)} trials has left a compact model on this machine"


def candidate(trial: Trial) -> Candidate:
    """One trial as the report shows it."""
    metrics = (read_json(trial.folder / METRICS) if trial.folder else None) or trial.metrics
    finished = trial.status == "SUCCEEDED"
    broken = metrics.get("broken_bounds") or {}
    note = trial.reason
    if finished and broken:
        note = "over the bound on " + ", ".join(broken) + ("" if metrics.get("finetuned", True) else ", not fine-tuned")
    elif finished and trial.folder is not None and trial.folder.parent.name == FINETUNED:
        note = "fine-tuned at the end"
    return Candidate(
        id=trial.id,
        sequence=trial.sequence,
        status=trial.status,
        metric=metrics.get("accuracy") if finished else None,
        macs=metrics.get("macs") if finished else None,
        default=trial.default,
        parameters=trial.parameters,
        note=note,
        feasible=bool(metrics.get("feasible", True)),
        latency_ms=metrics.get("latency_ms") if finished else None,
    )


def dense_figures(dense: DenseBaseline, test: float | None) -> ModelFigures:
    """The dense model in numbers."""
    size = dense.path.stat().st_size if dense.path.is_file() else None
    return ModelFigures("dense", dense.macs, dense.params, dense.latency_ms, dense.accuracy, test, size)


def compact_figures(metrics: dict[str, Any], test: float | None) -> ModelFigures:
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


def bounds(recipe: Recipe) -> dict[str, float]:
    """The bounds that the recipe's objective sets."""
    names = [field.name for field in dataclasses.fields(recipe.objective)]
    limits = {name: getattr(recipe.objective, name) for name in names if name in ("macs", "params", "latency_ms")}
    return {name: value for name, value in limits.items() if value is not None}


def duration(known: Known) -> float | None:
    """Seconds that the search ran, as NNI counts them."""
    seconds = known.profile().get("execDuration")
    return float(seconds) if isinstance(seconds, (int, float)) else None


def commands(known: Known) -> list[str]:
    """How to get the same again."""
    folder = known.profile().get("params", {}).get("trialCodeDirectory")
    source = Path(folder) if folder else None
    if source is not None and source.is_relative_to(Path.cwd()):
        source = source.relative_to(Path.cwd())
    return [f"nni-plugins run {source}"] if source is not None else []
