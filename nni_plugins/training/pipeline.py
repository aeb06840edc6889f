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

from nni_plugins.training.checkpoint import seed_everything, write_whole
from nni_plugins.training.data import Data, build_data
from nni_plugins.training.dense import DenseBaseline, dense_model, prepare_dense
from nni_plugins.training.errors import CompressionError, first_line
from nni_plugins.training.loop import Loop
from nni_plugins.training.measure import latency_ms
from nni_plugins.training.models import build_model
from nni_plugins.training.objective import excess, objective
from nni_plugins.training.prune import Masks, Pruned, apply_masks, mask_pairs, masks_left, prune
from nni_plugins.training.rank import rank
from nni_plugins.training.recalibrate import recalibrate
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.weights import load_weights, save_weights

if TYPE_CHECKING:
    from nni_plugins.channels import Plan
    from nni_plugins.speedup import ModelSpeedup

__all__ = ["COMPACT", "MASKED", "MASKS", "METRICS", "PLAN", "compress", "evaluate_test", "prepare_dense"]

COMPACT, MASKED, MASKS = "compact.safetensors", "masked.safetensors", "masks.safetensors"
PLAN, METRICS, RECIPE, CHECKPOINT = "plan.json", "metrics.json", "recipe.yml", "finetune-{}.pt"
RANKING = "ranking.json"
RECALIBRATE_PRUNED = 20  # batches, for a model that is not fine-tuned


@dataclass
class _Run:
    """What the steps of one compression share."""

    recipe: Recipe
    output: Path
    dense: DenseBaseline
    data: Data
    loop: Loop
    example: Any
    checkpoint: Path
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
    if recipe.supernet.epochs:
        from nni_plugins.training.supernet import as_slice

        recipe, dense = as_slice(recipe, dense)
    data = build_data(recipe)
    loop = Loop(finetune_recipe(recipe), data, "fine-tuning")
    run = _Run(recipe, output, dense, data, loop, loop.place(data.example), checkpoint)
    model = loop.place(dense_model(recipe, data, dense.path))
    with run.timed("prune"):
        from nni_plugins.channels import ChannelGraph

        seed_everything(recipe.seed + 1)
        graph = ChannelGraph.watch(model, run.example)
        if recipe.rank.candidates:
            pruned, ranked = rank(recipe, model, loop, graph)
            _write_json(output / RANKING, [dataclasses.asdict(item) for item in ranked])
        else:
            pruned = prune(recipe, model, loop, graph)
    save_masks(pruned.masks, output / MASKS)
    quick = recipe.search.mode == "quick" or _breaks_bounds(run, model, pruned)
    after = recipe.finetune.after_speedup
    compact, speedup = _speedup(run, model, pruned.masks) if after else (None, None)
    with run.timed("finetune"):
        target = model if compact is None else compact
        kept = pruned.masks if compact is None else masks_left(compact, pruned.masks)
        _finetune(run, target, kept, pruned.plan, on_epoch, skip=quick)
    if compact is None or speedup is None:
        if recipe.speedup.keep_masked:
            save_weights(model, output / MASKED)
        compact, speedup = _speedup(run, model, pruned.masks)
    return _finish(run, compact, speedup, skipped=quick)


def evaluate_test(recipe: Recipe, path: str | Path) -> dict[str, Any]:
    """Evaluate a finished model on the test split: the only reader of that split.

    Parameters
    ----------
    recipe
        Of the model.
    path
        A compact model (``compact.safetensors``) or dense weights (:attr:`DenseBaseline.path`).

    Returns
    -------
    dict
        ``accuracy`` (``train.metric`` on the test split), ``metric`` (its name) and ``higher_is_better``.
    """
    data = build_data(recipe)
    loop = Loop(recipe, data, "test")
    model = loop.place(load_model(recipe, data, Path(path)))
    value = loop.evaluate(model, data.read_test())
    return {"accuracy": value, "metric": loop.metric.name, "higher_is_better": loop.metric.higher_is_better}


