"""From dense to compact: prune, fine-tune, speed up (proved), measure. Used by trials and by the command line alike."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_plugins.files import write_whole
from nni_plugins.pruners.ranks import as_on_rank_zero
from nni_plugins.training.artefacts import COMPACT, GRIDS, MASKED, MASKS, METRICS, PLAN, RANKING, RECIPE, save_masks
from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.data import Data, build_data
from nni_plugins.training.dense import DenseBaseline, dense_model
from nni_plugins.training.errors import CompressionError, first_line
from nni_plugins.training.export import FILES, INT8
from nni_plugins.training.loop import Loop
from nni_plugins.training.measure import latency_ms
from nni_plugins.training.objective import excess, objective
from nni_plugins.training.prune import NONE, Masks, Pruned, apply_masks, mask_pairs, masks_left, prune
from nni_plugins.training.rank import rank
from nni_plugins.training.recalibrate import recalibrate
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.sections import AUTO
from nni_plugins.training.weights import save_weights

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph, Plan
    from nni_plugins.speedup import ModelSpeedup
    from nni_plugins.training.quantize import Quantized

CHECKPOINT, TIMED = "finetune-{}.pt", "timed.json"
RECALIBRATE_PRUNED = 20  # batches, for a model that is not fine-tuned


@dataclass
class _Run:
    """What the steps of one compression share, and what they have made so far."""

    recipe: Recipe
    output: Path
    dense: DenseBaseline
    data: Data
    loop: Loop
    example: Any
    checkpoint: Path
    on_epoch: Callable[[float], Any] | None
    model: nn.Module
    masks: Masks = field(default_factory=dict)
    plan: Plan | None = None
    quick: bool = False
    speedup: ModelSpeedup | None = None
    quantized: Quantized | None = None
    exports: dict[str, Any] = field(default_factory=dict)
    timed_choice: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


def compress(
    recipe: Recipe,
    output: str | Path,
    dense: DenseBaseline,
    on_epoch: Callable[[float], Any] | None = None,
) -> dict[str, Any]:
    """Make the compact model of a recipe.

    Parameters
    ----------
    recipe
        Its ``prune``, ``finetune``, ``speedup`` and ``objective`` sections.
    output
        Folder to write ``compact.safetensors``, ``masks.safetensors``, ``masked.safetensors``, ``plan.json``,
        ``metrics.json`` and ``recipe.yml`` into. A fine-tuning that was cut off there goes on where it was.
    dense
        Of :func:`prepare_dense`.
    on_epoch
        Called after each epoch of fine-tuning with the objective so far, comparable with the final one.

    Returns
    -------
    dict
        ``default`` (what a tuner maximises), ``accuracy`` (``train.metric`` on validation), ``macs``, ``params``,
        ``latency_ms``, ``max_error`` (absolute, compact against masked), ``relative_error`` (of the output's size),
        ``feasible`` and more; the contents of ``metrics.json``.

    Raises
    ------
    RecipeError, CompressionError
        With a reason of one line.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    recipe.save(output / RECIPE)
    checkpoint = output / CHECKPOINT.format(_key(recipe))
    for stale in set(output.glob(CHECKPOINT.format("*"))) - {checkpoint}:  # of another recipe
        stale.unlink(missing_ok=True)
    for name in (RANKING, GRIDS, *FILES):  # of a run before, which had other steps
        (output / name).unlink(missing_ok=True)
    if recipe.supernet.epochs:
        from nni_plugins.training.supernet import as_slice

        recipe, dense = as_slice(recipe, dense)
    _check_packages(recipe)
    data = build_data(recipe)
    loop = Loop(finetune_recipe(recipe), data, "fine-tuning")
    model = loop.place(dense_model(recipe, data, dense.path))
    run = _Run(recipe, output, dense, data, loop, loop.place(data.example), checkpoint, on_epoch, model)
    for step in recipe.steps:
        with run.timed(step):
            STEPS[step](run)
    return _finish(run)


def finetune_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe whose ``train`` section is that of fine-tuning."""
    own = dataclasses.asdict(recipe.finetune)
    return recipe.with_values({f"train.{name}": value for name, value in own.items() if value is not None})


def _key(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _breaks_bounds(run: _Run, model: nn.Module, pruned: Pruned) -> bool:
    """Say whether the costs of what pruning left break a bound, which training would not change."""
    objective = run.recipe.objective
    if not objective.skip_infeasible:
        return False
    costs: dict[str, Any] = {}
    if pruned.plan is not None:
        cost = pruned.plan.cost()
        costs = {"macs": cost.macs, "params": cost.params}
    if excess(run.recipe, run.loop.metric, run.dense, costs):
        return True
    if objective.bytes is None and objective.latency_ms is None:
        return False
    compact, _ = _speedup(run, copy.deepcopy(model), pruned.masks)
    return bool(excess(run.recipe, run.loop.metric, run.dense, _size_and_speed(run, compact)))


def _size_and_speed(run: _Run, compact: nn.Module) -> dict[str, Any]:
    """Write a compact model's file, and return its ``bytes`` and ``latency_ms``."""
    from nni_plugins.speedup import save_compact

    save_compact(compact, run.output / COMPACT)
    return {"bytes": (run.output / COMPACT).stat().st_size, "latency_ms": latency_ms(compact, run.example)}


def _prune(run: _Run) -> None:
    from nni_plugins.channels import ChannelGraph

    graph = ChannelGraph.watch(run.model, run.example)
    _choose_by_time(run, graph)
    recipe = run.recipe
    seed_everything(recipe.seed + 1)
    if recipe.rank.candidates:
        pruned, ranked = rank(recipe, run.model, run.loop, graph)
        _write_json(run.output / RANKING, [dataclasses.asdict(item) for item in ranked])
    else:
        pruned = prune(recipe, run.model, run.loop, graph)
    run.masks, run.plan = pruned.masks, pruned.plan
    save_masks(pruned.masks, run.output / MASKS)
    if as_on_rank_zero(_digest(run.masks)) != _digest(run.masks):
        raise CompressionError("prune: the processes of this trial chose different masks; please report this recipe")
    run.quick = recipe.search.mode == "quick" or as_on_rank_zero(_breaks_bounds(run, run.model, pruned))


def _choose_by_time(run: _Run, graph: ChannelGraph) -> None:
    """Put numbers in the place of what the recipe leaves to the clock; a fine-tuning that goes on keeps its own."""
    from nni_plugins.training import latency_budget, multiples

    settings = run.recipe.prune
    auto, latency = settings.round_to == AUTO, settings.target == "latency" and settings.pruner != NONE
    if not auto and not latency:
        return
    file = run.output / TIMED
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() and run.checkpoint.exists() else None
    if known is None:
        if auto:
            known = {"round_to": multiples.said(*multiples.choose(run.recipe, run.model, run.loop, graph))}
        else:
            made = latency_budget.meet(run.recipe, run.model, run.loop, graph)
            known = {"latency_budget": latency_budget.said(settings.sparsity, made)}
    run.timed_choice = as_on_rank_zero(known)
    _write_json(file, run.timed_choice)
    if auto:
        run.recipe = multiples.fixed(run.recipe, run.timed_choice["round_to"]["chosen"])
    else:
        sparsity = run.timed_choice["latency_budget"]["sparsity"]
        run.recipe = latency_budget.corrected(run.recipe, sparsity, run.model, graph)


def _digest(masks: Masks) -> str:
    """A digest of masks, to compare those of several processes."""
    total = hashlib.sha256()
    for name in sorted(masks):
        for target in sorted(masks[name]):
            total.update(f"{name}.{target}".encode())
            total.update(masks[name][target].detach().cpu().bool().numpy().tobytes())
    return total.hexdigest()


def _finetune(run: _Run) -> None:
    recipe, loop, model = run.recipe, run.loop, run.model
    if run.quick:
        recalibrate(model, loop, recipe.speedup.recalibrate_batches or RECALIBRATE_PRUNED)
        return
    masks = run.masks if run.speedup is None else masks_left(model, run.masks)
    pairs = mask_pairs(model, masks)
    known: dict[str, Any] = {}
    if run.plan is not None:
        cost = run.plan.cost()
        known = {"macs": cost.macs, "params": cost.params}

    @torch.no_grad()
    def keep_masked() -> None:
        for weight, mask in pairs:
            weight.mul_(mask)

    def report(epoch: int, value: float) -> None:
        if run.on_epoch is not None:
            known["accuracy"] = value
            costly = recipe.objective.metric not in known
            run.on_epoch(loop.metric.better(value) if costly else objective(recipe, loop.metric, run.dense, known))

    step = None
    if recipe.distill.method != "none" and recipe.finetune.epochs > 0:
        from nni_plugins.training.distill import Distillation, build_teacher

        teacher = build_teacher(recipe, loop, lambda: dense_model(recipe, run.data, run.dense.path))
        step = Distillation(recipe, loop, teacher, run.plan)
    seed_everything(recipe.seed + 2)
    loop.train(
        model, loop.optimizer(model), step, on_epoch=report, after_step=keep_masked, checkpoint=run.checkpoint
    )  # fmt: skip
    run.checkpoint.unlink(missing_ok=True)
    recalibrate(model, loop, recipe.speedup.recalibrate_batches)
    apply_masks(model, masks)


def _compact(run: _Run) -> None:
    steps = run.recipe.steps
    if run.recipe.speedup.keep_masked and "finetune" in steps[: steps.index("speedup")]:
        save_weights(run.model, run.output / MASKED)
    run.model, run.speedup = _speedup(run, run.model, run.masks)


def _quantize(run: _Run) -> None:
    if run.recipe.quantize.method == "none":
        return
    from nni_plugins.training.quantize import quantize, settings_of

    seed_everything(run.recipe.seed + 3)
    run.quantized = quantize(run.recipe, run.model, run.loop)
    _write_json(run.output / GRIDS, settings_of(run.quantized.grids))


def _export(run: _Run) -> None:
    if not run.recipe.export.formats:
        return
    from nni_plugins.training.export import export

    _measure(run)
    assert run.speedup is not None and run.speedup.plan is not None
    said = {"recipe": run.recipe.to_dict(), "plan": run.speedup.plan.to_dict(), "metrics": run.values}
    run.exports = export(run.recipe, run.model, run.quantized, run.example, run.output, said)


STEPS: dict[str, Callable[[_Run], None]] = {
    "prune": _prune,
    "finetune": _finetune,
    "speedup": _compact,
    "quantize": _quantize,
    "export": _export,
}
"""What :data:`nni_plugins.training.steps.STEPS` names."""


def _check_packages(recipe: Recipe) -> None:
    """Find out now, not after an hour of training, that a package for the exports is missing."""
    if recipe.export.formats:
        from nni_plugins.training.export import check_packages

        check_packages(recipe.export.formats)


def _speedup(run: _Run, model: nn.Module, masks: Masks) -> tuple[nn.Module, ModelSpeedup]:
    from nni_plugins.speedup import ModelSpeedup

    model.eval()
    with run.timed("speedup"):
        try:
            speedup = ModelSpeedup(model, run.example, masks, exact_only=run.recipe.prune.exact_only)
            compact = speedup.speedup_model()
        except ValueError as error:
            raise CompressionError(f"speedup: {first_line(error)}") from error
    compact.eval()
    report, tolerance = speedup.report, run.recipe.speedup.tolerance
    assert report.relative_error is not None
    if not report.relative_error <= tolerance and not report.inexact:
        raise CompressionError(
            f"speedup: the compact model is off from the masked one by {report.relative_error:.2g} of the output's "
            f"size, more than speedup.tolerance {tolerance:g}; please report this model"
        )
    return compact, speedup


def _measure(run: _Run) -> dict[str, Any]:
    """Return accuracy and costs of what was made; of the quantised model where there is one."""
    if run.values:
        return run.values
    loop, speedup = run.loop, run.speedup
    assert speedup is not None
    values: dict[str, Any] = {
        "accuracy": loop.evaluate(run.model),
        "macs": int(speedup.report.macs_after),
        "params": int(speedup.report.params_after),
        **_size_and_speed(run, run.model),
    }
    if run.quantized is not None:
        values["float_accuracy"], values["accuracy"] = values["accuracy"], loop.evaluate(run.quantized.model)
    if not math.isfinite(values["accuracy"]):  # NNI's manager could not read it
        raise CompressionError(f"compact model: {loop.metric.name} is {values['accuracy']} on the validation split")
    run.values = values
    return values


def _finish(run: _Run) -> dict[str, Any]:
    assert run.speedup is not None
    recipe, loop, dense, report, plan = run.recipe, run.loop, run.dense, run.speedup.report, run.speedup.plan
    assert plan is not None
    values = dict(_measure(run))
    if "int8" in run.exports:  # what is shipped
        values["float_bytes"], values["bytes"] = values["bytes"], run.exports["int8"]["bytes"]
    broken = excess(recipe, loop.metric, dense, values)
    metrics = {
        "default": objective(recipe, loop.metric, dense, values),
        **values,
        "max_error": report.max_error,
        "relative_error": report.relative_error,
        "feasible": not broken,
        "broken_bounds": broken,
        "finetuned": not run.quick and recipe.finetune.epochs > 0 and "finetune" in recipe.steps,
        "metric": loop.metric.name,
        "higher_is_better": loop.metric.higher_is_better,
        "dense": {key: value for key, value in dataclasses.asdict(dense).items() if key != "path"}
        | {"bytes": dense.bytes},
        "sparsity": _sparsities(plan),
        **run.timed_choice,
        "exports": run.exports,
        "final": INT8 if "int8" in run.exports else COMPACT,
        "seconds": run.seconds,
    }
    _write_json(run.output / PLAN, {"groups": plan.to_dict(), "report": report.to_dict()})
    _write_json(run.output / METRICS, metrics)
    return metrics


def _sparsities(plan: Plan) -> dict[str, float]:
    return {name: round(1 - len(item["kept"]) / item["size"], 4) for name, item in plan.to_dict().items()}


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
