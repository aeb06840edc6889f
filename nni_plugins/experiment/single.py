"""``nni-plugins compress``: one recipe, without a tuner."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.ablation import ABLATION, without_teacher
from nni_plugins.experiment.errors import ExperimentError
from nni_plugins.experiment.evaluate import (
    bounds,
    dense_figures,
    latencies,
    shipped,
    stages,
    stock_check,
)
from nni_plugins.experiment.folders import dense_folder
from nni_plugins.experiment.gather import candidate, compact_figures, plan_of
from nni_plugins.experiment.trials import Trial
from nni_plugins.experiment.write import write
from nni_plugins.report.environment import environment
from nni_plugins.report.findings import Findings

if TYPE_CHECKING:
    from rich.console import Console

ONLY = "recipe"


def compress_recipe(
    path: Path, output: Path | None, changes: dict[str, Any], console: Console
) -> tuple[Findings, Path]:
    """Compress by a recipe, and report as on a search with one trial.

    Parameters
    ----------
    path
        The recipe.
    output
        Where everything goes; ``outputs/compress-NAME`` by default, by the recipe's folder. The dense baseline is kept
        in ``dense`` beside it, for the next run.
    changes
        Values for fields of the recipe, by dotted path.
    console
        Where progress is shown.

    Returns
    -------
    The findings, and the folder that they were written to.

    Raises
    ------
    RecipeError, CompressionError, ExperimentError
        With one line each.
    """
    from nni_plugins.training import compress, evaluate_test, load_recipe, prepare_dense
    from nni_plugins.training.errors import NoTestSplit

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    recipe = load_recipe(path).with_values(changes, "--set")
    name = path.resolve().parent.name
    output = output or Path("outputs") / f"compress-{name}"
    folder = output / "best"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"{output}: the output folder cannot be made ({error.strerror})") from None
    dense = prepare_dense(recipe, dense_folder(output), say)
    say(f"dense model: validation {dense.metric} {dense.accuracy:.4f}, {dense.macs:,} MACs")
    curve: list[float] = []

    def on_epoch(objective: float) -> None:
        curve.append(objective)
        say(f"fine-tuning epoch {len(curve)}/{recipe.finetune.epochs}: objective {objective:.4f}")

    metrics = compress(recipe, folder, dense, on_epoch)
    say("reading the test split; taking the model through NNI's own ModelSpeedup")
    latency = latencies(recipe, dense.path, folder / "compact.safetensors")
    tests: list[float | None] = [None, None]
    try:
        tests = [float(evaluate_test(recipe, path)["accuracy"]) for path in (dense.path, folder / shipped(metrics))]
    except NoTestSplit as error:
        say(f"no test figures: {error}")
    ablation = without_teacher(recipe, folder / "compact.safetensors", output / ABLATION, dense, say)
    trial = Trial(ONLY, 0, "SUCCEEDED", changes, metrics, folder=folder)
    only = candidate(trial, metrics, [value if math.isfinite(value) else None for value in curve])
    groups, blocks = plan_of(folder)
    command = " ".join(["nni-plugins compress", str(path), *(f"--set {key}={value}" for key, value in changes.items())])
    findings = Findings(
        title=name,
        metric=str(metrics["metric"]),
        higher_is_better=bool(metrics["higher_is_better"]),
        dense=replace(dense_figures(dense, tests[0]), latency_ms=latency[0]),
        compact=replace(compact_figures(metrics, tests[1]), latency_ms=latency[1]),
        chosen=ONLY,
        candidates=[only],
        max_error=float(metrics["max_error"]),
        relative_error=float(metrics["relative_error"]),
        tolerance=recipe.speedup.tolerance,
        stock=stock_check(recipe, folder),
        bounds=bounds(recipe),
        environment=environment(),
        commands=[command],
        recipe=(folder / "recipe.yml").read_text(encoding="utf-8"),
        stages=stages(dense, metrics),
        ablation=ablation,
        round_to=metrics.get("round_to"),
        latency_budget=metrics.get("latency_budget"),
        state="single",
        layers=groups,
        blocks=blocks,
    )
    return findings, write(findings, output, folder)