def load_model(recipe: Recipe, data: Data, path: Path) -> nn.Module:
    """Read a compact model, or dense weights, of a recipe."""
    from safetensors import safe_open

    from nni_plugins.speedup import load_compact

    def build() -> nn.Module:
        return build_model(recipe, data.shape, data.classes, recipe.seed)

    try:
        with safe_open(path, "pt") as file:
            compact = bool(file.metadata())
    except Exception as error:  # safetensors has its own kinds
        raise CompressionError(f"{path} cannot be read as a model: {first_line(error)}") from error
    if compact:
        try:
            return load_compact(path, build)
        except ValueError as error:
            raise CompressionError(first_line(error)) from error
    model = build()
    load_weights(model, path)
    return model


def finetune_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe whose ``train`` section is that of fine-tuning."""
    own = dataclasses.asdict(recipe.finetune)
    own.pop("after_speedup")
    return recipe.with_values({f"train.{name}": value for name, value in own.items() if value is not None})


def save_masks(masks: Masks, path: Path) -> None:
    """Write masks as safetensors of bools, named ``module.parameter``."""
    from safetensors.torch import save_file

    flat = {
        f"{module}.{name}" if module else name: (mask != 0).cpu().contiguous()
        for module, targets in masks.items()
        for name, mask in targets.items()
    }
    write_whole(path, lambda part: save_file(flat, part))


def load_masks(path: str | Path) -> Masks:
    """Read masks back in NNI's shapes, as floats."""
    from safetensors.torch import load_file

    masks: Masks = {}
    for key, mask in load_file(path).items():
        module, _, name = key.rpartition(".")
        masks.setdefault(module, {})[name] = mask.float()
    return masks


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


def _finetune(
    run: _Run, model: nn.Module, masks: Masks, plan: Plan | None, on_epoch: Callable[[float], Any] | None, skip: bool
) -> None:
    recipe, loop = run.recipe, run.loop
    if skip:
        recalibrate(model, loop, recipe.speedup.recalibrate_batches or RECALIBRATE_PRUNED)
        return
    pairs = mask_pairs(model, masks)
    known: dict[str, Any] = {}
    if plan is not None:
        cost = plan.cost()
        known = {"macs": cost.macs, "params": cost.params}

    @torch.no_grad()
    def keep_masked() -> None:
        for weight, mask in pairs:
            weight.mul_(mask)

    def report(epoch: int, value: float) -> None:
        if on_epoch is not None:
            known["accuracy"] = value
            costly = recipe.objective.metric not in known
            on_epoch(loop.metric.better(value) if costly else objective(recipe, loop.metric, run.dense, known))

    seed_everything(recipe.seed + 2)
    loop.train(model, loop.optimizer(model), on_epoch=report, after_step=keep_masked, checkpoint=run.checkpoint)
    run.checkpoint.unlink(missing_ok=True)
    recalibrate(model, loop, recipe.speedup.recalibrate_batches)
    apply_masks(model, masks)


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


def _finish(run: _Run, compact: nn.Module, speedup: ModelSpeedup, skipped: bool) -> dict[str, Any]:
    recipe, loop, dense, report, plan = run.recipe, run.loop, run.dense, speedup.report, speedup.plan
    assert plan is not None
    values: dict[str, Any] = {
        "accuracy": loop.evaluate(compact),
        "macs": int(report.macs_after),
        "params": int(report.params_after),
        **_size_and_speed(run, compact),
    }
    if not math.isfinite(values["accuracy"]):  # NNI's manager could not read it
        raise CompressionError(f"compact model: {loop.metric.name} is {values['accuracy']} on the validation split")
    broken = excess(recipe, loop.metric, dense, values)
    metrics = {
        "default": objective(recipe, loop.metric, dense, values),
        **values,
        "max_error": report.max_error,
        "relative_error": report.relative_error,
        "feasible": not broken,
        "broken_bounds": broken,
        "finetuned": not skipped and recipe.finetune.epochs > 0,
        "metric": loop.metric.name,
        "higher_is_better": loop.metric.higher_is_better,
        "dense": {key: value for key, value in dataclasses.asdict(dense).items() if key != "path"}
        | {"bytes": dense.bytes},
        "sparsity": _sparsities(plan),
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
