"""What is measured on the winner once a search is over: test split, latency, NNI's own speedup, the teacher's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.ablation import ABLATION, without_teacher
from nni_plugins.experiment.bring import bring_dense
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.folders import read_json
from nni_plugins.experiment.gather import BOUNDS, compact_figures, metrics_of
from nni_plugins.experiment.manifest import Known
from nni_plugins.experiment.trials import Trial
from nni_plugins.files import write_json
from nni_plugins.report.findings import Findings, ModelFigures, StockCheck

if TYPE_CHECKING:
    from nni_plugins.training import DenseBaseline, Recipe

TEST = "test.json"
RECORD = "report.json"
"""In an experiment's own folder: what the last report measured on the winner."""
EXPECTED = ("RecipeError", "CompressionError", "ExperimentError", "OSError", "FileNotFoundError", "PermissionError")
"""Errors whose text says all."""


def evaluated(findings: Findings, known: Known, winner: Trial, say: Callable[[str], Any], read_test: bool) -> Findings:
    """The findings with what is measured on the winner at the end: test split, latency, NNI's own speedup, teacher.

    What cannot be done here, since code or data of the experiment are elsewhere, is named in the notes.
    """
    from nni_plugins.training import load_recipe, prepare_dense
    from nni_plugins.training.dense import read_dense
    from nni_plugins.training.errors import NoTestSplit

    folder, metrics = folder_of(winner), metrics_of(winner)
    try:
        recipe = load_recipe(folder / "recipe.yml")
        if not known.listed and read_dense(known.folder / "dense" / recipe.dense_key()) is None:
            raise ExperimentError("the dense model is not in the experiment's folder")
        if known.listed:
            bring_dense(known, winner.id)
        dense = prepare_dense(recipe, known.folder / "dense", say)
        test: dict[str, float | None] = {"dense": None, "compact": None}
        if read_test or winner.id in tested(known.folder / TEST)[-1:]:  # or it is known already
            say(f"trial {winner.id} is the best; reading the test split")
            try:
                test = {**test_figures(recipe, winner, metrics, dense, known.folder / TEST)}
            except NoTestSplit as error:
                say(f"no test figures: {error}")
        else:
            findings = noted(findings, "the test split was left unread, as asked")
        ablation = None
        if read_test:
            ablation = without_teacher(
                recipe, folder / "compact.safetensors", known.folder / ABLATION / winner.id, dense, say
            )
        say("taking it through NNI's own ModelSpeedup")
        latency = latencies(recipe, dense.path, folder / "compact.safetensors")
        findings = replace(
            findings,
            dense=replace(dense_figures(dense, test["dense"]), latency_ms=latency[0]),
            compact=replace(compact_figures(metrics, test["compact"]), latency_ms=latency[1]),
            stock=stock_check(recipe, folder),
            stages=stages(dense, metrics),
            ablation=ablation,
            round_to=metrics.get("round_to"),
            latency_budget=metrics.get("latency_budget"),
            tested=tested(known.folder / TEST),
        )
    except Exception as error:  # whatever code of the user's raises that is not here, or not as it was
        if known.listed and type(error).__name__ not in EXPECTED:
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        say(f"the winner was not run again: {words}")
        found = recorded(findings, known, winner, say, read_test)
        return noted(found, f"the winner's model was not run again here: {words}")
    keep_record(known.folder / RECORD, findings)
    return findings


def recorded(findings: Findings, known: Known, winner: Trial, say: Callable[[str], Any], read_test: bool) -> Findings:
    """The findings with what an earlier report measured on this winner; while an experiment runs, without that."""
    if findings.state == "running":
        return findings
    record = read_json(known.folder / RECORD) or {}
    if record.get("chosen") != winner.id:
        known_test = read_json(known.folder / TEST) or {}
        if known_test.get("trial") == winner.id and findings.dense is not None and findings.compact is not None:
            findings = replace(
                findings,
                dense=replace(findings.dense, test=known_test.get("dense")),
                compact=replace(findings.compact, test=known_test.get("compact")),
                tested=tested(known.folder / TEST),
            )
            return noted(findings, "no report was made where it ran: times are those that the trials took")
        return noted(
            findings, "no report was made where it ran: there are no test figures, and no proof by NNI's own code"
        )
    try:
        before = Findings.from_dict(record)
    except (TypeError, ValueError, KeyError, AttributeError):
        return noted(findings, f"{RECORD} of the experiment cannot be read")
    fields = (
        "dense",
        "compact",
        "stock",
        "stages",
        "ablation",
        "round_to",
        "latency_budget",
        "tested",
        "tolerance",
        "bounds",
    )
    found = replace(findings, **{name: getattr(before, name) for name in fields})
    return replace(found, environment=found.environment or before.environment)


def keep_record(path: Path, findings: Findings) -> None:
    """Keep what was measured at the end in the experiment's folder, for reports on a copy of it elsewhere."""
    slim = replace(findings, candidates=(), importance=(), layers=())
    try:
        write_json(path, slim.to_dict())
    except OSError:  # a folder that may only be read
        return


def noted(findings: Findings, note: str) -> Findings:
    """The findings with one more note."""
    return replace(findings, notes=(*findings.notes, note))


def test_figures(
    recipe: Recipe, winner: Trial, metrics: dict[str, Any], dense: DenseBaseline, record: Path
) -> dict[str, float]:
    """The test metric of the dense and of the compact model: read once, kept in `record`, then taken from there."""
    from nni_plugins.training import evaluate_test

    known = read_json(record)
    if known is not None and known.get("trial") == winner.id:
        return {"dense": known["dense"], "compact": known["compact"]}
    earlier = tested(record)
    figures = {
        "dense": float(evaluate_test(recipe, dense.path)["accuracy"]),
        "compact": float(evaluate_test(recipe, folder_of(winner) / shipped(metrics))["accuracy"]),
    }
    kept = {"trial": winner.id, **figures, **({"earlier": earlier} if earlier else {})}
    try:
        write_json(record, kept)
    except OSError as error:
        raise ExperimentError(
            f"{record}: it cannot be written ({error.strerror}), so that the test split would be read again each time"
        ) from None
    return figures


def tested(record: Path) -> list[str]:
    """For which trials the test split was read, in this order."""
    known = read_json(record) or {}
    earlier = known.get("earlier")
    found = [str(one) for one in earlier] if isinstance(earlier, list) else []
    return [*found, str(known["trial"])] if known.get("trial") else found


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


def dense_figures(dense: DenseBaseline, test: float | None) -> ModelFigures:
    """The dense model in numbers."""
    size = dense.path.stat().st_size if dense.path.is_file() else None
    return ModelFigures("dense", dense.macs, dense.params, dense.latency_ms, dense.accuracy, test, size)


def bounds(recipe: Recipe) -> dict[str, float]:
    """The bounds that the recipe's objective sets."""
    names = [field.name for field in dataclasses.fields(recipe.objective)]
    limits = {name: getattr(recipe.objective, name) for name in names if name in BOUNDS}
    return {name: value for name, value in limits.items() if value is not None}
