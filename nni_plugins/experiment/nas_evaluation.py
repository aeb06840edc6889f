"""One trial of an architecture search: the architecture that a sample chooses, taken through a recipe.

The trial's recipe is the experiment's, with the architecture as its model and the shares that are kept as sparsities of
its groups. So it is trained dense (once for all trials of one architecture), pruned, fine-tuned, compacted and proved
as any other, and what stays in its folder can be loaded, reported on and repeated by ``nni-plugins compress``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nni
from nni.nas.evaluator import Evaluator
from nni.nas.space import SimplifiedModelSpace

from nni_plugins.channels import ChannelGraph
from nni_plugins.channels.cost import Cost
from nni_plugins.experiment.folders import dense_folder, told_to_nni, trial_output
from nni_plugins.search.surveys import KEEP, free_groups, sparsities_of
from nni_plugins.training.allocate import whole
from nni_plugins.training.data import build_data
from nni_plugins.training.dense import prepare_dense
from nni_plugins.training.measure import latency_ms
from nni_plugins.training.models import build_model
from nni_plugins.training.objective import RELATIVE
from nni_plugins.training.pipeline import compress
from nni_plugins.training.prune import NONE
from nni_plugins.training.recipe import Recipe, load_recipe
from nni_plugins.training.resolve import source_digest
from nni_plugins.training.weights import save_weights

ARCHITECTURE = "nni_plugins.search.pruned_space:architecture"


@nni.trace
class RecipeEvaluation(Evaluator):
    """NNI's evaluator of an architecture search: a recipe.

    Parameters
    ----------
    recipe
        Path of the recipe, relative to where trials run.
    space
        ``module:function``, from which trials make the space.
    limits
        Bounds and reference of the recipe's objective as numbers, since every architecture has another dense model.
    """

    def __init__(self, recipe: str, space: str, limits: dict[str, float] | None = None) -> None:
        self.recipe, self.space, self.limits = recipe, space, limits or {}

    def run(self, sample: dict[str, Any], output: Path, on_epoch: Callable[[float], Any] | None = None) -> dict:
        """Train, prune and prove what a sample chooses; returns the metrics, and leaves the model in ``output``."""
        base = load_recipe(self.recipe).with_values(self.limits, "the bounds")
        recipe = recipe_for(base, self.space, sample)
        return compress(recipe, output, prepare_dense(recipe, dense_folder(output), print), on_epoch)

    def _execute(self, model: Any) -> Any:
        """What NNI calls in a trial: the model is not made here, but by the recipe."""

        assert isinstance(model, SimplifiedModelSpace)
        metrics = self.run(model.sample or {}, trial_output(), nni.report_intermediate_result)
        nni.report_final_result(told_to_nni(metrics))
        return metrics


def recipe_for(base: Recipe, space: str, sample: dict[str, Any]) -> Recipe:
    """Return the recipe of one sample.

    Parameters
    ----------
    base
        Its ``model`` section is replaced, but for a ``checkpoint``; of ``prune``, what goes is the sample's to say, and
        how (``pruner``, ``arguments``, ``round_to``) the recipe's.
    space
        ``module:function``.
    sample
        As NNI's strategies make it.

    Notes
    -----
    What breaks a bound on MACs or parameters is not trained, since it cannot become feasible.
    """
    sample = {
        str(name): _plain(value) for name, value in sample.items()
    }  # NNI's labels are texts of a kind of their own
    inside = {name: value for name, value in sample.items() if not name.startswith(KEEP)}
    recipe = base.with_values(
        {
            "model.name": ARCHITECTURE,
            "model.arguments": {
                "space": space,
                "sample": inside,
                "home": base.folder,
                "digest": source_digest(space, base.folder)[:12],
            },
        },
        "the space",
    )
    data = build_data(recipe)
    graph = ChannelGraph.watch(build_model(recipe, seed=recipe.seed), data.example)
    groups = free_groups(graph, recipe.prune.exact_only)
    sparsities = sparsities_of(sample, [group.name for group in groups])
    chosen = {f"prune.groups.{name}": round(share, 6) for name, share in sparsities.items()}
    loses = any(share > 0 for share in sparsities.values())
    cost = graph.cost({group.name: whole(group.size, sparsities[group.name], recipe.prune) for group in groups})
    if recipe.objective.skip_infeasible and too_costly(recipe, cost):
        recipe = recipe.with_values({"train.epochs": 0, "supernet.epochs": 0, "model.checkpoint": None}, "the bounds")
    return recipe.with_values(
        {
            "prune.groups": {},
            "prune.target": "channels",
            "prune.sparsity": 0.0,
            **(chosen if loses else {"prune.pruner": NONE, "prune.arguments": {}}),
        },
        "the sample",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def too_costly(recipe: Recipe, cost: Cost) -> bool:
    """Say whether a cost breaks a bound of the objective that is a number: no training would change that."""
    bounds = {name: getattr(recipe.objective, name) for name in ("macs", "params")}
    return any(bound is not None and 1 < bound < getattr(cost, name) for name, bound in bounds.items())


def limits_of(base: Recipe, space: str, default: dict[str, Any]) -> dict[str, float]:
    """Return what a recipe's objective counts in shares, as numbers: one scale for all architectures.

    Parameters
    ----------
    base, space
        As for :func:`recipe_for`.
    default
        The sample of the architecture that they are shares of.

    Returns
    -------
    dict
        ``objective.NAME`` for each bound that is a share, and ``objective.reference`` where a cost is the metric.
    """
    goal = base.objective
    shares = {name: getattr(goal, name) for name in RELATIVE}
    shares = {name: share for name, share in shares.items() if share is not None and share <= 1}
    measured = goal.metric if goal.metric != "accuracy" and goal.reference is None else ""
    if not shares and not measured:
        return {}
    recipe = recipe_for(base, space, default)
    data = build_data(recipe)
    model = build_model(recipe, seed=recipe.seed)
    cost = ChannelGraph.watch(model, data.example).cost()
    costs: dict[str, float] = {"macs": cost.macs, "params": cost.params}
    if measured == "latency_ms":
        costs[measured] = latency_ms(model, data.example)
    if "bytes" in {*shares, measured}:
        with TemporaryDirectory() as folder:
            save_weights(model, Path(folder) / "weights.safetensors")
            costs["bytes"] = (Path(folder) / "weights.safetensors").stat().st_size
    limits = {f"objective.{name}": round(share * costs[name], 1) for name, share in shares.items()}
    return {**limits, "objective.reference": float(costs[measured])} if measured else limits
