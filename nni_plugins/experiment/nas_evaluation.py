"""One trial of an architecture search: the architecture that a sample chooses, taken through a recipe.

The trial's recipe is the experiment's, with the architecture as its model and the shares that are kept as sparsities of
its groups. So it is trained dense (once for all trials of one architecture), pruned, fine-tuned, compacted and proved
as any other, and what stays in its folder can be loaded, reported on and repeated by ``nni-plugins compress``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nni
from nni.nas.evaluator import Evaluator
from nni.nas.space import SimplifiedModelSpace

from nni_plugins.channels import ChannelGraph
from nni_plugins.experiment.folders import dense_folder
from nni_plugins.search.surveys import free_groups, sparsities_of
from nni_plugins.training.checkpoint import write_whole
from nni_plugins.training.data import Data, build_data
from nni_plugins.training.dense import DenseBaseline, prepare_dense
from nni_plugins.training.loop import Loop
from nni_plugins.training.measure import latency_ms
from nni_plugins.training.models import build_model
from nni_plugins.training.pipeline import compress
from nni_plugins.training.prune import NONE
from nni_plugins.training.recipe import Recipe, load_recipe
from nni_plugins.training.resolve import source_digest
from nni_plugins.training.weights import save_weights

ARCHITECTURE = "nni_plugins.search.pruned_space:architecture"


@dataclass(frozen=True)
class Scale(DenseBaseline):
    """A dense model whose costs are those of the space's default architecture: one scale for all trials."""

    file_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Size of the default architecture's weights."""
        return self.file_bytes


@nni.trace
class RecipeEvaluation(Evaluator):
    """NNI's evaluator of an architecture search: a recipe.

    Parameters
    ----------
    recipe
        Path of the recipe, relative to where trials run.
    space
        ``module:function``, from which trials make the space.
    default
        The sample of the architecture that bounds on costs are shares of.
    """

    def __init__(self, recipe: str, space: str, default: dict[str, Any] | None = None) -> None:
        self.recipe, self.space, self.default = recipe, space, default or {}

    def run(self, sample: dict[str, Any], output: Path, on_epoch: Callable[[float], Any] | None = None) -> dict:
        """Train, prune and prove what a sample chooses; returns the metrics, and leaves the model in ``output``."""
        base = load_recipe(self.recipe)
        recipe = recipe_for(base, self.space, sample)
        dense = prepare_dense(recipe, dense_folder(output), print)
        return compress(recipe, output, scaled(base, self.space, self.default, dense, dense_folder(output)), on_epoch)

    def _execute(self, model: Any) -> Any:
        """What NNI calls in a trial: the model is not made here, but by the recipe."""
        from nni_plugins.experiment.folders import trial_output

        assert isinstance(model, SimplifiedModelSpace)
        metrics = self.run(model.sample or {}, trial_output(), nni.report_intermediate_result)
        nni.report_final_result(metrics)
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
    """
    inside = {name: value for name, value in sample.items() if not name.startswith("keep:")}
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
    return recipe.with_values(
        {
            "prune.groups": {},
            "prune.target": "channels",
            "prune.sparsity": 0.0,
            **(chosen if loses else {"prune.pruner": NONE, "prune.arguments": {}}),
        },
        "the sample",
    )


def scaled(base: Recipe, space: str, default: dict[str, Any], dense: DenseBaseline, folder: Path) -> Scale:
    """Return a dense model with the costs of the default architecture, which are measured once an experiment."""
    from filelock import FileLock

    recipe = recipe_for(base, space, default)
    record = folder / f"scale-{recipe.dense_key()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(record.with_suffix(".lock"))):
        if not record.is_file():
            costs = _costs(recipe, build_data(recipe), record.with_suffix(".safetensors"))
            write_whole(record, lambda part: part.write_text(json.dumps(costs), encoding="utf-8"))
    costs = json.loads(record.read_text(encoding="utf-8"))
    own = {field.name: getattr(dense, field.name) for field in dataclasses.fields(DenseBaseline)}
    return Scale(**{**own, **costs})


def _costs(recipe: Recipe, data: Data, weights: Path) -> dict[str, Any]:
    loop = Loop(recipe, data)
    model, example = loop.place(build_model(recipe, seed=recipe.seed)), loop.place(data.example)
    cost = ChannelGraph.watch(model, example).cost()
    save_weights(model, weights)
    size = weights.stat().st_size
    weights.unlink()
    return {
        "macs": int(cost.macs),
        "params": int(cost.params),
        "latency_ms": latency_ms(model, example),
        "file_bytes": size,
    }
